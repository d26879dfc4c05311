# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What PEFT's tests are run on: every routing, small adapters, inputs that carry a profile."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from trl_cuma import CuMAConfig

ROUTINGS = ("joint", "demographic", "semantic")
DIM = 6

# Some upstream tests make their own inputs, without a profile: that must be defined.
SMALL: dict[str, Any] = {
    "demographic_dim": DIM,
    "num_experts": 4,
    "r": 4,
    "router_hidden": 8,
    "missing_demographics": "zero",
}

MERGING = "merging: the gates depend on the input and on the person"
HUB = "Hub: the test downloads an adapter"


# For upstream's tests that take nothing but a class, and make configs from it with targets alone.
@dataclass
class JointConfig(CuMAConfig):
    demographic_dim: int | None = DIM
    router_hidden: int = 8
    missing_demographics: str = "zero"


@dataclass
class DemographicConfig(JointConfig):
    routing: str = "demographic"


@dataclass
class SemanticConfig(JointConfig):
    routing: str = "semantic"


CONFIG_CLASSES = [
    pytest.param(config_cls, id=routing)
    for routing, config_cls in zip(ROUTINGS, (JointConfig, DemographicConfig, SemanticConfig), strict=True)
]


def options(routing: str) -> dict[str, Any]:
    """Everything that a config can turn on, for one routing; with upstream's `MLP` and decoders alike."""
    chosen = {"share_a": True, "gate": "soft", "router_layers": 3, "use_rslora": True, "lora_dropout": 0.1}
    if routing != "semantic":  # whose router reads no profile
        chosen["demographic_projection"] = 3
    return chosen


def accept_profile(model: nn.Module) -> nn.Module:
    """
    Let a model without an adapter ignore `demographic_embeds` in `forward` and `generate`: upstream calls it with the
    same inputs before an adapter is put in, and after it is taken out.
    """
    base = type(model)
    namespace = {
        name: _ignoring_profile(getattr(base, name)) for name in ("forward", "generate") if hasattr(base, name)
    }
    model.__class__ = type(base.__name__, (base,), {"__module__": base.__module__, **namespace})
    return model


def _ignoring_profile(method: Any) -> Any:
    @functools.wraps(method)  # transformers reads the signature
    def call(self: nn.Module, *args: Any, demographic_embeds: torch.Tensor | None = None, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    return call
