# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Paired comparisons of two arms. The statistic is the log ratio of their mean EMD, exponentiated for tables: below 1 the
first arm is better, 0.8 is a fifth less. What is resampled is what a new study would draw anew: worlds of a
simulation, countries and questions of GlobalOpinionQA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation.metrics.cells import emd
from ..evaluation.metrics.intervals import bootstrap_interval, detectable_effect, sign_flip_test, t_interval
from ..evaluation.options import split_options
from .runner import SFTRun
from .suite import MARGINAL

if TYPE_CHECKING:
    from .runner import Runner
    from .world import World


@dataclass(frozen=True)
class Comparison:
    """
    The first arm's EMD over the second's.

    Args:
        ratio (`float`), low (`float`), high (`float`): The ratio and its 95 % interval.
        detectable (`float`): The ratio (below 1) that this many worlds, or clusters, find with 90 % power.
        sd (`float`, *optional*): Standard deviation of the log ratio between worlds.
        p (`float`, *optional*): Of the sign-flip test over worlds.
    """

    ratio: float
    low: float
    high: float
    detectable: float
    sd: float | None = None
    p: float | None = None

    @property
    def verdict(self) -> str:
        """In words; a claim needs the whole interval."""
        if self.high <= 0.8:
            return "better by a fifth"
        if self.high < 1:
            return "better"
        return "worse" if self.low > 1 else "no difference shown"


def emd_by_world(results: dict[str, Any], arm: str, budget: int, split: str) -> dict[str, float]:
    """World → an arm's mean EMD over a split's cells; `arm` may be `"marginal"`."""
    metric = "emd"
    if arm == MARGINAL:
        arm, metric = next(iter(results["sft"])), "emd_marginal"
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
    detectable = float(np.exp(-detectable_effect(sd, len(worlds)))) if sd > 0 else 1.0
    values = (float(np.exp(value)) for value in (mean.value, mean.low, mean.high))
    return Comparison(*values, detectable=detectable, sd=sd, p=sign_flip_test(ratios))


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
    # Half the interval as a normal standard error, of so many clusters
    sd = (found.high - found.low) / (2 * 1.96) * np.sqrt(found.n)
    detectable = float(np.exp(-detectable_effect(sd, found.n))) if sd > 0 else 1.0
    return Comparison(*(float(np.exp(value)) for value in (found.value, found.low, found.high)), detectable=detectable)


def _cell_emd(runner: Runner, world: World, results: dict[str, Any], arm: str, budget: int, split: str) -> np.ndarray:
    cells = world.cells[split]
    if arm == MARGINAL:
        probs = world.survey.training_marginal[cells.question]
    else:
        run = SFTRun(arm, world.seed, *results["chosen"][arm]["settings"], runner.longest)
        with np.load(runner.output_dir / run.folder / "predictions.npz") as predictions:
            probs, _ = split_options(predictions[f"{budget}/{split}"].astype(float))
    return emd(cells.truth, probs, world.survey.num_options[cells.question])
