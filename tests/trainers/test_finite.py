# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A loss or gradient that is not finite: the run stops, the weights stay, and the error says where it came from."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

FIELDS = {
    "bf16": False,
    "per_device_train_batch_size": 4,
    "train_sampling_strategy": "sequential",
    "max_steps": 4,
    "max_grad_norm": 1.0,
}


def spoil(trainer: Any, layer: str, question: str, gradient: bool = False) -> nn.Module:
    """From now on, `layer`'s output (or its gradient) is NaN in the rows that ask `question`."""
    model = trainer.model.get_base_model()
    marked: list[torch.Tensor] = []

    def read(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        texts = trainer.processing_class.batch_decode(kwargs["input_ids"])
        marked[:] = [torch.tensor([question in text for text in texts])[:, None, None]]

    def write(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        mask = marked[0]
        if not gradient:
            return output.masked_fill(mask, torch.nan)
        if output.requires_grad:
            output.register_hook(lambda grad: grad.masked_fill(mask, torch.nan))
        return None

    model.register_forward_pre_hook(read, with_kwargs=True)
    module = model.get_submodule(layer)
    module.register_forward_hook(write)
    return module


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize("gradient", [False, True], ids=["output", "gradient"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_step_layer_and_rows_are_named(method, gradient, checkpointing, request, trainable):
    make: Callable = request.getfixturevalue(f"make_{method}")
    trainer = make(**FIELDS, gradient_checkpointing=checkpointing, gradient_accumulation_steps=1)
    spoil(trainer, "model.layers.1.mlp.down_proj", "Question 6?", gradient)
    before = trainable(trainer)
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    text = str(error.value)
    what = "gradient" if gradient else "loss"
    # Batches of four in order: row 6 is row 2 of the second.
    assert text.startswith(f"Step 2: the {what} is not finite: process 0, rows [2] (rows [6] of `train_dataset`")
    assert "micro-batch 0, first in the" in text and "output of model.layers.1.mlp.down_proj. The step was not" in text
    assert not re.search(r"\b(FR|JP|old|young)\b", text)  # nobody's profile
    assert trainer.state.global_step == 1
    after = trainable(trainer)
    assert all(torch.isfinite(weight).all() for weight in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in after)  # step 1 was taken


def test_the_micro_batch_of_an_accumulated_step_is_named(make_sft):
    trainer = make_sft(**{**FIELDS, "per_device_train_batch_size": 2}, gradient_accumulation_steps=2)
    spoil(trainer, "model.layers.0.self_attn.o_proj", "Question 3?")
    with pytest.raises(FloatingPointError, match=r"Step 1: .*rows \[1\] \(rows \[3\] .* of micro-batch 1, first in"):
        trainer.train()


def test_a_gradient_without_clipping_is_caught(make_sft):
    trainer = make_sft(**{**FIELDS, "max_grad_norm": 0.0})
    spoil(trainer, "model.layers.0.self_attn.o_proj", "Question 1?", gradient=True)
    with pytest.raises(FloatingPointError, match="Step 1: the gradient is not finite"):
        trainer.train()


def test_a_loss_that_no_layer_spoils_is_named_as_such(make_sft):
    trainer = make_sft(**FIELDS)
    trainer.args.cuma_aux_loss_coef = float("inf")
    with pytest.raises(FloatingPointError, match=r"rows \[0, 1, 2, 3\].* first in the loss itself"):
        trainer.train()


def test_a_finite_run_is_left_alone(make_sft, trainable):
    trainer = make_sft(**FIELDS)
    trainer.train()
    assert trainer.state.global_step == 4 and not trainer._finite._micro_batches
    # Another optimizer in the process is none of the guard's business.
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.full((1,), torch.nan)
    with trainer._finite.watching():
        torch.optim.SGD([weight], lr=1.0).step()
    assert weight.isnan().all()


def test_what_a_scaler_throws_away_is_no_error(make_sft):
    """fp16's way: too large a scale overflows, no step is taken, the scale is halved. Fused optimizers are called."""
    trainer = make_sft(**FIELDS, optim="adamw_torch_fused")
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    trainer.train()
    assert trainer.state.global_step == 4
    assert scaler.get_scale() < 2.0**127  # it did overflow


def test_a_wrapper_that_hides_the_optimizer_is_no_error(make_sft, trainable):
    class Wrapper(torch.optim.Optimizer):
        """As schedule-free's: it has no hooks of its own, and steps the optimizer within."""

        def __init__(self, base: torch.optim.Optimizer) -> None:
            self.base = base

        param_groups = property(lambda self: self.base.param_groups)
        state = property(lambda self: self.base.state)
        defaults = property(lambda self: self.base.defaults)

        def step(self, closure: Any = None) -> None:
            self.base.step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.base.zero_grad(set_to_none)

        def state_dict(self) -> dict[str, Any]:
            return self.base.state_dict()

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.base.load_state_dict(state)

    trainer = make_sft(**FIELDS)
    trainer.create_optimizer()
    trainer.optimizer = Wrapper(trainer.optimizer)
    before = trainable(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    assert any(not torch.equal(weight, before[name]) for name, weight in trainable(trainer).items())
