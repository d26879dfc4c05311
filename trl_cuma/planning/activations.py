# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
The memory that a training step needs beside parameters, gradients and optimizer: the real forward and backward of
model, adapter and TRL's loss, on fake tensors (shapes without values) of the real batch, while every storage is
watched from its making to its end.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import masking_utils
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import add_fused_lm_head, use_adapter

from .kernels import kernels_of_a_gpu

# What TRL's trainers ask of their head beside log-probabilities, for their metrics.
OUTPUTS = {"sft": ("log_probs", "entropy", "is_top1"), "dpo": ("log_probs", "entropy", "mean_logits", "is_top1")}


@dataclass(frozen=True)
class Step:
    """
    What a GPU computes at once.

    Args:
        method (`str`): `"sft"`, or `"dpo"`, whose rows are the chosen and the rejected answers.
        rows (`int`): rows of the forward, for DPO twice the batch.
        length (`int`): tokens of the longest row. Of several rows some are shorter: there is a mask.
        demographic_dim (`int`): length of a profile's vector.
        autocast (`bool`): whether the forward runs under autocast to bfloat16.
        checkpointing (`str`, *optional*): `"non-reentrant"` or `"reentrant"`.
        has_reference (`bool`): DPO without precomputed reference log-probabilities.
    """

    method: str
    rows: int
    length: int
    demographic_dim: int
    autocast: bool
    checkpointing: str | None = None
    has_reference: bool = True


class LiveStorages(TorchDispatchMode):
    """
    Watches the storages that operations make: `peak`, the most bytes of them that were alive at once. It counts the
    operations' `flops` too; torch's own counter can't be on, since its hooks keep checkpointed layers alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.flops = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        elif func._opname in ("gemm_4bit", "int8_scaled_mm"):  # bitsandbytes: of an input with all rows
            self.flops += 2 * args[0].numel() * result.shape[-1]
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = False
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in inputs:  # else a view, or written in place
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    made = True
        if made:
            self._alive = {key: each for key, each in self._alive.items() if not each[0].expired()}
            self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        return result


def measure(model: PeftModel, step: Step, *, on_gpu: bool = True) -> tuple[int, int]:
    """
    One training step of a model on the meta device, which this turns into one of fake tensors. The gradients are there
    before the step, as in all micro-batches but the first of an accumulation: what comes out is beside them.

    Args:
        model (`PeftModel`): of [`build_model`]; for DPO with a frozen adapter `ref` where the reference is one.
        step (`Step`): what is computed.
        on_gpu (`bool`): allocate as a GPU's kernels do; `False` for the CPU's own, to compare with measurements.

    Returns:
        the peak in bytes, and the floating-point operations.
    """
    mode = FakeTensorMode()
    add_fused_lm_head(model.get_base_model(), outputs=OUTPUTS[step.method])
    _make_fake(model, mode)
    # Rows are not packed, which transformers can't see of positions without values.
    unpacked = patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with _quietly(), unpacked, mode, kernels_of_a_gpu() if on_gpu else nullcontext() as operations:
        model.train()
        if step.checkpointing is not None:  # as TRL: the inputs need a gradient for what is recomputed
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": step.checkpointing == "reentrant"})
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        with LiveStorages() as storages:
            training_step(model, step)
    return storages.peak, storages.flops + (operations.count if on_gpu else 0)


def training_step(model: PeftModel, step: Step) -> None:
    """Forward and backward as in `SFTTrainer.compute_loss` or `DPOTrainer._compute_loss`, and CuMA's router losses."""
    ids = torch.zeros(step.rows, step.length, dtype=torch.long)
    inputs = {
        "input_ids": ids,
        # A single row isn't padded: the model looks at the mask and drops it.
        "attention_mask": torch.ones_like(ids) if step.rows > 1 else None,
        "demographic_embeds": torch.zeros(step.rows, step.demographic_dim),
        "labels": ids.clone(),
        "use_cache": False,
        "fused_lm_head": True,
    }
    if model.active_peft_config.routing == "semantic":
        del inputs["demographic_embeds"]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=step.autocast)
    with autocast:
        outputs = model(**inputs, output_router_losses="local")
    if step.method == "sft":
        loss = -outputs.log_probs.sum() / outputs.label_mask.sum()
    else:
        logps = outputs.log_probs.sum(1)
        if step.has_reference:
            name = "ref" if "ref" in model.peft_config else None
            with torch.no_grad(), disable_gradient_checkpointing(model, None), use_adapter(model, name), autocast:
                reference_logps = model(**inputs).log_probs.sum(1)
            logps = logps - reference_logps
        chosen, rejected = logps.chunk(2)
        loss = -F.logsigmoid(chosen - rejected).mean()
    (loss + outputs["aux_loss"]).backward()


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Turn a model's meta tensors into fake ones on the CPU: like meta, but autocast and attention know the device."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return mode.fake_tensor_converter.from_meta_and_device(mode, tensor.detach(), torch.device("cpu"))

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                new = made[id(parameter)] = nn.Parameter(fake(parameter.data), requires_grad=parameter.requires_grad)
                if hasattr(parameter, "quant_state"):
                    new.quant_state = _fake_state(parameter.quant_state, fake)
                if hasattr(parameter, "SCB"):  # of int8: the layer takes these over at its first call
                    new.CB, new.SCB = new.data, fake(parameter.SCB)
            if parameter is not None:
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def _fake_state(state: Any, fake: Any) -> Any:
    for name in ("absmax", "code", "offset"):
        if getattr(state, name) is not None:
            setattr(state, name, fake(getattr(state, name)))
    if state.nested:
        _fake_state(state.state2, fake)
    return state


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames checkpointing's switch
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # whose 0 is what is asked for
        yield
