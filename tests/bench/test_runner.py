# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A toy suite from its YAML to its tables: equal terms, nothing done twice, nothing mixed up."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import load_from_disk

from trl_cuma.bench import read_suite
from trl_cuma.bench import runner as runner_module
from trl_cuma.bench.runner import Runner, SFTRun
from trl_cuma.bench.survey_world import SurveyWorld
from trl_cuma.bench.training import run_sft
from trl_cuma.cli import main

TOY = {
    "name": "toy",
    "data": {
        "source": "simulated",
        "args": {
            "num_questions": 6,
            "num_topics": 4,
            "answers_per_person": 4,
            "num_people": 1500,
            "held_out_questions": 1,
            "max_cells": 60,
            "min_training_people": 20,
        },
        "cells": 20,
        "validation_answers": 30,
    },
    "base": {
        "model": {"architecture": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
        "steps": 2,
        "batch_size": 8,
    },
    "training": {"steps": 2, "batch_size": 4, "select_every": 1, "warmup_steps": 0},
    "tuning": {"worlds": [9], "learning_rates": [1e-4, 1e-2], "alphas": [2, 8]},
    "reference": {
        "config": {"r": 2, "num_experts": 2, "top_k": 2, "router_hidden": 4, "demographic_projection": 4},
        "target_modules": ["q_proj", "v_proj"],
    },
    "worlds": [0, 1],
    "arms": [{"method": "cuma"}, {"method": "lora", "prompt_profile": True}],
    "compare": [["cuma", "lora-prompt"]],
    "dpo": {"arms": ["cuma", "lora-prompt"], "learning_rates": [1e-3, 1e-2], "steps": 1, "batch_size": 2},
}


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """The toy suite and the folder into which the command ran it."""
    folder = tmp_path_factory.mktemp("bench")
    suite = folder / "toy.yaml"
    suite.write_text(yaml.safe_dump(TOY))
    assert main(["bench", str(suite), "--output_dir", str(folder / "out")]) == 0
    return suite, folder / "out"


def test_every_arm_has_every_setting_of_the_grid(finished):
    results = json.loads((finished[1] / "results.json").read_text())
    for key in ("cuma", "lora-prompt"):
        chosen = results["chosen"][key]
        assert [point[:2] for point in chosen["grid"]] == [[1e-4, 2], [1e-4, 8], [1e-2, 2], [1e-2, 8]]
        assert chosen["settings"] == min(chosen["grid"], key=lambda point: point[-1])[:2]
        assert results["dpo"]["chosen"][key]["grid"][0][0] == 1e-3
    assert set(results["sft"]["cuma"]) == {"0", "1"}


def test_the_chosen_steps_are_the_best_look_at_the_validation_answers(finished):
    results = json.loads((finished[1] / "results.json").read_text())
    for runs in results["sft"].values():
        for run in runs.values():
            looks = dict(map(tuple, run["validation"]))
            assert sorted(looks) == [1, 2, 3, 4]
            for budget, best in run["budgets"].items():
                within = {step: nll for step, nll in looks.items() if step <= int(budget)}
                assert best["steps"] == min(within, key=within.get)


def test_the_tables_have_all_splits_baselines_and_the_comparison(finished):
    text = (finished[1] / "tables.md").read_text()
    for title in ("held-out people, 2 steps", "held-out questions, 4 steps", "DPO, held-out combinations"):
        assert title in text
    assert "oracle (truth)" in text and "additive model" in text and "cuma ÷ lora-prompt" in text


def test_what_is_done_is_not_done_again(finished, monkeypatch):
    suite, out = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    monkeypatch.setattr(runner_module, "_do", lambda *_: pytest.fail("a finished run was run again"))
    Runner(read_suite(suite), out).run()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == before


def test_one_more_world_is_one_more_run_for_each_arm(finished, monkeypatch):
    suite, out = finished
    asked = []
    monkeypatch.setattr(runner_module, "_do", lambda _suite, _out, run, _threads: asked.append(run) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Runner(read_suite(suite, worlds=[0, 1, 2]), out).run()
    assert [run.folder for run in asked] == ["worlds/2"]


def test_what_a_new_arm_needs_of_a_finished_world_is_added(finished, tmp_path):
    suite, out = finished
    shutil.copytree(out / "worlds/0", tmp_path / "worlds/0")
    shutil.rmtree(tmp_path / "worlds/0/rows-prompt")  # as if no arm had read it
    (tmp_path / "worlds/0/encoder-field.json").unlink()
    model = tmp_path / "worlds/0/model/model.safetensors"
    before = model.stat().st_mtime_ns
    runner = Runner(read_suite(suite), tmp_path)
    runner._prepare([0])
    added, there = (load_from_disk(str(folder / "worlds/0/rows-prompt")) for folder in (tmp_path, out))
    assert added.to_list() == there.to_list() and added.column_names == there.column_names
    encoders = [json.loads((folder / "worlds/0/encoder-field.json").read_text()) for folder in (tmp_path, out)]
    assert encoders[0] == encoders[1]
    assert model.stat().st_mtime_ns == before  # the base model that other arms were trained on
    assert {path.name for path in (tmp_path / "worlds/0").iterdir()} == {
        path.name for path in (out / "worlds/0").iterdir()
    }


def test_another_suite_is_refused(finished, tmp_path):
    suite, out = finished
    changed = tmp_path / "toy.yaml"
    changed.write_text(yaml.safe_dump({**TOY, "training": {**TOY["training"], "batch_size": 8}}))
    with pytest.raises(ValueError, match="another suite: 'training' differs"):
        Runner(read_suite(changed), out)


def test_a_run_repeats_to_the_bit(finished, tmp_path):
    suite, out = finished
    loaded = read_suite(suite)
    world = SurveyWorld(loaded, 0, out / "worlds/0")
    settings = json.loads((out / "results.json").read_text())["chosen"]["cuma"]["settings"]
    torch.set_num_threads(1)
    again = run_sft(world, loaded.arm("cuma"), *settings, 4, tmp_path / "again")
    assert again == json.loads((out / SFTRun("cuma", 0, *settings, 4).folder / "result.json").read_text())


def test_a_new_folder_is_its_owners_alone(finished, tmp_path):
    assert finished[1].stat().st_mode & 0o777 == 0o700
    there = tmp_path / "there"
    there.mkdir(mode=0o755)
    before = there.stat().st_mode
    Runner(read_suite(finished[0]), there)
    assert there.stat().st_mode == before


def test_a_failed_run_leaves_nothing_behind(finished, tmp_path, monkeypatch):
    suite, out = finished
    loaded = read_suite(suite)
    world = SurveyWorld(loaded, 0, out / "worlds/0")
    monkeypatch.setattr(np, "savez_compressed", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_sft(world, loaded.arm("lora-prompt"), 1e-3, 2, 2, tmp_path / "runs/one")
    assert list((tmp_path / "runs").iterdir()) == []


def test_shuffled_profiles_are_other_peoples_and_carry_no_information(finished):
    suite, out = finished
    world = SurveyWorld(read_suite(suite), 0, out / "worlds/0")
    true, shuffled = world.sft_rows(True, False, 4), world.sft_rows(True, True, 4)
    assert true["input_ids"] == shuffled["input_ids"]
    people = {}
    for row, other in zip(true, shuffled, strict=True):
        people.setdefault(row["person_id"], []).append((row["demographic"], other["demographic"]))
    # a person keeps one stand-in, but people of one profile have different ones: it is no renaming
    assert all(len({str(other) for _, other in rows}) == 1 for rows in people.values())
    moved = np.mean([rows[0][0] != rows[0][1] for rows in people.values()])
    assert moved > 0.9


def test_a_new_world_is_checked_with_the_published_settings(finished, tmp_path, capsys):
    suite, out = finished
    shutil.copytree(out / "worlds/9", tmp_path / "worlds/9")  # settings were chosen in it, and nothing published
    check = [
        "bench",
        str(suite),
        "--output_dir",
        str(tmp_path),
        "--check",
        str(out / "results.json"),
        "--arms",
        "cuma",
    ]
    assert main([*check, "--worlds", "9"]) == 0
    text = capsys.readouterr().out
    assert "of 6 inside" in text  # 3 splits × 2 budgets
    assert (tmp_path / "check.md").read_text() in text
    assert {path.parent.name for path in (tmp_path / "sft").rglob("*-4")} == {"cuma"}
    assert main([*check, "--worlds", "0"]) == 2
    assert "World 0 is published" in capsys.readouterr().err
