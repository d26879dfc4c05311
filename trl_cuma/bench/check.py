# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Whether new worlds come out as published ones: `trl-cuma bench SUITE --check RESULTS --worlds …`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.metrics.intervals import prediction_interval
from .comparison import by_world
from .sources import PreparedData
from .suite import MARGINAL, Suite


@dataclass(frozen=True)
class Checked:
    """
    The headline metric (EMD; log-loss of prepared data) on one split of one new world: an arm's, or what a pair that
    the suite compares has of it, the first arm's ÷ the second's.

    Args:
        what (`str`), split (`str`), budget (`int`), world (`str`): Which.
        value (`float`): The new one.
        published (`float`), low (`float`), high (`float`): Mean of the published worlds (of ratios, the geometric
            one), and the 95 % prediction interval of one more.
    """

    what: str
    split: str
    budget: int
    world: str
    value: float
    published: float
    low: float
    high: float

    @property
    def inside(self) -> bool:
        return self.low <= self.value <= self.high


def read_published(path: Path, suite: Suite) -> dict[str, Any]:
    """
    Published results that the suite's worlds can be held against, which is known before these are trained in.

    Args:
        path (`Path`): The `results.json` of a finished suite.
        suite (`Suite`): With the worlds to check.

    Raises:
        `ValueError`: It is no such file, or an arm was not published, or in fewer than two worlds, or without a budget
            or a split of the suite; or one of the suite's worlds was published.
    """
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"`--check` {path} is no JSON: {error}") from None
    parts = published if isinstance(published, dict) else {}
    if not all(isinstance(parts.get(name), dict) for name in ("chosen", "sft")):
        raise ValueError(
            f"`--check` {path} is no results.json of a finished suite: it lacks the settings ('chosen') or the runs "
            "('sft')."
        )
    budgets = {str(factor * suite.training.steps) for factor in suite.training.factors}
    splits = suite.data.splits if isinstance(suite.data, PreparedData) else ()
    for arm in suite.arms:
        runs = published["sft"].get(arm.key, {})
        if len(runs) < 2 or arm.key not in published["chosen"]:
            raise ValueError(
                f"`--check` {path} has no two worlds of arm {arm.key!r}: nothing to check it by. Name others by "
                "`--arms`."
            )
        both = [world for world in suite.worlds if str(world) in runs]
        if both:
            raise ValueError(f"World {both[0]} is published: check by worlds that are not, with `--worlds`.")
        for run in runs.values():
            missing = [f"budget of {budget} steps" for budget in budgets - run["budgets"].keys()]
            for found in run["budgets"].values():
                missing += [f"split {split!r}" for split in splits if split not in found["splits"]]
            if missing:
                raise ValueError(f"`--check` {path} has no {missing[0]} of arm {arm.key!r}: it is of another suite.")
    return published


def check(suite: Suite, published: dict[str, Any], new: dict[str, Any]) -> list[Checked]:
    """
    Compare new worlds with published ones.

    Args:
        suite (`Suite`): The suite of both.
        published (`dict`): What [`read_published`] returned.
        new (`dict`): Results of the suite's worlds.
    """
    return list(_checked(suite, published, new))


def _checked(suite: Suite, published: dict[str, Any], new: dict[str, Any]) -> Iterator[Checked]:
    arms = [arm.key for arm in suite.arms]
    run = next(iter(new["sft"][arms[0]].values()))
    pairs = [pair for pair in suite.compare if MARGINAL not in pair]
    for what in [[arm] for arm in arms] + pairs:
        for budget, found in run["budgets"].items():
            for split in found["splits"]:
                before, after = (_values(suite, results, what, int(budget), split) for results in (published, new))
                values = np.array(list(before.values()))
                if len(what) == 1:
                    expected = prediction_interval(values)
                    numbers = expected.value, expected.low, expected.high
                else:  # ratios are symmetric as logarithms
                    expected = prediction_interval(np.log(values))
                    numbers = map(float, np.exp([expected.value, expected.low, expected.high]))
                mean, low, high = numbers
                for world, value in after.items():
                    yield Checked(" ÷ ".join(what), split, int(budget), world, value, mean, low, high)


def _values(suite: Suite, results: dict[str, Any], what: list[str], budget: int, split: str) -> dict[str, float]:
    """World → an arm's metric, or the ratio of two arms'."""
    first, *second = (by_world(results, arm, budget, split, suite.data.headline) for arm in what)
    return {world: value / second[0][world] for world, value in first.items()} if second else first


def table(suite: Suite, checked: list[Checked]) -> str:
    """In Markdown, with a last line that counts."""
    lines = [
        f"| {suite.data.headline.upper()} | split | steps | world | new | published | 95 % prediction interval | |",
        "|---|---|---:" + "|---:" * 4 + "|---|",
    ]
    lines += [
        f"| {one.what} | {one.split.replace('_', ' ')} | {one.budget} | {one.world} | {one.value:.4f} | "
        f"{one.published:.4f} | [{one.low:.4f}, {one.high:.4f}] | {'' if one.inside else 'outside'} |"
        for one in checked
    ]
    inside = sum(one.inside for one in checked)
    lines.append(f"\n{inside} of {len(checked)} inside; one in twenty falls outside by chance.")
    return "\n".join(lines) + "\n"
