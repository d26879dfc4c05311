# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""One run of a benchmark: an arm, its settings and a world, trained by TRL's trainers and ours, and measured."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from .. import CuMADPOConfig, CuMADPOTrainer, CuMASFTConfig, CuMASFTTrainer
from ..demographics import encoder_from_state
from ..evaluation.metrics.cells import expected_accuracy
from ..evaluation.options import split_options, survey_log_probs
from ..evaluation.preferences import implicit_margin, pair_metrics, pair_weights
from .arms import Arm
from .world import World


def run_sft(
    world: World, arm: Arm, learning_rate: float, alpha_ratio: float, steps: int, folder: Path
) -> dict[str, Any]:
    """
    Train an arm by SFT and measure it at the steps that the validation answers choose.

    Args:
        world (`World`): Prepared.
        arm (`Arm`): What to train.
        learning_rate (`float`), alpha_ratio (`float`): Its settings.
        steps (`int`): How long; every budget of the suite up to this is reported.
        folder (`Path`): Written whole: `result.json`, `predictions.npz`, and the first budget's `adapter`.

    Returns:
        `dict`: What `result.json` holds.
    """
    suite = world.suite
    base = world.base_model()
    encoders = {kind: world.encoder(kind) for kind in {"field", arm.encoder}}
    encoder = encoders[arm.encoder] if arm.of.reads_profiles else None
    dims = {kind: one.dim for kind, one in encoders.items()}
    config, parameters = suite.reference.adapter(arm, base, dims, alpha_ratio)
    with tempfile.TemporaryDirectory() as scratch:
        is_cuma = arm.of.peft == "cuma"
        fields = {**arm.of.training, **arm.training} if is_cuma else {}
        args = (CuMASFTConfig if is_cuma else SFTConfig)(
            **_arguments(world, scratch),
            max_steps=steps,
            per_device_train_batch_size=suite.training.batch_size,
            learning_rate=learning_rate,
            dataset_kwargs={"skip_prepare_dataset": True},
            **fields,
        )
        trainer = (CuMASFTTrainer if is_cuma else SFTTrainer)(
            model=base,
            args=args,
            train_dataset=world.sft_rows(arm.prompt_profile, arm.of.shuffled, steps),
            processing_class=world.tokenizer,
            peft_config=config,
            **({"demographic_encoder": encoder} if encoder else {}),
        )
        trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        budgets = [factor * suite.training.steps for factor in suite.training.factors]
        choice = _ChooseSteps(world, arm, [budget for budget in budgets if budget <= steps])
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(choice)
        trainer.train()
    result: dict[str, Any] = {"parameters": trained, "validation": choice.looks, "budgets": {}}
    predictions: dict[str, np.ndarray] = {}
    with _written_whole(folder) as temporary:
        for budget, (_, best, state) in choice.best.items():
            load_state(trainer.model, state)
            scores = {}
            for split, cells in world.cells.items():
                log_probs = predict(world, arm, trainer.model, cells.question, cells.profile)
                predictions[f"{budget}/{split}"] = log_probs.astype(np.float32)
                scores[split] = world.score(split, *split_options(log_probs))
            result["budgets"][str(budget)] = {"steps": best, "nll": choice.best[budget][0], "splits": scores}
            if budget == budgets[0] and suite.dpo is not None and arm.key in suite.dpo.arms:
                trainer.model.save_pretrained(temporary / "adapter")
        assert trained == parameters or arm.of.peft == "full", (trained, parameters)
        np.savez_compressed(temporary / "predictions.npz", **predictions)
        (temporary / "result.json").write_text(json.dumps(result))
    return result


