# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What the tables say of results that were made by hand."""

from types import SimpleNamespace

import pytest
import yaml

from trl_cuma.bench import read_suite, summary
from trl_cuma.bench.comparison import Comparison
from trl_cuma.bench.summary import tables

SUITE = {
    "name": "small",
    "data": {"source": "simulated"},
    "base": {"model": {"architecture": "llama"}},
    "training": {"steps": 4, "select_every": 2, "factors": [1]},
    "tuning": {"worlds": [9], "learning_rates": [1e-3, 1e-2, 1e-1], "alphas": [2, 4, 8]},
    "reference": {"config": {"r": 2}, "target_modules": ["q_proj"]},
    "worlds": [0, 1],
    "arms": [{"method": "lora"}, {"method": "cuma"}],
    "compare": [["cuma", "lora"]],
}
SCORES = {"kl": 0.1, "kl_marginal": 0.4, "emd_marginal": 0.2, "accuracy": 0.5}
GRID = [[rate, alpha, 1.0] for rate in (1e-3, 1e-2, 1e-1) for alpha in (2, 4, 8)]


def text_of(tmp_path, settings=(1e-2, 4), grid=GRID, splits=("held_out_people",), **change) -> str:
    """The tables of a suite in which LoRA has an EMD of 0.1 in world 0 and 0.12 in world 1, CuMA a fifth less."""
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({**SUITE, **change}))
    suite = read_suite(tmp_path / "suite.yaml")

    def run(emd):
        scores = {split: {"emd": emd, **SCORES} for split in splits}
        return {"parameters": 8, "budgets": {"4": {"steps": 4, "splits": scores}}}

    sft = {key: {"0": run(0.1 * factor), "1": run(0.12 * factor)} for key, factor in (("lora", 1), ("cuma", 0.8))}
    marginal = {split: {**SCORES, "emd": 0.2, "kl": 0.4} for split in splits}
    results = {
        "chosen": {key: {"settings": list(settings), "grid": grid, "at_the_edge": False} for key in sft},
        "baselines": {"training marginal": {"0": marginal, "1": marginal}},
        "sft": sft,
    }
    return tables(SimpleNamespace(suite=suite), results)


def row(text: str, start: str, number: int = 0) -> list[str]:
    """The cells of a table's row that begins so."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in lines[number].strip("|").split("|")]


@pytest.mark.parametrize(
    ("settings", "edge"),
    [((1e-2, 4), ""), ((1e-1, 4), "learning rate"), ((1e-2, 2), "α"), ((1e-3, 8), "learning rate and α")],
)
def test_settings_at_the_edge_of_their_grid_are_named(tmp_path, settings, edge):
    assert row(text_of(tmp_path, settings), "CuMA")[4] == edge


def test_a_grid_of_one_value_has_no_edge(tmp_path):
    grid = [[rate, 2, 1.0] for rate in (1e-3, 1e-2, 1e-1)]
    assert row(text_of(tmp_path, (1e-3, 2), grid), "CuMA")[4] == "learning rate"
    assert row(text_of(tmp_path, (1e-3, 2), [[1e-3, 2, 1.0]]), "CuMA")[4] == ""


def test_worlds_that_settings_were_chosen_in_are_counted(tmp_path):
    assert "also chosen" not in text_of(tmp_path)
    tuning = {**SUITE["tuning"], "worlds": [1, 2]}
    assert "Settings were also chosen in 1 of the 2 reported worlds." in text_of(tmp_path, tuning=tuning)


def test_unseen_questions_are_held_against_a_uniform_answer(tmp_path):
    text = text_of(
        tmp_path, splits=("held_out_people", "held_out_questions"), compare=[["cuma", "marginal"], ["cuma", "lora"]]
    )
    people, questions = (part.split("\n\n")[0] for part in text.split("| SFT, held-out ")[1:])
    # EMD .08 and .096 of .2: .6 and .52 of the gap are closed
    assert row(people, "CuMA")[5:7] == ["0.75 [0.75, 0.75]", "0.56 [0.05, 1.07]"] and "| training marginal |" in people
    assert row(questions, "CuMA")[5:7] == ["n/a", "n/a"] and row(questions, "CuMA")[4].startswith("0.088")
    assert row(questions, "uniform")[4:7] == ["0.200 [0.200, 0.200]", "n/a", "n/a"] and "marginal" not in questions
    assert "no training answers to these questions: the reference is a uniform answer" in text
    assert row(text, "cuma ÷ marginal")[1] == "held-out people"
    assert row(text, "cuma ÷ uniform")[1] == "held-out questions"


def test_countries_and_questions_are_compared_in_a_single_world(tmp_path, monkeypatch):
    """They are what is resampled; of a simulated survey it is worlds."""
    monkeypatch.setattr(summary, "compare_cells", lambda *_: Comparison(0.8, 0.7, 0.9, 0.85))
    opinions = {"source": "global_opinions", "path": "not-read.jsonl"}
    splits = ("held_out_cells", "held_out_countries")
    text = text_of(tmp_path, data=opinions, worlds=[0], splits=splits)
    assert row(text, "cuma ÷ lora")[1:3] == ["held-out cells", "0.800 [0.700, 0.900]"]
    assert "cuma ÷ lora" not in text_of(tmp_path, worlds=[0])


def test_the_table_of_unseen_countries_says_that_field_encoders_do_not_know_them(tmp_path):
    opinions = {"source": "global_opinions", "path": "not-read.jsonl"}
    splits, note = ("held_out_cells", "held_out_countries"), "A field encoder doesn't know these countries"
    text = text_of(tmp_path, data=opinions, splits=splits, compare=[])
    assert text.count(note) == 1 and note in text.split("| SFT, held-out countries")[1]
    without = [{"method": "lora"}, {"method": "cuma", "name": "cuma", "encoder": "text"}]
    assert note not in text_of(
        tmp_path, data=opinions, splits=splits, compare=[], arms=without, text_encoder="none is loaded"
    )


def test_several_comparisons_come_with_a_word_on_chance(tmp_path):
    assert "by chance" not in text_of(tmp_path)
    assert row(text_of(tmp_path), "cuma ÷ lora")[2] == "0.800 [0.800, 0.800]"
    text = text_of(tmp_path, compare=[["cuma", "lora"], ["cuma", "marginal"]])
    assert "2 comparisons, each at 95 %: of those where nothing differs, about one in twenty" in text
