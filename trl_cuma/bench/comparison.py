# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Paired comparisons of two arms. The statistic is the log ratio of their mean EMD, exponentiated for tables: below 1 the
first arm is better, 0.8 is a fifth less. What is resampled is what a new study would draw anew: worlds of a
simulation, countries and questions of GlobalOpinionQA, people and questions of prepared data; there it is the
difference in log-loss, which says more than a ratio of two numbers that share what nobody could know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.cell_scores import Scores, measure
from ..evaluation.metrics.cells import emd
from ..evaluation.metrics.intervals import (
    Estimate,
    bootstrap_interval,
    detectable_effect,
    sign_flip_test,
    t_interval,
    worlds_needed,
)
from ..evaluation.options import split_options
from .runner import SFTRun
from .suite import MARGINAL

if TYPE_CHECKING:
    from .runner import Runner
    from .survey_world import SurveyWorld


FIFTH = 0.8
"""Ratio from which an arm is called better by a fifth."""


@dataclass(frozen=True)
class Comparison:
    """
    The first arm's EMD over the second's.

    Args:
        ratio (`float`), low (`float`, *optional*), high (`float`, *optional*): The ratio and its 95 % interval; none
            of too few countries or questions.
        detectable (`float`, *optional*): The ratio (below 1) that this many worlds, or clusters, find with 90 % power.
        sd (`float`, *optional*): Standard deviation of the log ratio between worlds.
        p (`float`, *optional*): Of the sign-flip test over worlds.
        needed (`int`, *optional*): Worlds of this spread that find a ratio of `FIFTH` with 90 % power.
    """

    ratio: float | None
    low: float | None
    high: float | None
    detectable: float | None
    sd: float | None = None
    p: float | None = None
    needed: int | None = None

    @property
    def verdict(self) -> str:
        """In words; a claim needs the whole interval."""
        if self.low is None or self.high is None:
            return "n/a"
        if self.high <= FIFTH:
            return "better by a fifth"
        if self.high < 1:
            return "better"
        return "worse" if self.low > 1 else "no difference shown"


def by_world(results: dict[str, Any], arm: str, budget: int, split: str, metric: str = "emd") -> dict[str, float]:
    """World → an arm's mean of a metric over a split; `arm` may be `"marginal"`."""
    if arm == MARGINAL:
        arm, metric = next(iter(results["sft"])), f"{metric}_marginal"
    return {world: run["budgets"][str(budget)]["splits"][split][metric] for world, run in results["sft"][arm].items()}


def compare_worlds(first: dict[str, float], second: dict[str, float]) -> Comparison:
    """
    Mean over worlds of the log ratio, with its t interval and a sign-flip test.

    Args:
        first, second (`dict[str, float]`): World → EMD; the worlds of both are compared.

    Raises:
        `ValueError`: They share fewer than two worlds.
    """
    worlds = sorted(first.keys() & second.keys(), key=int)
    if len(worlds) < 2:
        raise ValueError(f"A comparison needs at least 2 worlds, the two arms share {len(worlds)}.")
    ratios = np.array([np.log(first[world] / second[world]) for world in worlds])
    mean, sd = t_interval(ratios), float(ratios.std(ddof=1))
    least = float(np.exp(-detectable_effect(sd, len(worlds)))) if sd > 0 else 1.0
    values = (float(np.exp(value)) for value in (mean.value, mean.low, mean.high))
    needed = worlds_needed(sd, np.log(FIFTH))
    return Comparison(*values, detectable=least, sd=sd, p=sign_flip_test(ratios), needed=needed)


