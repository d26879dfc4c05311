# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Two processes train what one process trains, under every engine."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from .cells import AUX_COEF, CHECKPOINTING, ENGINES, Z_COEF, reference
from .compare import LOGGED, check_logs, deviation
from .conftest import Read

MATRIX = [f"{method}-{checkpointing}" for method in ("sft", "dpo") for checkpointing in CHECKPOINTING]
CELLS = [(engine, cell) for engine in ENGINES for cell in [*MATRIX, "sft-local", "dpo-local", "sft-experts"]]
CELLS += [("zero3", "sft-whole")]
SLICE = [(engine, f"{method}-none") for engine in ("ddp", "zero3", "fsdp2") for method in ("sft", "dpo")]
SHARDING = [engine for engine in ENGINES if engine not in ("ddp", "zero0")]


def marked(cells: list[tuple[str, str]]) -> list[Any]:
    return [pytest.param(*cell, marks=[pytest.mark.slice] if cell in SLICE else []) for cell in cells]


@pytest.mark.parametrize(("launch", "cell"), marked(CELLS))
def test_two_processes_train_what_one_does(launch: str, cell: str, read: Read, record: Callable) -> None:
    first, second = read(launch, cell)
    [alone] = read("single", reference(cell))
    largest = deviation(first, alone)
    # TRL's own guard: PEFT and ZeRO-3 need reentrant checkpointing
    forced = launch == "zero3" and cell.endswith("non-reentrant")
    record(f"{largest:.0e}" + (" as reentrant" if forced else ""))
    if cell in MATRIX and not cell.endswith("none"):
        assert first["reentrant"] is (forced or cell.endswith("-reentrant") and "non" not in cell)
    check_logs(first["logs"], alone["logs"])
    assert ("grad_norm" in first["logs"][0]) is (launch != "zero0")
    assert largest < 1e-3
    assert all(second["weights"][name].equal(weight) for name, weight in first["weights"].items())


@pytest.mark.parametrize(("launch", "cell"), marked([(engine, "sft-none") for engine in ENGINES]))
def test_the_engine_is_the_one_that_was_asked_for(launch: str, cell: str, read: Read) -> None:
    kinds = {"ddp": ("MULTI_CPU", "DistributedDataParallel"), "fsdp2": ("FSDP", "FSDPModule")}
    for found in (result["engine"] for result in read(launch, cell)):
        assert found["world"] == 2
        assert (found["type"], found["wrapper"]) == kinds.get(launch, ("DEEPSPEED", "DeepSpeedEngine"))
        if launch.startswith("zero"):
            stage = int(launch[-1])
            assert (found["stage"], found["partitions gradients"]) == (stage, stage >= 2)
        assert found["sharded"] is (launch in ("zero3", "fsdp2"))
        # Each process steps its half, but for a few numbers that fill up the last shards.
        share = 0.5 if launch in SHARDING else 1
        assert found["steps"] == pytest.approx(share * found["trains"], rel=0.01)


@pytest.mark.parametrize(("launch", "cell"), [("single", "sft-spanning")])
def test_the_two_scopes_can_be_told_apart(launch: str, cell: str, read: Read) -> None:
    """Else the equalities above would say nothing of whose load the loss reads."""
    [spanning], [local] = read(launch, cell), read("single", "sft-local")
    assert abs(spanning["logs"][0]["aux_loss"] - local["logs"][0]["aux_loss"]) > 1e-3


@pytest.mark.parametrize(
    ("launch", "cell"), marked([(engine, f"{method}-none") for engine in ENGINES for method in ("sft", "dpo")])
)
def test_evaluation(launch: str, cell: str, read: Read) -> None:
    [alone] = read("single", cell)
    for found in read(launch, cell):
        mine, theirs = found["evaluation"], alone["evaluation"]
        assert "eval_odd_router/country=JP/entropy" in theirs
        for key in theirs:
            # Of the odd set's last batch the processes get a repeated row: in the loss it counts, in the groups not.
            if "router" in key or key == "eval_even_loss":
                assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-5), key


@pytest.mark.parametrize(("launch", "cell"), marked([(engine, "sft-none") for engine in ENGINES]))
def test_generation(launch: str, cell: str, read: Read) -> None:
    results, [alone] = read(launch, cell), read("single", cell)
    ways = ["generated", "generated in parts"] if launch == "zero3" else ["generated"]
    for way in ways:
        assert [answer for result in results for answer in result[way]] == alone["generated"]
    assert len({tuple(answer) for answer in alone["generated"]}) == 4


@pytest.mark.parametrize(("launch", "cell"), [(engine, "sft-experts") for engine in ENGINES])
def test_a_process_may_leave_an_expert_unused(launch: str, cell: str, read: Read) -> None:
    log = read(launch, cell)[0]["logs"][0]
    # Of 4 experts 2 have half of the load each, one in each process: exp(ln 2) / 4, and 2 unused ones in 4 routers.
    assert log["router/utilization"] == pytest.approx(0.5, abs=1e-6)
    assert log["router/dead_experts"] == 8


@pytest.mark.parametrize(("launch", "cell"), [(engine, "dpo-continue") for engine in ("ddp", "zero3", "fsdp2")])
def test_dpo_starts_from_its_reference(launch: str, cell: str, read: Read, record: Callable) -> None:
    """A trained adapter's frozen copy is the reference: at first no answer is better than the reference says."""
    first, _ = read(launch, cell)
    [alone] = read("single", cell)
    start = first["logs"][0]
    router = AUX_COEF * start["aux_loss"] + Z_COEF * start["z_loss"]
    assert start["loss"] - router == pytest.approx(math.log(2), abs=1e-5)
    assert start["rewards/margins"] == 0
    largest = deviation(first, alone)
    record(f"{largest:.0e}")
    check_logs(first["logs"], alone["logs"])
    assert largest < 1e-3


@pytest.mark.parametrize(("launch", "cell"), [(engine, "sft-uneven") for engine in ENGINES])
def test_uneven_last_batches_complete(launch: str, cell: str, read: Read) -> None:
    first, second = read(launch, cell)
    # 9 rows are 5 batches of two, of which the first process takes 3, and the second repeats rows to have as many.
    assert len(first["logs"]) == 3
    for log in first["logs"]:
        assert all(math.isfinite(log[key]) for key in LOGGED)
    assert all(second["weights"][name].equal(weight) for name, weight in first["weights"].items())
