# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""PEFT's tests on small MLPs: the adapter's life cycle, dtypes, requires_grad, FSDP's state dict, several adapters."""

from typing import Any

import pytest
import torch
from torch import nn

from trl_cuma import CuMAConfig

from .cases import CONFIG_CLASSES, DIM, MERGING, ROUTINGS, SMALL, accept_profile, options
from .upstream import reparametrize, upstream_module

custom = upstream_module("test_custom_models")
low_level = upstream_module("test_low_level_api")
other = upstream_module("test_other")

NO_BIAS = "CuMA trains no biases"
# Two adapted layers in each: some of the tests end early with one.
BOTH = {"target_modules": ["lin0", "lin1"]}
# Upstream trains MLPs on inputs up to 89 with a learning rate of 0.5: with the default scale their weights overflow.
MLP = BOTH | {"lora_alpha": 0.4}
EMBEDDING = {"target_modules": ["conv1d", "lin0"]}


def cases() -> list[Any]:
    """Test name, upstream's model, config class, fields; for every routing."""
    rows = []
    for routing in ROUTINGS:
        variants: dict[str, tuple[str, dict[str, Any]]] = {
            "linear": ("MLP", MLP),
            "options": ("MLP", MLP | options(routing)),
            "pattern": (
                "MLP2",
                MLP | {"target_modules": r"lin\d", "rank_pattern": {"lin0": 2}, "alpha_pattern": {"lin1": 0.2}},
            ),
            "modules_to_save": ("MLP_LayerNorm", BOTH | {"modules_to_save": ["layernorm1"]}),
            "conv1d": ("EmbConv1D", EMBEDDING),
            "tokens": ("EmbConv1D", EMBEDDING | {"trainable_token_indices": {"emb": [0, 10]}}),
        }
        for name, (model, fields) in variants.items():
            fields = SMALL | {"routing": routing} | fields
            rows.append(pytest.param(name, model, CuMAConfig, fields, id=f"{routing}-{name}"))
    return rows


def pairs() -> list[Any]:
    """Two adapters on one MLP: test name, method, config class, fields of either."""
    rows = []
    for routing in ROUTINGS:
        first = SMALL | {"routing": routing, "init_weights": False, "target_modules": ["lin0"]}
        for name, second in {"same": first, "different": first | {"target_modules": ["lin1"]}}.items():
            rows.append(pytest.param(name, "cuma", CuMAConfig, first, second, id=f"{routing}-{name}"))
    return rows


def with_options(**fields: Any) -> list[Any]:
    return [
        pytest.param(CuMAConfig, SMALL | {"routing": routing} | options(routing) | fields, id=routing)
        for routing in ROUTINGS
    ]


class ProfiledModels(custom.MockTransformerWrapper):
    @classmethod
    def from_pretrained(cls, model_id: str, dtype: torch.dtype | None = None) -> nn.Module:
        return accept_profile(super().from_pretrained(model_id, dtype))


def inputs_with_profile(self: Any) -> dict[str, torch.Tensor]:
    profiles = torch.randn(9, DIM, generator=torch.Generator().manual_seed(0))
    return {"X": torch.arange(90).view(9, 10), "demographic_embeds": profiles}


PROFILED = {"transformers_class": ProfiledModels, "prepare_inputs_for_testing": inputs_with_profile}
CASES = {"test_name, model_id, config_cls, config_kwargs": cases()}

TestPeftCustomModel = reparametrize(
    custom.TestPeftCustomModel,
    CASES
    | {
        "config_cls": CONFIG_CLASSES,
        "config0": [
            pytest.param(CuMAConfig(**SMALL, target_modules=["lin0"], init_weights=False, routing=routing), id=routing)
            for routing in ROUTINGS
        ],
    },
    minimum=45,
    skip={"test_disable_adapters_with_merging": MERGING},
    leave_out={
        "test_disable_adapter_with_bias_warns": NO_BIAS,
        "test_adding_multiple_adapters_with_bias_raises": NO_BIAS,
        "test_add_weighted_adapter_cat_with_rank_pattern": "CuMA has no weighted combinations of adapters",
    },
    without={
        # PEFT refuses two active adapters with these
        "test_active_adapter": lambda case: case.values[0] in ("modules_to_save", "tokens"),
    },
    **PROFILED,
)

TestMultipleActiveAdapters = reparametrize(
    custom.TestMultipleActiveAdapters,
    {"test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2": pairs()},
    minimum=5,
    prepare_inputs_for_testing=inputs_with_profile,
)

TestPeftFsdpStateDict = reparametrize(
    custom.TestPeftFsdpStateDict,
    CASES,
    minimum=1,
    leave_out={"test_save_load_roundtrip_fsdp_wrapped_learnable_bias": NO_BIAS},
    **PROFILED,
)

TestRequiresGrad = reparametrize(custom.TestRequiresGrad, {"config_cls": CONFIG_CLASSES}, minimum=2)

TestDefaultTargetModules = reparametrize(custom.TestDefaultTargetModules, {"config_cls": CONFIG_CLASSES}, minimum=4)

TestLowLevelFunctional = reparametrize(
    low_level.TestLowLevelFunctional, {"config_cls, config_kwargs": with_options()}, minimum=1
)

TestAdapterTargeting = reparametrize(
    other.TestAdapterTargeting, {"config_cls, config_kwargs": with_options(target_modules="l1.*")}, minimum=1
)
