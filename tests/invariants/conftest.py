# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
The cases that the invariants run over, and the batches that they compare.

Not the full product: each architecture, gate, routing, kind of sharing and dtype is in some case, and in some case of
each invariant that it could break.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

LINEAR = {"target_modules": "all-linear"}
ATTENTION = ["q_proj", "k_proj", "v_proj"]

# On Qwen3: what a router can read, each gate, each kind of sharing, and FiLM.
VARIANTS: dict[str, dict[str, Any]] = {
    "joint": LINEAR | {"demographic_projection": 3},
    "demographic": LINEAR | {"routing": "demographic", "gate": "softmax_topk"},
    "semantic": LINEAR | {"routing": "semantic", "gate": "double_softmax"},
    "groups": LINEAR | {"router_groups": [ATTENTION, ["gate_proj", "up_proj"]], "share_a": True},
    "soft": LINEAR | {"gate": "soft", "share_a": True, "demographic_projection": 3},
    "film": LINEAR | {"film_hidden": 5, "demographic_projection": 3},
}
# Gemma and BLOOM: their tied embeddings repeat the last token unless the adapter speaks louder than on the others.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LINEAR | {"routing": "demographic", "gate": "softmax_topk", "demographic_projection": 3},
    "mistral": LINEAR
    | {"routing": "semantic", "gate": "double_softmax", "router_groups": [ATTENTION, ["gate_proj", "up_proj"]]},
    "gemma": LINEAR | {"gate": "soft", "share_a": True, "lora_alpha": 512},
    "phi": LINEAR | {"gate": "softmax_topk", "router_groups": [ATTENTION], "share_a": True},
    "gpt2": LINEAR | {"routing": "demographic", "gate": "double_softmax", "share_a": True},
    "opt": LINEAR | {"routing": "semantic", "router_groups": [ATTENTION]},
    "bloom": LINEAR | {"share_a": True, "demographic_projection": 3, "lora_alpha": 512},
}
CASES = {f"qwen3-{name}": ("qwen3", fields) for name, fields in VARIANTS.items()} | {
    architecture: (architecture, fields) for architecture, fields in ARCHITECTURES.items()
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"base": {"dtype": torch.bfloat16}, "autocast_adapter_dtype": False},
    "bf16-base": {"base": {"dtype": torch.bfloat16}},  # PEFT's default: float32 adapters
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Fields of an adapter for Qwen3."""
    return dict(VARIANTS[request.param])


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """An architecture and the fields of an adapter for it: the variants on Qwen3, and one for each other."""
    architecture, fields = CASES[request.param]
    return architecture, dict(fields)


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Arguments of `make_model` for the dtypes of base and adapter."""
    return PRECISIONS[request.param]


@pytest.fixture
def every_case() -> dict[str, tuple[str, dict[str, Any]]]:
    """All of `case`, for a test that takes them in one go."""
    return CASES


@pytest.fixture
def alone() -> Callable[[dict, int], dict]:
    """One sample of a padded batch, by itself and without padding."""

    def pick(batch: dict, row: int) -> dict:
        real = batch["attention_mask"][row].bool()
        return {
            "input_ids": batch["input_ids"][row : row + 1, real],
            "attention_mask": batch["attention_mask"][row : row + 1, real],
            "demographic_embeds": batch["demographic_embeds"][row : row + 1],
        }

    return pick


@pytest.fixture
def left_padded() -> Callable[[dict], dict]:
    """The same batch with its padding on the left."""

    def flip(batch: dict) -> dict:
        flipped = {key: torch.zeros_like(batch[key]) for key in ("input_ids", "attention_mask")}
        for row, mask in enumerate(batch["attention_mask"].bool()):
            for key, value in flipped.items():
                value[row, value.shape[1] - int(mask.sum()) :] = batch[key][row, mask]
        return batch | flipped

    return flip