def compare_cells(
    runner: Runner, results: dict[str, Any], first: str, second: str, budget: int, split: str
) -> Comparison:
    """
    Ratio of the means over all worlds' cells; countries and questions are resampled, crossed. A world is here only a
    split of the same data, so that worlds are no sample of anything.

    Args:
        runner (`Runner`): Of a finished suite.
        results (`dict`): What it returned.
        first, second (`str`): Keys of the arms; `"marginal"` for the training marginal.
        budget (`int`), split (`str`): Which predictions.

    Returns:
        [`Comparison`]: Without an interval where there are fewer than five countries, or questions.
    """
    values, question, country = [], [], []
    for seed in runner.suite.worlds:
        world = runner.world(seed)
        cells = world.cells[split]
        values.append(np.stack([_cell_emd(runner, world, results, arm, budget, split) for arm in (first, second)], 1))
        question += [world.survey.questions[index].question_id for index in cells.question]
        country += [world.survey.profiles[index]["country"] for index in cells.profile]
    clusters = [np.array(question), np.array(country)]
    found = bootstrap_interval(np.concatenate(values), clusters, lambda a, b: np.log(a / b))
    ratio = (None if value is None else float(np.exp(value)) for value in (found.value, found.low, found.high))
    return Comparison(*ratio, detectable=None if found.low is None else float(np.exp(-detectable(found))))


def detectable(found: Estimate) -> float:
    """The effect that as many clusters find with 90 % power: half the interval is taken as 1.96 standard errors."""
    sd = (found.high - found.low) / (2 * 1.96) * np.sqrt(found.n)
    return detectable_effect(sd, found.n) if sd > 0 else 0.0


def compare_answers(
    runner: Runner, results: dict[str, Any], first: str, second: str, budget: int, split: str
) -> dict[str, tuple[Estimate, str]]:
    """
    Differences of two arms on the same answers, averaged over the worlds, which are seeds of training; people and
    questions are resampled, crossed.

    Args:
        runner, results, first, second, budget, split: As for [`compare_cells`].

    Returns:
        `dict`: Metric (`nll`, `accuracy`, and `emd` and `kl` of rows with distributions) → the first arm's less the
        second's, and what was resampled. Without those that there are no numbers for, as of questions without training
        answers against the marginal.
    """
    runs = {arm: _answer_scores(runner, results, arm, budget, split) for arm in {first, second} - {MARGINAL}}
    # An arm whose prompts are longer may have lost rows to the model's context.
    rows = reduce(np.intersect1d, [each.columns["row"] for scores in runs.values() for each in scores])
    own, other = (
        _over_worlds(next(iter(runs.values())) if arm == MARGINAL else runs[arm], rows, arm == MARGINAL)
        for arm in (first, second)
    )
    table = "cells" if "emd" in own.columns else "answers"
    found = {name: measure(name, {table: own}, {table: other}) for name in own.columns}
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def _answer_scores(runner: Runner, results: dict[str, Any], arm: str, budget: int, split: str) -> list[Scores]:
    """An arm's scores of each answer, one per world."""
    found = []
    for world in runner.suite.worlds:
        run = SFTRun(arm, world, *results["chosen"][arm]["settings"], runner.longest)
        with np.load(runner.output_dir / run.folder / "predictions.npz", allow_pickle=False) as arrays:
            found.append(Scores.from_arrays(arrays, f"{budget}/{split}"))
    return found


def _over_worlds(scores: Sequence[Scores], rows: np.ndarray, of_marginal: bool) -> Scores:
    """Mean scores of some rows, an arm's or the training marginal's."""
    suffix = "_marginal" if of_marginal else ""
    taken = [np.searchsorted(each.columns["row"], rows) for each in scores]
    first, places = scores[0], taken[0]
    columns = {
        name: np.mean([each.columns[name + suffix][take] for each, take in zip(scores, taken, strict=True)], axis=0)
        for name in ("nll", "accuracy", "emd", "kl")
        if name in first.columns
    }
    clusters = (first.clusters[0][places], first.clusters[1][places])
    return replace(first, columns=columns, clusters=clusters, weights=first.weights[places])


def _cell_emd(
    runner: Runner, world: SurveyWorld, results: dict[str, Any], arm: str, budget: int, split: str
) -> np.ndarray:
    cells = world.cells[split]
    if arm == MARGINAL:
        probs = world.survey.training_marginal[cells.question]
    else:
        run = SFTRun(arm, world.seed, *results["chosen"][arm]["settings"], runner.longest)
        with np.load(runner.output_dir / run.folder / "predictions.npz") as predictions:
            probs, _ = split_options(predictions[f"{budget}/{split}"].astype(float))
    return emd(cells.truth, probs, world.survey.num_options[cells.question])
