# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Two processes in bfloat16, as on GPUs: a base in bfloat16 or nf4, and the dtypes that each engine needs."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .cells import AUX_COEF, Z_COEF
from .conftest import Read

ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
# bfloat16 has 8 bits, and the engines round in other places: what is equal in float32 differs in the third digit.
CLOSE = 1e-2


@pytest.mark.parametrize("cell", ["sft-bf16", "dpo-bf16", "sft-bf16-nf4"])
@pytest.mark.parametrize("launch", ENGINES)
def test_two_processes_train_what_one_does(launch: str, cell: str, read: Read, record: Callable) -> None:
    first, second = read(launch, cell)
    [alone] = read("single", cell)
    losses = [[log["loss"] for log in found["logs"]] for found in (first, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=CLOSE)
    assert losses[0][-1] < losses[0][0]
    record(f"loss {max(abs(a / b - 1) for a, b in zip(*losses, strict=True)):.0e}")
    # DeepSpeed casts what is trained, and keeps float32 copies in its optimizer.
    dtype = torch.bfloat16 if launch.startswith("zero") else torch.float32
    for name, weight in first["weights"].items():
        assert weight.dtype == dtype and torch.isfinite(weight).all()
        assert weight.equal(second["weights"][name]) and not weight.equal(first["start"][name]), name


@pytest.mark.parametrize("cell", ["sft-bf16", "sft-bf16-nf4"])
@pytest.mark.parametrize("launch", ENGINES)
def test_the_saved_tensors_are_the_trained_ones(launch: str, cell: str, read: Read, results: Path) -> None:
    trained = read(launch, cell)[0]["weights"]
    saved = load_file(results / launch / cell / "saved" / "adapter_model.safetensors")
    assert saved.keys() == {name.replace(".default.", ".") for name in trained}
    assert all(saved[name.replace(".default.", ".")].equal(weight) for name, weight in trained.items())


@pytest.mark.parametrize("cell", ["dpo-bf16"])
@pytest.mark.parametrize("launch", ENGINES)
def test_a_continued_adapter_and_its_reference_are_rounded_alike(launch: str, cell: str, read: Read) -> None:
    start = read(launch, cell)[0]["logs"][0]
    router = AUX_COEF * start["aux_loss"] + Z_COEF * start["z_loss"]
    assert start["rewards/margins"] == 0
    assert start["loss"] - router == pytest.approx(math.log(2), rel=CLOSE)
