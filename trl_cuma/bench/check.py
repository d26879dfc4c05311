# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Whether new worlds come out as published ones: `trl-cuma bench SUITE --check RESULTS --worlds …`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.metrics.intervals import prediction_interval
from .comparison import by_world
from .suite import Suite


@dataclass(frozen=True)
class Checked:
    """
    One arm's headline metric (EMD; log-loss of prepared data) on one split of one new world.

    Args:
        arm (`str`), split (`str`), budget (`int`), world (`str`): Which.
        value (`float`): The new one.
        published (`float`), low (`float`), high (`float`): Mean of the published worlds, and the 95 % prediction
            interval of one more.
    """

    arm: str
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


def check(suite: Suite, published: dict[str, Any], new: dict[str, Any]) -> list[Checked]:
    """
    Compare new worlds with published ones.

    Args:
        suite (`Suite`): The suite of both.
        published (`dict`), new (`dict`): Results; no world may be in both.

    Raises:
        `ValueError`: A world is in both, or an arm was not published, or in fewer than two worlds.
    """
    return list(_checked(suite, published, new))


def _checked(suite: Suite, published: dict[str, Any], new: dict[str, Any]) -> Iterator[Checked]:
    metric = suite.data.headline
    for arm in suite.arms:
        if len(published["sft"].get(arm.key, ())) < 2:
            raise ValueError(f"The published results have no two worlds of arm {arm.key!r}: nothing to check it by.")
        both = published["sft"][arm.key].keys() & new["sft"][arm.key].keys()
        if both:
            raise ValueError(f"World {min(both)} is published: check by worlds that are not, with `--worlds`.")
        run = next(iter(new["sft"][arm.key].values()))
        for budget, found in run["budgets"].items():
            for split in found["splits"]:
                before = np.array(list(by_world(published, arm.key, int(budget), split, metric).values()))
                expected = prediction_interval(before)
                for world, value in by_world(new, arm.key, int(budget), split, metric).items():
                    yield Checked(
                        arm.key, split, int(budget), world, value, expected.value, expected.low, expected.high
                    )


def table(suite: Suite, checked: list[Checked]) -> str:
    """In Markdown, with a last line that counts."""
    lines = [
        f"| {suite.data.headline.upper()} | split | steps | world | new | published | 95 % prediction interval | |",
        "|---|---|---:" + "|---:" * 4 + "|---|",
    ]
    lines += [
        f"| {one.arm} | {one.split.replace('_', ' ')} | {one.budget} | {one.world} | {one.value:.4f} | "
        f"{one.published:.4f} | [{one.low:.4f}, {one.high:.4f}] | {'' if one.inside else 'outside'} |"
        for one in checked
    ]
    inside = sum(one.inside for one in checked)
    lines.append(f"\n{inside} of {len(checked)} inside; one in twenty falls outside by chance.")
    return "\n".join(lines) + "\n"
