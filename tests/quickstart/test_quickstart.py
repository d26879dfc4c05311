# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The quick start at toy size: that it runs, repeats, and measures what it says."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import load_from_disk

from trl_cuma.cli import main
from trl_cuma.evaluation.options import split_options
from trl_cuma.quickstart import tables_of
from trl_cuma.quickstart.pipeline import Quickstart
from trl_cuma.quickstart.settings import DPO_GRID, REAL, SFT_GRID, SIMULATED
from trl_cuma.quickstart.training import ARMS, adapter_configs, load_model, profile_vectors, train_sft
from trl_cuma.testing import minilm_path

TOY = replace(
    SIMULATED,
    survey={
        "num_questions": 4,
        "num_topics": 4,
        "answers_per_person": 2,
        "num_people": 1500,
        "max_cells": 60,
        "min_training_people": 30,
    },
    pretraining_steps=2,
    sft_steps=2,
    sft_batch_size=8,
    dpo_steps=2,
    dpo_batch_size=4,
    warmup_steps=1,
    cells=40,
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    run = Quickstart(tmp_path_factory.mktemp("quickstart"), settings=TOY, log=lambda text: None)
    return run, run.run()


def test_every_arm_is_measured_on_every_split(toy):
    run, results = toy
    for stage in ("sft", "dpo"):
        assert list(results[stage]["arms"]) == [arm.name for arm in ARMS]
        for arm in results[stage]["arms"].values():
            for split in ("held_out_people", "held_out_combinations"):
                assert 0 <= arm[split]["emd"] <= 1 and 0 <= arm[split]["accuracy"] <= 1
    assert json.loads((run.output_dir / "results.json").read_text()) == json.loads(json.dumps(results))
    table = tables_of([results, results], real=False)
    assert table.count("CuMA, profile to the router only") == 4  # two splits, SFT and DPO
    assert "sharpened by the objective" in table


def test_baselines_frame_the_arms(toy):
    _, results = toy
    for split, oracle in results["sft"]["baselines"]["oracle"].items():
        marginal = results["sft"]["baselines"]["marginal"][split]
        assert (oracle["emd"], oracle["gap_closed"]) == (0, 1) and marginal["gap_closed"] == 0
        assert marginal["emd"] > 0 and oracle["accuracy"] > marginal["accuracy"]


@pytest.mark.slow
def test_a_seed_gives_the_same_numbers(toy, tmp_path):
    _, results = toy
    again = Quickstart(tmp_path, settings=TOY, log=lambda text: None).run()
    assert again["sft"] == results["sft"] and again["dpo"] == results["dpo"]


def test_an_arm_without_the_profile_answers_everyone_alike(toy):
    run, _ = toy
    cells = run.cells["held_out_people"]
    spread = {}
    for arm in ("lora", "lora-prompt", "cuma"):
        probs = split_options(run.predictions[arm]["sft/held_out_people"])[0]
        spread[arm] = max(np.ptp(probs[cells.question == q], axis=0).max() for q in np.unique(cells.question))
    assert spread["lora"] < 1e-6 < min(spread["lora-prompt"], spread["cuma"])


def test_matched_arms_have_matched_sizes(toy):
    run, results = toy
    size = {name: arm["parameters"] for name, arm in results["sft"]["arms"].items()}
    assert size["lora"] == size["lora-prompt"] == pytest.approx(size["cuma"], rel=0.02)
    configs = adapter_configs(load_model(run.model_dir), TOY, demographic_dim=31)
    assert configs["rank"].r == configs["cuma"].r
    assert configs["parameters"].r < TOY.model["hidden_size"] / 2  # still low-rank


def test_a_mixture_too_large_to_match_is_refused(toy):
    run, _ = toy
    large = replace(TOY, cuma={**TOY.cuma, "num_experts": 16})
    with pytest.raises(ValueError, match="Shrink the router or the experts"):
        adapter_configs(load_model(run.model_dir), large, demographic_dim=31)


def test_prepared_data_is_what_the_recipes_read(toy):
    run, _ = toy
    sft, dpo = (load_from_disk(str(run.output_dir / "data" / name)) for name in ("sft", "dpo"))
    assert set(sft) == set(dpo) == {"train", "test"}
    assert {"prompt", "completion", "demographic", "person_id"} <= set(sft["train"].column_names)
    assert {"prompt", "chosen", "rejected", "demographic"} <= set(dpo["train"].column_names)
    assert not set(sft["train"]["person_id"]) & set(sft["test"]["person_id"])
    assert (Path(run.model_dir) / "model.safetensors").exists()


@pytest.mark.slow
def test_a_text_encoder_takes_the_field_encoders_place(tmp_path):
    """The main job's CuMA arm with a real sentence encoder, up to a trained adapter that carries it."""
    run = Quickstart(tmp_path, settings=TOY, encoder=str(minilm_path()), log=lambda text: None)
    run.prepare()
    encoder, arm = run.encoder(), ARMS[-1]
    config = adapter_configs(load_model(run.model_dir), run.settings, encoder.dim)[arm.matched]
    data = run.sft_data("train", arm.prompt_profile)
    model = train_sft(arm, run.model_dir, data, config, encoder, run.settings, 1e-3, 0, tmp_path / "adapter").model
    assert model.peft_config["default"].demographic_encoder["type"] == "text"
    vectors = profile_vectors(model, run.survey.profiles[:5])
    np.testing.assert_allclose(vectors, encoder.encode(run.survey.profiles[:5]), atol=1e-5)


@pytest.mark.slow
def test_rejected_from_the_reference(tmp_path):
    run = Quickstart(tmp_path, settings=TOY, rejected="reference", log=lambda text: None)
    results = run.run()
    # equal draws are dropped, so the pairs still have two different options and the loss starts near ln 2
    assert results["dpo"]["arms"]["cuma"]["held_out_people"]["pair_log_loss"] == pytest.approx(math.log(2), abs=0.05)


def test_committed_learning_rates_are_in_the_grids():
    for settings in (SIMULATED, REAL):
        assert set(settings.sft_learning_rates) == set(settings.dpo_learning_rates) == {arm.name for arm in ARMS}
        assert set(settings.sft_learning_rates.values()) <= set(SFT_GRID)
        assert set(settings.dpo_learning_rates.values()) <= set(DPO_GRID)


def test_prepare_stage_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trl_cuma.quickstart.pipeline.SIMULATED", TOY)
    assert main(["quickstart", "--stage", "prepare", "--output_dir", str(tmp_path)]) == 0
    assert "a linear probe reads country" in capsys.readouterr().out
    assert (tmp_path / "model").is_dir() and (tmp_path / "data" / "dpo").is_dir() and not (tmp_path / "sft").exists()


@pytest.mark.slow
def test_real_answers_from_the_command_line(tmp_path, monkeypatch, capsys):
    """A file of our own making in GlobalOpinionQA's form; every figure is drawn."""
    rng = np.random.default_rng(0)
    lines = [
        {
            "qid": f"q{q}",
            "question": f"Is thing {q} good?",
            "country": f"Country {c}",
            "options": ["Yes", "Perhaps", "No"],
        }
        | {"dist": [float(x) for x in np.round(rng.dirichlet([1, 1, 1]), 6)], "sources": ["made up"]}
        for q in range(10)
        for c in range(12)
    ]
    for line in lines:
        line["dist"][2] = 1 - line["dist"][0] - line["dist"][1]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    real = replace(TOY, survey={"answers_per_cell": 5, "min_countries": 6})
    monkeypatch.setattr("trl_cuma.quickstart.pipeline.REAL", real)
    assert main(["quickstart", "--data", str(path), "--output_dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "held-out question-country cells" in out and "factor model" in out
    for name in ("distributions", "experts", "sharpening"):
        assert (tmp_path / "out" / "figures" / f"{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--data", "nowhere.jsonl"], "nowhere.jsonl"), (["--encoder", os.path.join("no", "model")], "model")],
)
def test_wrong_input_is_one_line(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr("trl_cuma.quickstart.pipeline.SIMULATED", TOY)
    assert main(["quickstart", "--output_dir", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("trl-cuma: error:") and said in error and "Traceback" not in error