def run_dpo(world: World, arm: Arm, learning_rate: float, sft_folder: Path, folder: Path) -> dict[str, Any]:
    """
    Go on from an arm's SFT checkpoint by DPO, and measure preferences on held-out cells, exactly.

    Args:
        world (`World`), arm (`Arm`), learning_rate (`float`): As for SFT.
        sft_folder (`Path`): The arm's SFT run, with its adapter.
        folder (`Path`): Gets `result.json`.

    Returns:
        `dict`: `validation`, the pair log-loss of the validation answers, and `splits`: `pair_log_loss`,
        `pair_accuracy` and the choice accuracy, `accuracy`.
    """
    dpo = world.suite.dpo
    is_cuma = arm.of.peft == "cuma"
    model = world.base_model()
    if not is_cuma:
        model = PeftModel.from_pretrained(model, sft_folder / "adapter", is_trainable=True)
    with tempfile.TemporaryDirectory() as scratch:
        fields = {**arm.of.training, **arm.training} if is_cuma else {}
        args = (CuMADPOConfig if is_cuma else DPOConfig)(
            **_arguments(world, scratch),
            max_steps=dpo.steps,
            per_device_train_batch_size=dpo.batch_size,
            learning_rate=learning_rate,
            beta=dpo.beta,
            **({"cuma_adapter_path": str(sft_folder / "adapter"), **fields} if is_cuma else {}),
        )
        trainer = (CuMADPOTrainer if is_cuma else DPOTrainer)(
            model=model,
            args=args,
            train_dataset=world.dpo_rows(arm.prompt_profile, arm.of.shuffled),
            processing_class=world.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        cells_and_validation = {**world.cells, "validation": world.validation_cells}
        reference = {
            split: predict(world, arm, trainer.model, cells.question, cells.profile)
            for split, cells in cells_and_validation.items()
        }
        trainer.train()
    scores = {}
    for split, cells in cells_and_validation.items():
        policy = predict(world, arm, trainer.model, cells.question, cells.profile)
        weights = pair_weights(cells.truth, world.survey.option_mask[cells.question])
        scores[split] = {
            **pair_metrics(implicit_margin(policy, reference[split], dpo.beta), weights),
            "accuracy": float(expected_accuracy(cells.truth, split_options(policy)[0]).mean()),
        }
    validation = scores.pop("validation")
    result = {"validation": validation["pair_log_loss"], "splits": scores}
    with _written_whole(folder) as temporary:
        (temporary / "result.json").write_text(json.dumps(result))
    return result


def predict(
    world: World, arm: Arm, model: PeftModel | PreTrainedModel, question: np.ndarray, profile: np.ndarray
) -> np.ndarray:
    """Log-probability of each option in cells, `(cells, max_options)`."""
    vectors = None
    if arm.of.reads_profiles:
        encoder = encoder_from_state(model.peft_config["default"].demographic_encoder)
        vectors = encoder.encode(world.survey.profiles, missing="zero")
        if arm.of.shuffled:
            vectors = vectors[torch.from_numpy(world.other_profile)]
    return survey_log_probs(
        model,
        world.tokenizer,
        world.survey,
        question,
        profile,
        prompt_profile=arm.prompt_profile,
        demographic_embeds=vectors,
    )


class _ChooseSteps(TrainerCallback):
    """Looks at the validation answers' log-loss now and then, and keeps the weights of the best look per budget."""

    def __init__(self, world: World, arm: Arm, budgets: list[int]) -> None:
        self.world, self.arm, self.budgets = world, arm, budgets
        self.looks: list[list[float]] = []
        self.best: dict[int, tuple[float, int, dict[str, torch.Tensor]]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.world.suite.training.select_every:
            return
        answers = self.world.validation
        log_probs = predict(self.world, self.arm, model, answers.question, answers.profile)
        probs = split_options(log_probs)[0]
        chosen = probs[np.arange(len(answers)), answers.choice]
        nll = float(-np.log(np.maximum(chosen, 1e-8)).mean())
        self.looks.append([state.global_step, nll])
        kept = None
        for budget in self.budgets:
            if state.global_step <= budget and (budget not in self.best or nll < self.best[budget][0]):
                kept = kept or copy_state(model)
                self.best[budget] = (nll, state.global_step, kept)


def copy_state(model: Any) -> dict[str, torch.Tensor]:
    """A copy of what is trained: the adapter's tensors, or all of a model without one."""
    state = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def load_state(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Bring a copy back."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, state)
    else:
        model.load_state_dict(state)


def _arguments(world: World, output_dir: str) -> dict[str, Any]:
    return {
        "output_dir": output_dir,
        "seed": world.seed,
        "data_seed": world.seed,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": world.suite.training.warmup_steps,
    }


class _written_whole:
    """A folder that is there when the block has ended well, and not before."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.temporary = folder, folder.with_name(f".{folder.name}-{os.getpid()}")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.temporary.rename(self.folder)
        else:
            shutil.rmtree(self.temporary, ignore_errors=True)
