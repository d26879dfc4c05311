# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A loss or a gradient that is not finite stops the run before it reaches the weights, and is traced to its origin."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback


class FiniteGuard(TrainerCallback):
    """
    Watches a trainer's losses and gradients. They are read before each step of the optimizer, whichever engine calls
    it: one pass over the adapter's gradients, and one message to the host. A step that DeepSpeed has skipped for them
    stops the run, too; the gradients that fp16's scaling throws away don't.

    Args:
        trainer: a CuMA trainer; its batches are kept until the step that they are for is taken.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._micro_batches: deque[MicroBatch] = deque(maxlen=trainer.args.gradient_accumulation_steps)
        self._bad_loss: torch.Tensor | None = None
        self._watching = False

    def observe(self, inputs: dict[str, Any], rows: torch.Tensor | None, kwargs: dict[str, Any], loss: Any) -> None:
        """Take in a micro-batch, the rows of the data set that it is of, where known, and its loss."""
        if not self._watching:
            return
        bad = ~torch.isfinite(loss.detach()).all()
        self._bad_loss = bad if self._bad_loss is None else self._bad_loss | bad
        self._micro_batches.append(MicroBatch(inputs, rows, kwargs))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """
        Around the training loop.

        Raises:
            FloatingPointError: in all processes, if in one of them a loss or gradient is not finite. It names the
                step, the layer and the rows, by number.
        """
        hook = register_optimizer_step_pre_hook(self._before_step)
        self._watching = True
        try:
            yield
        except _NotFinite as found:
            self._watching = False
            hook.remove()
            raise FloatingPointError(self._explain(found.what)) from None
        finally:
            self._watching, self._bad_loss = False, None
            hook.remove()
            self._micro_batches.clear()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        ours = self._trainer.optimizer
        while hasattr(ours, "optimizer"):  # accelerate's and DeepSpeed's are around torch's
            ours = ours.optimizer
        if optimizer is not ours:
            return
        if self._trainer.accelerator.scaler is not None:  # fused optimizers are called for what it throws away, too
            self._check(False)
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        local = [g for g in local if g.numel()]  # of a small tensor a process may hold nothing
        self._check(bool(local) and ~torch.isfinite(get_total_norm(local, norm_type=math.inf)))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bad_loss is None:
            return
        # Nothing was looked at: DeepSpeed or a scaler skipped the step, for which only fp16 has a good reason.
        accelerator = self._trainer.accelerator
        self._check(accelerator.optimizer_step_was_skipped and accelerator.mixed_precision != "fp16")

    def _check(self, bad_gradient: torch.Tensor | bool) -> None:
        """Raise if a loss since the last check or the gradient is not finite, in any process. All must call it."""
        accelerator = self._trainer.accelerator
        bad = torch.zeros(2, device=accelerator.device)
        bad[0] = False if self._bad_loss is None else self._bad_loss
        bad[1] = bad_gradient
        self._bad_loss = None
        if accelerator.num_processes > 1:
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        bad_loss, bad_gradient = bad.tolist()
        if bad_loss or bad_gradient:
            raise _NotFinite("loss" if bad_loss else "gradient")
        self._micro_batches.clear()

    # ------------------------------------------------------------------ where it came from
    def _explain(self, what: str) -> str:
        trainer = self._trainer
        try:
            findings = [
                f"process {trainer.args.process_index}, {finding}"
                for number, batch in enumerate(self._micro_batches)
                if (finding := self._trace(batch, number, what)) is not None
            ]
        except Exception as error:  # must not hide the first one; its text is not ours, and may quote the batch
            failure = f"a second pass to find the layer failed with {type(error).__name__}"
            findings = [f"process {trainer.args.process_index}: {failure}"]
        findings = gather_object(findings)
        where = "; ".join(findings) if findings else "not found again in a second pass, so chance is in it, as dropout"
        return (
            f"Step {trainer.state.global_step + 1}: the {what} is not finite: {where}. The step was not taken; "
            "checkpoints hold earlier weights. Look at these rows, or lower `learning_rate`, then go on with "
            "`resume_from_checkpoint`."
        )

    def _trace(self, batch: MicroBatch, number: int, what: str) -> str | None:
        """Run a micro-batch again, and tell where its first value that is not finite appears."""
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        trace = _Trace(gradients=what == "gradient")
        hooks = [
            module.register_forward_hook(partial(trace.output, name.removeprefix("base_model.model.") or "the model"))
            for name, module in model.named_modules()
        ]
        try:
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model_wrapped, dict(batch.inputs), **batch.kwargs)
            if what == "gradient":
                trainer.accelerator.gradient_state._set_sync_gradients(False)  # else DeepSpeed would take the step
                trainer.accelerator.backward(loss)
        finally:
            for hook in hooks:
                hook.remove()
        if trace.found is None and torch.isfinite(loss.detach()).all():
            return None
        place, tensor = trace.found or ("the loss itself, of finite outputs", None)
        return f"{self._rows(batch, tensor)} of micro-batch {number}, first in {place}"

    def _rows(self, batch: MicroBatch, tensor: torch.Tensor | None) -> str:
        ids = next((batch.inputs[key] for key in ("input_ids", "prompt_ids") if key in batch.inputs), None)
        rows = 0 if ids is None else ids.shape[0]
        examples = rows // self._trainer.rows_per_example
        if tensor is None or not tensor.dim() or not rows or tensor.shape[0] % rows:
            numbers = list(range(examples))  # any of them
        else:
            bad = (~torch.isfinite(tensor)).reshape(rows, -1).any(1).nonzero().flatten().tolist()
            numbers = sorted({row % examples for row in bad})
        text = f"rows {numbers}"
        if batch.rows is not None:
            known = batch.rows[numbers] if len(batch.rows) == examples else batch.rows  # documents joined to a row
            text += f" (rows {known.tolist()} of `train_dataset` as the trainer has it)"
        return text


class MicroBatch(NamedTuple):
    inputs: dict[str, Any]
    rows: torch.Tensor | None  # of the data set
    kwargs: dict[str, Any]  # of `compute_loss`


class _NotFinite(ArithmeticError):
    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class _Trace:
    """The first output of a module, or, where all are finite, the first gradient of one, that is not finite."""

    def __init__(self, gradients: bool) -> None:
        self.found: tuple[str, torch.Tensor] | None = None
        self._gradients = gradients

    def output(self, name: str, module: torch.nn.Module, args: tuple, output: Any) -> None:
        for tensor in tree_leaves(output):
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                continue
            self._look(f"the output of {name}", tensor)
            if self._gradients and tensor.requires_grad:
                tensor.register_hook(partial(self._look, f"the gradient that reaches the output of {name}"))

    def _look(self, place: str, tensor: torch.Tensor | None) -> None:
        if tensor is None:  # the gradient of an output that has no weight in the loss
            return
        tensor = tensor.detach()  # else a checkpointed layer would count what is saved here, too
        if self.found is None and tensor.numel() and not torch.isfinite(tensor).all():
            self.found = place, tensor
