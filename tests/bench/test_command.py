# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`trl-cuma bench`: wrong input."""

import json
from pathlib import Path

import pytest

from trl_cuma.bench.runner import Runner
from trl_cuma.cli import main

SUITE = Path(__file__).parents[2] / "benchmarks/suites/simulated_random.yaml"


def test_wrong_input_is_one_line(tmp_path, capsys):
    assert main(["bench", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--workers", "--threads"])
def test_numbers_of_processes_are_checked(tmp_path, capsys, option):
    assert main(["bench", str(tmp_path / "none.yaml"), option, "0"]) == 2
    assert f"`{option}` must be at least 1, got 0" in capsys.readouterr().err


def test_nothing_runs_that_cannot_be_checked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Runner, "measure", lambda *_: pytest.fail("it trained"))
    runs = {str(world): {"budgets": {"400": {"splits": {}}}} for world in range(5)}
    published = {"chosen": {"film": {"settings": [1e-3, 2]}}, "sft": {"film": runs, "cuma": runs}}
    (tmp_path / "results.json").write_text(json.dumps(published))
    check = ["bench", str(SUITE), "--check", str(tmp_path / "results.json"), "--output_dir", str(tmp_path / "out")]
    assert main([*check, "--arms", "film"]) == 2
    assert "World 0 is published" in capsys.readouterr().err  # the suite's own worlds
    assert main([*check, "--arms", "cuma", "--worlds", "9"]) == 2
    assert "no two worlds of arm 'cuma'" in capsys.readouterr().err  # without settings
    (tmp_path / "results.json").write_text("# Tables")
    assert main([*check, "--worlds", "9"]) == 2
    assert "results.json is no JSON" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
