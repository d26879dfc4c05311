# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The quick start's arms: the same data and steps for LoRA and CuMA, with TRL's trainers and ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import ProgressCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from .. import CuMAConfig, CuMADPOConfig, CuMADPOTrainer, CuMASFTConfig, CuMASFTTrainer
from ..demographics import FieldEncoder, TextEncoder, encoder_from_state
from .settings import Settings


@dataclass(frozen=True)
class Arm:
    """
    One way to adapt the model.

    Args:
        name (`str`): short name, used for folders and for the committed learning rates.
        label (`str`): name in tables.
        prompt_profile (`bool`): whether the prompt states the profile.
        matched (`str`): `"cuma"` for CuMA itself; for a LoRA what it shares with CuMA: `"rank"` or `"parameters"`.
    """

    name: str
    label: str
    prompt_profile: bool
    matched: str

    @property
    def is_cuma(self) -> bool:
        return self.matched == "cuma"


ARMS = (
    Arm("lora-rank", "LoRA, no profile, rank matched", False, "rank"),
    Arm("lora", "LoRA, no profile, parameters matched", False, "parameters"),
    Arm("lora-prompt-rank", "LoRA, profile in prompt, rank matched", True, "rank"),
    Arm("lora-prompt", "LoRA, profile in prompt, parameters matched", True, "parameters"),
    Arm("cuma", "CuMA, profile to the router only", False, "cuma"),
)


def load_model(model_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def adapter_configs(model: PreTrainedModel, settings: Settings, demographic_dim: int) -> dict[str, PeftConfig]:
    """
    The adapter of each arm. The parameter-matched LoRA has the rank that comes nearest to CuMA's trainable parameters.

    Raises:
        ValueError: if that rank is half of a module's smaller dimension or more, where a LoRA stops being low-rank, or
            the counts differ by more than 2 %.
    """
    cuma = CuMAConfig(task_type="CAUSAL_LM", target_modules=list(settings.target_modules), **settings.cuma)
    counted = CuMAConfig(**{**cuma.to_dict(), "demographic_dim": demographic_dim, "inference_mode": False})
    shapes = [
        module.weight.shape
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in settings.target_modules
    ]
    per_rank = sum(out_features + in_features for out_features, in_features in shapes)
    goal = get_peft_model(load_like(model), counted).get_nb_trainable_parameters()[0]
    rank = round(goal / per_rank)
    if rank >= min(min(shape) for shape in shapes) / 2 or abs(rank * per_rank / goal - 1) > 0.02:
        raise ValueError(
            f"A LoRA with CuMA's {goal:,} parameters would need rank {goal / per_rank:.1f} in modules of "
            f"{min(min(shape) for shape in shapes)} features. Shrink the router or the experts."
        )

    def lora(r: int) -> LoraConfig:
        # alpha / r as for CuMA's experts: the learning rate is what is tuned
        alpha = r * settings.cuma["lora_alpha"] / settings.cuma["r"]
        return LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha, target_modules=list(settings.target_modules))

    return {"cuma": cuma, "rank": lora(settings.cuma["r"]), "parameters": lora(rank)}


def load_like(model: PreTrainedModel) -> PreTrainedModel:
    with torch.device("meta"):
        return type(model)(model.config)


def train_sft(
    arm: Arm,
    model_dir: Path,
    dataset: Dataset,
    peft_config: PeftConfig,
    encoder: FieldEncoder | TextEncoder,
    settings: Settings,
    learning_rate: float,
    seed: int,
    output_dir: Path,
) -> SFTTrainer:
    """Train one arm's adapter by SFT, save it in `output_dir`, and return the trainer."""
    config_class, trainer_class = (CuMASFTConfig, CuMASFTTrainer) if arm.is_cuma else (SFTConfig, SFTTrainer)
    args = config_class(
        **_arguments(settings, seed, output_dir),
        max_steps=settings.sft_steps,
        per_device_train_batch_size=settings.sft_batch_size,
        learning_rate=learning_rate,
    )
    trainer = trainer_class(
        model=load_model(model_dir),
        args=args,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        peft_config=peft_config,
        **({"demographic_encoder": encoder} if arm.is_cuma else {}),
    )
    return _train(trainer, "SFT", output_dir)


def train_dpo(
    arm: Arm,
    model_dir: Path,
    adapter_dir: Path,
    dataset: Dataset,
    settings: Settings,
    learning_rate: float,
    seed: int,
    output_dir: Path,
) -> DPOTrainer:
    """Continue an arm's SFT adapter by DPO against its frozen copy, save it, and return the trainer."""
    config_class, trainer_class = (CuMADPOConfig, CuMADPOTrainer) if arm.is_cuma else (DPOConfig, DPOTrainer)
    args = config_class(
        **_arguments(settings, seed, output_dir),
        max_steps=settings.dpo_steps,
        per_device_train_batch_size=settings.dpo_batch_size,
        learning_rate=learning_rate,
        beta=settings.dpo_beta,
        **({"cuma_adapter_path": str(adapter_dir)} if arm.is_cuma else {}),
    )
    model = load_model(model_dir)
    trainer = trainer_class(
        model=model if arm.is_cuma else PeftModel.from_pretrained(model, adapter_dir, is_trainable=True),
        args=args,
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(model_dir),
    )
    return _train(trainer, "DPO", output_dir)


def load_trained(model_dir: Path, adapter_dir: Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """A base model with a trained adapter, and its tokenizer."""
    model = PeftModel.from_pretrained(load_model(model_dir), adapter_dir)
    return model.eval(), AutoTokenizer.from_pretrained(model_dir)


def profile_vectors(model: PeftModel, profiles: list[dict[str, str]]) -> torch.Tensor:
    """The vectors of profiles, `(profiles, dim)`, by the encoder that a trained CuMA adapter carries."""
    encoder = encoder_from_state(model.peft_config["default"].demographic_encoder)
    return encoder.encode(profiles, missing="zero")


class _Bar(ProgressCallback):
    """TRL's progress bar with a name, and without the metrics that would be printed after each run."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        pass


def _train(trainer: Any, name: str, output_dir: Path) -> Any:
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Bar(name))
    trainer.train()
    trainer.save_model(str(output_dir))
    return trainer


def rows_to_train_on(dataset: Dataset, steps: int, batch_size: int, seed: int) -> Dataset:
    """As many random rows as the steps will see: preparing the others would cost more than some of the trainings."""
    return dataset.shuffle(seed=seed).select(range(min(len(dataset), steps * batch_size)))


def _arguments(settings: Settings, seed: int, output_dir: Path) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": False,  # else a quiet transformers prints metrics in place of a bar
        "lr_scheduler_type": "cosine",
        "warmup_steps": settings.warmup_steps,
    }
