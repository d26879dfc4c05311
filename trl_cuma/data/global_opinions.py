# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
GlobalOpinionQA: how the people of a country answered a survey question, as a distribution over its options.

The file holds one JSON object per line:

    {"qid": "g01", "question": "…", "country": "Kenya", "options": ["Very good", …], "dist": [0.2, …], "sources": […]}

`options` stand in scale order. Country is the only attribute. The published rows are shares, not people: the people of
the returned survey are simulated, one per answer, which is drawn from the row's distribution.
"""

from __future__ import annotations

import itertools
from collections import Counter
from os import PathLike
from typing import Any

import numpy as np

from .global_opinions_source import read_jsonl
from .survey import Answers, Cells, Question, Survey, one_line

MIN_TRAINING_CELLS = 3
"""Training cells that every country and every question with a held-out cell keeps."""


def load_global_opinions(
    path: str | PathLike[str],
    *,
    seed: int = 0,
    answers_per_cell: int = 200,
    holdout: float = 0.2,
    validation: float = 0.1,
    min_countries: int = 6,
    max_questions: int | None = 100,
    holdout_countries: float = 0.0,
    holdout_questions: float = 0.0,
) -> Survey:
    """
    Load GlobalOpinionQA rows as a survey with held-out (question, country) cells.

    Cells are held out only while their country and their question keep at least three training cells, so a country
    with few rows is trained on and never evaluated. A row's distribution is taken as the truth of its cell.

    Whole countries and whole questions can be held out as well. The cells of held-out countries on the other questions
    are the split `"held_out_countries"`, those of held-out questions in the other countries `"held_out_questions"`;
    where both are held out, a cell is dropped. Of a held-out question nothing is known from training: its
    `training_marginal` is uniform.

    Args:
        path (`str` or `PathLike`): The JSONL file.
        seed (`int`): Seed of the split and of the sampled answers.
        answers_per_cell (`int`): Answers to draw per cell, each from a person of its own.
        holdout (`float`): Share of the cells to hold out for the final evaluation, split `"held_out_cells"`.
        validation (`float`): Share of the cells to hold out for choosing settings, split `"validation"`.
        min_countries (`int`): Leave out questions that were asked in fewer countries.
        max_questions (`int`, *optional*): Keep the questions on which countries differ most: those with the highest
            mutual information between country and answer, computed over the cells that are not held out as such or
            with their country. `None` keeps all.
        holdout_countries (`float`): Share of the countries to hold out.
        holdout_questions (`float`): Share of the kept questions to hold out.

    Returns:
        `Survey`: With splits `"train"`, `"validation"`, `"held_out_cells"` and, where asked for,
        `"held_out_countries"` and `"held_out_questions"`; `fields` is `("country",)`.

    Raises:
        `ValueError`: An argument is out of its range, no question has enough countries, or a row is malformed; the
            message names the file, the line and the field.
    """
    if answers_per_cell < 1:
        raise ValueError(f"`answers_per_cell` must be at least 1, got {answers_per_cell}.")
    if holdout <= 0 or validation <= 0 or holdout + validation >= 1:
        raise ValueError(
            f"`holdout` and `validation` must be positive shares with a sum below 1, got {holdout} and {validation}."
        )
    for name, share in (("holdout_countries", holdout_countries), ("holdout_questions", holdout_questions)):
        if not 0 <= share < 1:
            raise ValueError(f"`{name}` must be a share of at least 0 and below 1, got {share}.")
    rows = read_jsonl(path)
    num_countries = Counter(row["qid"] for row in rows)
    rows = [row for row in rows if num_countries[row["qid"]] >= min_countries]
    if not rows:
        raise ValueError(f"{path}: no question was asked in {min_countries} countries or more. Lower `min_countries`.")
    split_rng, answer_rng, whole_rng = np.random.default_rng(seed).spawn(3)
    countries = sorted({row["country"] for row in rows})
    away = set(whole_rng.permutation(countries)[: round(holdout_countries * len(countries))].tolist())
    at_home = [row for row in rows if row["country"] not in away]
    split = _split_cells(at_home, split_rng, holdout, validation)
    if max_questions is not None:
        at_home, split = _keep_most_divided(at_home, split, max_questions)
    kept = sorted({row["qid"] for row in at_home})
    unseen = set(whole_rng.permutation(kept)[: round(holdout_questions * len(kept))].tolist())
    split = np.where([row["qid"] in unseen for row in at_home], "held_out_questions", split)
    split = _return_cells(at_home, split)
    abroad = [row for row in rows if row["country"] in away and row["qid"] in set(kept) - unseen]
    rows = [*at_home, *abroad]
    split = np.concatenate([split, np.full(len(abroad), "held_out_countries", dtype=object)])
    # A country that is left with held-out questions only is as unknown as those that are held out.
    trained = {row["country"] for row, name in zip(rows, split, strict=True) if name == "train"}
    known = [name != "held_out_questions" or row["country"] in trained for row, name in zip(rows, split, strict=True)]
    rows, split = list(itertools.compress(rows, known)), split[known]

    # In the published data the wording of one question differs between rows by white space at most.
    questions = {
        row["qid"]: Question(row["qid"], one_line(row["question"]), tuple(map(one_line, row["options"])))
        for row in rows
    }
    question_index = {qid: index for index, qid in enumerate(questions)}
    country_index = {country: index for index, country in enumerate(sorted({row["country"] for row in rows}))}
    question = np.array([question_index[row["qid"]] for row in rows])
    profile = np.array([country_index[row["country"]] for row in rows])
    truth = np.zeros((len(rows), max(len(row["dist"]) for row in rows)))
    for index, row in enumerate(rows):
        truth[index, : len(row["dist"])] = row["dist"]
    truth /= truth.sum(1, keepdims=True)

    counts = answer_rng.multinomial(answers_per_cell, truth)  # (cells, options)
    cell = np.repeat(np.arange(len(rows)), answers_per_cell)
    choice = np.repeat(np.tile(np.arange(truth.shape[1]), len(rows)), counts.reshape(-1))
    answers, cells = {}, {}
    names = ["train", "validation", "held_out_cells"]
    names += ["held_out_countries"] * (holdout_countries > 0) + ["held_out_questions"] * (holdout_questions > 0)
    for name in names:
        in_split = split == name
        if not in_split.any():
            raise ValueError(
                f"{path}: no cell could be put into split {name!r}. Use more rows, a higher `max_questions` or "
                "a higher share."
            )
        people = np.flatnonzero(in_split[cell])
        answers[name] = Answers(people, question[cell[people]], profile[cell[people]], choice[people])
        if name != "train":
            cells[name] = Cells(question[in_split], profile[in_split], truth[in_split])
    profiles = [{"country": country} for country in country_index]
    return Survey(list(questions.values()), ("country",), profiles, answers, cells)


def _split_cells(
    rows: list[dict[str, Any]], rng: np.random.Generator, holdout: float, validation: float
) -> np.ndarray:
    """Walk the cells in random order; hold out what country and question can spare, until both shares are filled."""
    countries_left, questions_left = Counter(row["country"] for row in rows), Counter(row["qid"] for row in rows)
    wanted = ["held_out_cells"] * round(holdout * len(rows)) + ["validation"] * round(validation * len(rows))
    split = np.full(len(rows), "train", dtype=object)
    for index in rng.permutation(len(rows)):
        country, qid = rows[index]["country"], rows[index]["qid"]
        if wanted and min(countries_left[country], questions_left[qid]) > MIN_TRAINING_CELLS:
            split[index] = wanted.pop(0)
            countries_left[country] -= 1
            questions_left[qid] -= 1
    return split


def _keep_most_divided(
    rows: list[dict[str, Any]], split: np.ndarray, max_questions: int
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The questions whose *training* cells have the highest mutual information between country and answer."""
    training: dict[str, list[list[float]]] = {}
    for row, name in zip(rows, split, strict=True):
        if name == "train":
            training.setdefault(row["qid"], []).append(row["dist"])
    ranked = sorted(training, key=lambda qid: (-_mutual_information(np.array(training[qid])), qid))
    chosen = set(ranked[:max_questions])
    kept = [index for index, row in enumerate(rows) if row["qid"] in chosen]
    return [rows[index] for index in kept], split[kept]


def _return_cells(rows: list[dict[str, Any]], split: np.ndarray) -> np.ndarray:
    """Where a country has lost training cells with the questions that are gone, its held-out cells are trained on."""
    left = Counter(row["country"] for row, name in zip(rows, split, strict=True) if name == "train")
    too_few = np.array([left[row["country"]] < MIN_TRAINING_CELLS for row in rows])
    return np.where(too_few & (split != "held_out_questions"), "train", split)


def _mutual_information(dists: np.ndarray) -> float:
    """`H(mean_c p_c) - mean_c H(p_c)` in nats, countries `c` weighing the same; `dists`: `(countries, options)`."""

    def entropy(probs: np.ndarray) -> np.ndarray:
        return -(probs * np.log(np.where(probs > 0, probs, 1.0))).sum(-1)

    return float(entropy(dists.mean(0)) - entropy(dists).mean())
