# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The rows of `speed.py`'s table, with paired ratios and what was to be reached, and the table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from speed_measure import Counts

GOALS = {  # key of an arm's goals → what it is, and whether the bound is the most that it should be
    "time": ("time", True),
    "saved": ("saved ÷ LoRA's", True),
    "saved_loop": ("saved ÷ loop's", True),
    "loop": ("loop's time ÷ ours", False),
    "rate": ("rate", False),
}


@dataclass
class Ratio:
    """Median and quartiles of the rounds' ratios."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"


def paired(numerators: Iterable[float], denominators: Iterable[float]) -> Ratio:
    """The median of the ratios of each round, not the ratio of medians: what both arms suffered cancels."""
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def result_rows(
    case: dict[str, str],
    goals: dict[str, dict[str, float]],
    times: dict[str, list[list[float]]],
    counts: dict[str, Counts],
    *,
    reference: str,
    rate: str | None = None,
    floors: dict[str, float] | None = None,
    tokens: int = 0,
    base: str = "frozen base",
    loop: str = "per-expert loop",
) -> list[dict[str, Any]]:
    """
    One row for each arm of a case.

    Args:
        case (`dict[str, str]`): columns that all rows share.
        goals (`dict[str, dict[str, float]]`): arm → its goals, by the keys of `GOALS`.
        times: what [`alternate`] returned.
        counts (`dict[str, Counts]`): arm → counts; empty where nothing was counted.
        reference (`str`): the arm that the others are divided by.
        rate (`str`, *optional*): the ratio is of this rate, the inverse of the time.
        floors (`dict[str, float]`, *optional*): arm → the least ratio of times, or largest of rates, where known.
        tokens (`int`): of a step; 0 where no activations were measured.
    """
    whole = {arm: [marks[-1] for marks in rounds] for arm, rounds in times.items()}
    saved = {arm: counted.saved - counts[base].saved for arm, counted in counts.items() if tokens}
    rows = []
    for arm, rounds in times.items():
        over, under = (reference, arm) if rate else (arm, reference)
        ratio = paired(whole[over], whole[under])
        row = dict(case, arm=arm, of=f"{rate or 'time'} ÷ {reference}", seconds=whole[arm], ratio=asdict(ratio))
        reached = {"time": ratio.median, "rate": ratio.median}
        if len(rounds[0]) == 2:
            forward = [[marks[0] for marks in times[name]] for name in (arm, reference)]
            row["forward"] = asdict(paired(*forward))
        if loop in times:
            reached["loop"] = paired(whole[loop], whole[arm]).median
        if arm in counts:
            mine = counts[arm]
            row |= {"ops": mine.ops, "waits": mine.waits, "kernels": mine.kernels, "peak_bytes": mine.peak}
            row |= {"flops": mine.flops, "flop_ratio": mine.flops / counts[reference].flops}
        if tokens:
            row["saved_bytes_per_token"] = saved[arm] / tokens
            reached |= {"saved": saved[arm] / saved[reference], "saved_loop": saved[arm] / saved[loop]}
        if arm in (floors or {}):
            row["floor"] = floors[arm]
        row["goals"] = [
            {"what": key, "bound": bound, "value": reached[key], "met": (reached[key] <= bound) == GOALS[key][1]}
            for key, bound in goals[arm].items()
        ]
        rows.append(row)
    return rows


def print_table(line: str, rows: list[dict[str, Any]], uncounted: set[str]) -> None:
    """The rows as one Markdown table, above it the line that says what they were made on."""
    columns = ["suite", "case", "arm", "ms", "ratio of", "ratio (quartiles)", "forward", "aten ops", "syncs"]
    launched = any(row.get("kernels") is not None for row in rows)
    columns += ["kernels"] if launched else []
    columns += ["saved KiB/token", "peak MiB", "GFLOP", "FLOP ratio", "floor", "target"]
    print(f"{line}\n\n| {' | '.join(columns)} |\n|---|---|---|---:|---|" + "---:|" * (len(columns) - 6) + "---|")
    for row in rows:
        cells = [row["suite"], row["case"], row["arm"], f"{statistics.median(row['seconds']) * 1000:.4g}", row["of"]]
        cells += [str(Ratio(**row["ratio"])), f"{row['forward']['median']:.3f}" if "forward" in row else "–"]
        cells += [_number(row.get(name), ".0f") for name in ("ops", "waits")]
        cells += [_number(row.get("kernels"), ".0f")] if launched else []
        cells.append(_number(row.get("saved_bytes_per_token"), ".2f", 2**10))
        cells += [_number(row.get("peak_bytes"), ".4g", 2**20), _number(row.get("flops"), ".4g", 1e9)]
        cells += [_number(row.get(name), ".3f") for name in ("flop_ratio", "floor")]
        cells.append("; ".join(_goal(**goal) for goal in row["goals"]))
        print(f"| {' | '.join(cells)} |")
    if uncounted:
        print(f"\nFLOPs leave out {', '.join(sorted(uncounted))}: no formula.")


def _number(value: float | None, form: str, unit: float = 1) -> str:
    return "–" if value is None else format(value / unit, form)


def _goal(what: str, bound: float, value: float, met: bool) -> str:
    name, at_most = GOALS[what]
    return f"{name} {'≤' if at_most else '≥'} {bound:g}: {'met' if met else '**missed**'} ({value:.3f})"
