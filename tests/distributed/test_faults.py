# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What two processes do when something goes wrong in one of them."""

import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from .engines import launch

SCRIPT = Path(__file__).with_name("faulty.py")
# Seconds in which a process has to end whose partner is dead: measured 1 to 3, a hang ends with the launch's limit.
END = 60


def each(engines: tuple[str, ...], in_slice: str = "") -> list:
    missing = find_spec("deepspeed") is None
    skip = pytest.mark.skipif(missing, reason="needs the extra trl_cuma[deepspeed]")
    marks = {name: [skip] * name.startswith("zero") + [pytest.mark.slice] * (name == in_slice) for name in engines}
    return [pytest.param(name, marks=marks[name]) for name in engines]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.mark.parametrize("engine", each(("ddp", "zero0", "zero2", "zero3", "fsdp2"), "zero3"))
def test_what_is_not_finite_in_one_process_stops_all(engine, tmp_path):
    assert launch(engine, tmp_path / engine, ["output", "gradient"], script=SCRIPT) == 0
    for fault, what in (("output", "loss"), ("gradient", "gradient")):
        first, second = (torch.load(tmp_path / engine / f"{fault}.{rank}.pt") for rank in (0, 1))
        # Four rows a step, the second process's are the last two: the eighth is its second row in step 2.
        where = (
            "process 1, rows [1] (rows [7] of `train_dataset` as the trainer has it) of micro-batch 0, first in the"
        )
        assert first["error"].startswith(f"Step 2: the {what} is not finite: {where}")
        assert "output of model.layers.1.mlp.down_proj. The step was not taken" in first["error"]
        assert second["error"] == first["error"]
        assert first["steps"] == second["steps"] == 1
        for name, weight in first["weights"].items():
            assert torch.isfinite(weight).all() and torch.equal(weight, second["weights"][name])


@pytest.mark.parametrize("engine", each(("ddp", "zero3"), "ddp"))
def test_a_dead_process_ends_the_other_and_the_run_can_go_on(engine, tmp_path, record_property):
    folder = tmp_path / f"{engine}-killed"
    assert launch(engine, folder, ["killed"], script=SCRIPT) == 1
    seconds = time.time() - (folder / "dead").stat().st_mtime
    record_property("ended", f"{engine} {seconds:.0f} s")
    assert seconds < END
    assert checkpoints(folder / "killed") == ["checkpoint-2"]
    assert launch(engine, tmp_path / engine, ["resumed", "whole"], script=SCRIPT) == 0
    resumed, whole = (torch.load(tmp_path / engine / f"{name}.0.pt") for name in ("resumed", "whole"))
    assert resumed["steps"] == whole["steps"] == 4
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], weight, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("engine", each(("ddp", "zero3", "fsdp2")))
def test_a_full_disk_ends_the_run_and_leaves_the_previous_checkpoint(engine, tmp_path):
    assert launch(engine, tmp_path / engine, ["full"], script=SCRIPT) == 1
    error = (tmp_path / engine / "error").read_text()
    assert error.startswith(
        f"checkpoint-4 could not be written to {tmp_path / engine / 'full'}. checkpoint-2 is intact"
    )
    assert checkpoints(tmp_path / engine / "full") == ["checkpoint-2"]
