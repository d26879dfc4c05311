# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Comparing runs."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from trl_cuma import load_demographic_encoder

LOGGED = ("loss", "aux_loss", "z_loss", "router/utilization", "router/entropy", "router/dead_experts")


def deviation(run: dict[str, Any], other: dict[str, Any], names: Collection[str] | None = None) -> float:
    """
    The largest distance between two runs' final tensors, relative to the way that training moved the tensor. In
    float32 about 1e-5: Adam scales up gradients whose sums differ in their last bits.
    """
    largest = 0.0
    assert run["weights"].keys() == other["weights"].keys()
    for name in other["weights"].keys() if names is None else names:
        weight = other["weights"][name]
        moved = (weight.float() - other["start"][name].float()).norm()
        assert moved > 1e-2, f"{name} was not trained"
        largest = max(largest, ((run["weights"][name].float() - weight.float()).norm() / moved).item())
    return largest


def check_logs(logs: list[dict[str, float]], others: list[dict[str, float]]) -> None:
    """Each step's losses, routing statistics and, where the engine tells it (ZeRO-0 doesn't), gradient norm."""
    assert len(logs) == len(others) > 0
    for log, other in zip(logs, others, strict=True):
        keys = [*LOGGED, *(["grad_norm"] if "grad_norm" in log else [])]
        assert {key: log[key] for key in keys} == pytest.approx({key: other[key] for key in keys}, rel=1e-5, abs=1e-5)


def logits(model: PeftModel, base: Path, saved: Path) -> torch.Tensor:
    """Of the rows of which the worker has them, as a user would, from the files alone."""
    batch = AutoTokenizer.from_pretrained(base)(["Question 1? yes", "Question 2? yes"], return_tensors="pt")
    people = [{"age": "old", "country": "JP"}, {"age": "young", "country": "FR"}]
    embeds = load_demographic_encoder(str(saved)).encode(people)
    with torch.no_grad():
        return model.eval()(**batch, demographic_embeds=embeds).logits
