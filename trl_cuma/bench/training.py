# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""One run of a benchmark: an arm, its settings and a world, trained by TRL's trainers and ours, and measured."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from .. import CuMADPOConfig, CuMADPOTrainer, CuMASFTConfig, CuMASFTTrainer
from ..evaluation.metrics.cells import expected_accuracy
from ..evaluation.options import split_options
from ..evaluation.preferences import implicit_margin, pair_metrics, pair_weights
from .arms import Arm
from .survey_world import SurveyWorld
from .world import World, written_whole


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
    if arm.of.peft == "full":
        base = base.float()  # most updates are smaller than what bfloat16 can tell apart
    encoders = {kind: world.encoder(kind) for kind in {"field", arm.encoder}}
    encoder = encoders[arm.encoder] if arm.of.reads_profiles else None
    dims = {kind: one.dim for kind, one in encoders.items()}
    config, parameters = suite.reference.adapter(arm, base, dims, alpha_ratio)
    rows = world.sft_rows(arm.prompt_profile, arm.of.shuffled, steps)
    with tempfile.TemporaryDirectory() as scratch:
        is_cuma = arm.of.peft == "cuma"
        fields = {**arm.of.training, **arm.training} if is_cuma else {}
        args = (CuMASFTConfig if is_cuma else SFTConfig)(
            **_arguments(world, scratch),
            max_steps=steps,
            per_device_train_batch_size=world.rows_per_forward,
            gradient_accumulation_steps=suite.training.batch_size // world.rows_per_forward,
            learning_rate=learning_rate,
            dataset_kwargs={"skip_prepare_dataset": "input_ids" in rows.column_names},
            **fields,
        )
        trainer = (CuMASFTTrainer if is_cuma else SFTTrainer)(
            model=base,
            args=args,
            train_dataset=rows,
            processing_class=world.tokenizer,
            peft_config=config,
            **({"demographic_encoder": encoder} if encoder else {}),
        )
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:  # of every arm alike: TRL makes an adapter on a quantized base bfloat16
                parameter.data = parameter.data.float()
        trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        budgets = [factor * suite.training.steps for factor in suite.training.factors]
        choice = _ChooseSteps(world, arm, [budget for budget in budgets if budget <= steps])
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(choice)
        trainer.train()
    result: dict[str, Any] = {"parameters": trained, "validation": choice.looks, "budgets": {}}
    predictions: dict[str, np.ndarray] = {}
    with written_whole(folder) as temporary:
        for budget, (_, best, state) in choice.best.items():
            load_state(trainer.model, state)
            scores, arrays = world.measure(arm, trainer.model)
            predictions |= {f"{budget}/{name}": array for name, array in arrays.items()}
            result["budgets"][str(budget)] = {"steps": best, "nll": choice.best[budget][0], "splits": scores}
            if budget == budgets[0] and suite.dpo is not None and arm.key in suite.dpo.arms:
                trainer.model.save_pretrained(temporary / "adapter")
        assert trained == parameters or arm.of.peft == "full", (trained, parameters)
        np.savez_compressed(temporary / "predictions.npz", **predictions)
        (temporary / "result.json").write_text(json.dumps(result))
    return result


def run_dpo(world: SurveyWorld, arm: Arm, learning_rate: float, sft_folder: Path, folder: Path) -> dict[str, Any]:
    """
    Go on from an arm's SFT checkpoint by DPO, and measure preferences on held-out cells, exactly.

    Args:
        world (`SurveyWorld`), arm (`Arm`), learning_rate (`float`): As for SFT.
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
        cells_and_validation = {**world.cells, "validation": world.survey.observed_cells(world.validation)}
        reference = {
            split: world.predict(arm, trainer.model, cells.question, cells.profile)
            for split, cells in cells_and_validation.items()
        }
        trainer.train()
    scores = {}
    for split, cells in cells_and_validation.items():
        policy = world.predict(arm, trainer.model, cells.question, cells.profile)
        weights = pair_weights(cells.truth, world.survey.option_mask[cells.question])
        scores[split] = {
            **pair_metrics(implicit_margin(policy, reference[split], dpo.beta), weights),
            "accuracy": float(expected_accuracy(cells.truth, split_options(policy)[0]).mean()),
        }
    validation = scores.pop("validation")
    result = {"validation": validation["pair_log_loss"], "splits": scores}
    with written_whole(folder) as temporary:
        (temporary / "result.json").write_text(json.dumps(result))
    return result


class _ChooseSteps(TrainerCallback):
    """Looks at the validation answers' log-loss now and then, and keeps the weights of the best look per budget."""

    def __init__(self, world: World, arm: Arm, budgets: list[int]) -> None:
        self.world, self.arm, self.budgets = world, arm, budgets
        self.looks: list[list[float]] = []
        self.best: dict[int, tuple[float, int, dict[str, torch.Tensor]]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.world.suite.training.select_every:
            return
        nll = self.world.validation_loss(self.arm, model)
        self.looks.append([state.global_step, nll])
        kept = None
        for budget in self.budgets:
            if state.global_step <= budget and (budget not in self.best or nll < self.best[budget][0]):
                kept = kept or copy_state(model)
                self.best[budget] = (nll, state.global_step, kept)


def copy_state(model: Any) -> dict[str, torch.Tensor]:
    """A copy, on the CPU, of what is trained: the adapter's tensors, or all of a model without one."""
    state = get_peft_model_state_dict(model) if isinstance(model, PeftModel) else model.state_dict()
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


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
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": world.suite.training.warmup_steps,
        **world.training_arguments,
    }
