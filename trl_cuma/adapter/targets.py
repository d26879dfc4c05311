# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Which layers of a base model can carry an adapter, and which do by default."""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import CuMAConfig

# Base model type → default `target_modules`: the published choice, the attention's query and value projections (one
# fused layer where the architecture has one). PEFT's table for LoRA is that, but for Phi, and lacks some; entries that
# are added to it hold here, too.
DEFAULT_TARGET_MODULES: Mapping[str, list[str] | str] = ChainMap(
    {
        "phi": ["q_proj", "v_proj"],
        "phi3": ["qkv_proj"],
        "qwen2_moe": ["q_proj", "v_proj"],
        "qwen3_moe": ["q_proj", "v_proj"],
    },
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)


def is_linear(module: nn.Module, quantization_kwargs: dict[str, Any]) -> bool:
    """Whether `module` (or what another adapter wrapped) is a linear layer, quantized or not."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if isinstance(base, nn.Linear | Conv1D):
        return True
    return getattr(resolve_quantization_backend(base, **quantization_kwargs), "layer_type", None) == "linear"


def check_target_modules(model: nn.Module, config: CuMAConfig) -> None:
    """
    Refuse a name in `target_modules` that finds no module, where PEFT is content if any other name does.

    Raises:
        ValueError: if a name (or the regular expression) finds only a bare tensor, such as the fused experts of a
            mixture-of-experts base, or, beside names that are found, nothing.
    """
    targets = config.target_modules
    if targets is None or targets == "all-linear":
        return
    names = [targets] if isinstance(targets, str) else sorted(targets)
    patterns = names if isinstance(targets, str) else [rf"(.*\.)?{re.escape(name)}" for name in names]
    modules = [key for key, _ in model.named_modules()]
    found = [any(re.fullmatch(pattern, key) for key in modules) for pattern in patterns]
    for name, pattern in ((n, p) for n, p, hit in zip(names, patterns, found, strict=True) if not hit):
        tensor = next((key for key, _ in model.named_parameters() if re.fullmatch(pattern, key)), None)
        if tensor is not None:
            owner = model.get_submodule(tensor.rpartition(".")[0])
            raise ValueError(
                f"CuMA cannot target `{tensor}`: it is a bare tensor of {type(owner).__name__} (the experts of a "
                f"mixture of experts are fused so), not a linear layer. {instead(model)}"
            )
        if any(found):  # else PEFT says that none was found
            raise ValueError(f"`target_modules` names {name!r}, which no module of the base has. {instead(model)}")


def instead(model: nn.Module) -> str:
    """What to name in `target_modules`, for an error message."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    adapted = tuple(f"{key}." for key, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    names = {
        key.rpartition(".")[2]
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | BaseTunerLayer) and module is not head
        if not key.startswith(adapted)
    }
    named = f"its linear layers ({', '.join(sorted(names)[:20])})" if names else "linear layers"
    return f"Target {named}, or use `target_modules='all-linear'`."
