# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Evaluations side by side."""

import json

import numpy as np
import pytest

from trl_cuma.evaluation.cell_scores import Scores
from trl_cuma.evaluation.compare import compare_runs, comparison_markdown, write_comparison

CLUSTERS = (np.arange(60) // 6, np.arange(60) % 6)


def write_run(
    folder,
    shift=0.0,
    key="same",
    splits=("test",),
    clusters=CLUSTERS,
    unit="country",
    cells=True,
    people=CLUSTERS[0],
    weight=1.0,
    marginal=0.0,
):
    folder.mkdir(parents=True)
    rows = np.random.default_rng(0).normal(1, 0.5, 60)
    columns = {"emd": rows + shift, "kl": rows, "kl_marginal": rows + 1 + marginal}
    scores = Scores(columns, clusters, (unit, "question"), np.r_[weight, np.ones(59)])
    answers = Scores(
        {"accuracy": (rows > 1).astype(float)}, (people, CLUSTERS[1]), ("person", "question"), np.ones(60)
    )
    metrics = {
        "emd": {"value": rows.mean() + shift, "low": 0.8, "high": 1.2, "n": 6, "unit": "country × question"},
        "kl": {"value": None, "low": None, "high": None, "n": 0, "unit": "", "note": "why not"},
        "kl_explained": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 6, "unit": "country × question"},
        "accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 6, "unit": "person × question"},
    }
    document = {"version": 1, "model": {"name": "m"}, "splits": {split: {"metrics": metrics} for split in splits}}
    (folder / "evaluation.json").write_text(json.dumps(document))
    if cells:
        arrays = {"test/key": np.array(key)} | scores.arrays("test/cells") | answers.arrays("test/answers")
        np.savez(folder / "cells.npz", **arrays)
    return folder


def differences(*runs):
    return compare_runs(runs, num_samples=100)["splits"]["test"]["differences"]


def test_the_same_cells_are_paired(tmp_path):
    (found,) = differences(write_run(tmp_path / "a"), write_run(tmp_path / "b", shift=-0.1))
    assert found["paired"] and found["note"] is None
    entry = found["metrics"]["emd"]
    # The same in every cell, so certain, although the runs' own intervals overlap.
    assert [entry[end] for end in ("value", "low", "high")] == pytest.approx([-0.1] * 3)
    assert found["metrics"]["accuracy"]["value"] == 0
    assert "kl" not in found["metrics"]  # n/a in both


def test_other_data_is_not_paired(tmp_path):
    a, b, c = write_run(tmp_path / "a"), write_run(tmp_path / "b", key="other"), write_run(tmp_path / "c", cells=False)
    found = differences(a, b, c)
    assert [entry["paired"] for entry in found] == [False, False]
    assert "other cells or answers" in found[0]["note"] and "no cells.npz" in found[1]["note"]
    assert [entry["metrics"] for entry in found] == [{}, {}]
    text = comparison_markdown(compare_runs([a, b], num_samples=100))
    assert "Not paired: measured on other cells or answers than the first run" in text


def test_other_groups_of_the_same_answers_leave_the_answers_paired(tmp_path):
    a = write_run(tmp_path / "a")
    others = {"clusters": CLUSTERS[::-1]}, {"unit": "religion"}, {"weight": 2.0}
    for name, other in zip("bcd", others, strict=True):
        (found,) = differences(a, write_run(tmp_path / name, **other))
        assert found["metrics"].keys() == {"accuracy"}
        assert "other fields or sizes" in found["note"]


def test_answers_of_other_people_are_not_paired(tmp_path):
    (found,) = differences(write_run(tmp_path / "a"), write_run(tmp_path / "b", people=np.arange(60) // 12))
    assert found["metrics"].keys() == {"emd", "kl_explained"}
    assert found["note"] == "answers not paired: the runs tell people apart in different ways"


def test_other_training_answers_leave_what_needs_no_marginal(tmp_path):
    a = write_run(tmp_path / "a")
    same, other = differences(a, write_run(tmp_path / "b"), write_run(tmp_path / "c", marginal=0.5))
    assert same["metrics"].keys() == {"emd", "kl_explained", "accuracy"} and same["note"] is None
    assert other["metrics"].keys() == {"emd", "accuracy"} and other["paired"]
    assert "the runs' training answers differ" in other["note"]


def test_splits_that_runs_share(tmp_path):
    a = write_run(tmp_path / "a", splits=("test", "dev"))
    b = write_run(tmp_path / "b", splits=("test",))
    assert list(compare_runs([a, b], num_samples=100)["splits"]) == ["test"]
    with pytest.raises(ValueError, match="no split in common"):
        compare_runs([write_run(tmp_path / "c", splits=("new",)), b])


def test_what_is_no_evaluation(tmp_path):
    a = write_run(tmp_path / "a")
    with pytest.raises(ValueError, match="two or more runs, got 1"):
        compare_runs([a])
    with pytest.raises(FileNotFoundError, match=r"has no evaluation\.json"):
        compare_runs([a, tmp_path])
    (tmp_path / "evaluation.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no evaluation"):
        compare_runs([a, tmp_path])


def test_runs_go_by_their_folder(tmp_path):
    paths = [write_run(tmp_path / "x" / "a"), write_run(tmp_path / "y" / "b")]
    assert [run["name"] for run in compare_runs(paths, num_samples=10)["runs"]] == ["a", "b"]
    paths[1] = write_run(tmp_path / "z" / "a")
    assert [run["name"] for run in compare_runs(paths, num_samples=10)["runs"]] == [str(path) for path in paths]


def test_the_page_and_the_tables(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "<b>", shift=-0.1)]
    folder = write_comparison(compare_runs(runs, num_samples=100), tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["comparison.html", "comparison.json", "comparison.md"]
    assert folder.stat().st_mode & 0o777 == 0o700
    text, page = ((folder / f"comparison.{kind}").read_text() for kind in ("md", "html"))
    assert "| EMD ↓ | -0.100 [-0.100, -0.100] | better | country × question |" in text
    assert "| KL ↓ | n/a | n/a |" in text
    assert "<b>" not in page and "&lt;b&gt;" in page
    assert page.count("<figure") == 1
    with pytest.raises(FileExistsError):
        write_comparison(compare_runs(runs, num_samples=100), tmp_path / "out")
