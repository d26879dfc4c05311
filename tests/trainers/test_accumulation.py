# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Two micro-batches of four rows are one batch of eight: exactly for the task, on average for the router losses."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

STRONG = {"init_weights": False, "lora_alpha": 16}
# The gradient of these is a mean over rows; `aot`, `aot_unpaired` and `sft` mix the rows of a batch.
PER_ROW = [
    "sigmoid",
    "hinge",
    "ipo",
    "nca_pair",
    "apo_zero",
    "apo_down",
    "sppo_hard",
    "discopop",
    "sigmoid_norm",
    "exo_pair",
    "robust",
    "bco_pair",
]
SMOOTHED = {name: {"label_smoothing": 0.1} for name in ("exo_pair", "robust")}
CASES = {
    "sft": ("make_sft", {}),
    "sft-dft": ("make_sft", {"loss_type": "dft"}),
    "sft-label-smoothing": ("make_sft", {"label_smoothing_factor": 0.1}),
    "kto-apo_zero_unpaired": (
        "make_kto",
        {"loss_type": "apo_zero_unpaired"},
    ),  # 'kto' has a batch's KL
    **{f"dpo-{name}": ("make_dpo", {"loss_type": [name]} | SMOOTHED.get(name, {})) for name in PER_ROW},
}
cases = pytest.mark.parametrize(("maker", "fields"), CASES.values(), ids=CASES.keys())


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.values = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def step(request):
    """The gradients of one optimiser step over eight rows, and what was logged."""

    def run(maker: str, batch: int, coefficient: float, **fields: Any) -> tuple[dict[str, torch.Tensor], dict]:
        recorder = Gradients()
        torch.manual_seed(0)  # `init_weights=False` draws the experts
        trainer = request.getfixturevalue(maker)(
            adapter=STRONG,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=8 // batch,
            train_sampling_strategy="sequential",
            cuma_aux_loss_coef=coefficient,
            callbacks=[recorder],
            **fields,
        )
        trainer.train()
        return recorder.values, trainer.state.log_history[0]

    return run


@cases
def test_the_task_gradient_does_not_depend_on_the_accumulation(step, maker, fields) -> None:
    (whole, first), (parts, again) = step(maker, 8, 0.0, **fields), step(maker, 4, 0.0, **fields)
    assert again["loss"] == pytest.approx(first["loss"], rel=1e-5, abs=1e-6)
    assert whole.keys() == parts.keys() and max(g.abs().max() for g in whole.values()) > 1e-4
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("maker", ["make_sft", "make_dpo", "make_kto"])
def test_the_router_loss_is_the_mean_over_micro_batches(request, step, maker) -> None:
    """Directly: the mean of the two micro-batches' own gradients, from the model without a trainer."""
    without, _ = step(maker, 4, 0.0)
    with_it, record = step(maker, 4, 0.7)
    torch.manual_seed(0)
    trainer = request.getfixturevalue(maker)(
        adapter=STRONG, per_device_train_batch_size=4, train_sampling_strategy="sequential"
    )
    model, values = trainer.model.train(), []
    for batch in list(trainer.get_train_dataloader()):
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "demographic_embeds")}
        outputs = model(**inputs, output_router_losses="local")
        (0.7 * outputs["aux_loss"] / 2 + 0.0 * outputs.logits.sum()).backward()  # it comes with a task's gradient
        values.append(outputs["aux_loss"].item())
    assert len(values) == 2 and record["aux_loss"] == pytest.approx(sum(values) / 2, rel=1e-5)
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and "cuma_router" in name:
            torch.testing.assert_close(with_it[name] - without[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
            compared += parameter.grad.abs().max() > 1e-5
    assert compared


def test_the_first_loss_is_the_lora_runs_and_the_router_term(make_sft, make_base, sft_data, quick, tokenizer) -> None:
    trainer = make_sft(
        cuma_aux_loss_coef=0.5, cuma_z_loss_coef=0.1, gradient_accumulation_steps=2, per_device_train_batch_size=4
    )
    trainer.train()
    plain = SFTTrainer(
        make_base(),
        args=SFTConfig(
            **{k: v for k, v in quick.items() if k not in ("demographic_cache_dir", "per_device_train_batch_size")},
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
        ),
        train_dataset=sft_data().remove_columns("demographic"),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    )
    plain.train()
    record, expected = trainer.state.log_history[0], plain.state.log_history[0]["loss"]
    term = 0.5 * record["aux_loss"] + 0.1 * record["z_loss"]
    assert term > 0.5
    assert record["loss"] == pytest.approx(expected + term, abs=1e-5)
