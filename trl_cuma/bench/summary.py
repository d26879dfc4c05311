# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
A finished suite in tables: means over worlds with 95 % t intervals, and paired comparisons (`comparison.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..evaluation.metrics.intervals import Estimate, t_interval
from .comparison import compare_cells, compare_worlds, emd_by_world
from .runner import Runner
from .suite import Suite

SPLITS = {
    "held_out_people": "held-out people",
    "held_out_combinations": "held-out combinations",
    "held_out_questions": "held-out questions",
    "held_out_cells": "held-out cells",
    "held_out_countries": "held-out countries",
}


def tables(runner: Runner, results: dict[str, Any]) -> str:
    """All tables of a finished suite, in Markdown."""
    suite = runner.suite
    parts = [f"# {suite.name}", _protocol(suite), _tuning(suite, results)]
    baselines = results.get("baselines", {})
    for factor in suite.training.factors:
        budget = factor * suite.training.steps
        parts += [_split_table(suite, results, budget, split, baselines) for split in _splits(results)]
    for factor in suite.training.factors:
        if suite.compare and len(suite.worlds) > 1:
            parts.append(_comparisons(runner, results, factor * suite.training.steps))
    if "dpo" in results:
        parts += [_dpo(suite, results["dpo"], split) for split in _splits(results)]
    return "\n\n".join(parts) + "\n"


def _splits(results: dict[str, Any]) -> list[str]:
    run = next(iter(next(iter(results["sft"].values())).values()))
    return list(next(iter(run["budgets"].values()))["splits"])


def _protocol(suite: Suite) -> str:
    worlds, tuning = suite.worlds, suite.tuning
    grid = len(tuning.learning_rates) * len(tuning.alphas)
    return (
        f"{len(worlds)} worlds ({_listed(worlds)}); settings of every arm chosen from the same {grid} by the log-loss "
        f"of validation answers in {'world' if len(tuning.worlds) == 1 else 'worlds'} {_listed(tuning.worlds)}; steps "
        f"chosen by the same, every {suite.training.select_every} up to the budget. Mean over worlds and its 95 % t "
        "interval."
    )


def _listed(values: tuple[int, ...]) -> str:
    if len(values) > 2 and list(values) == list(range(values[0], values[-1] + 1)):
        return f"{values[0]} to {values[-1]}"
    return ", ".join(map(str, values))


def _tuning(suite: Suite, results: dict[str, Any]) -> str:
    rows = []
    for arm in suite.arms:
        chosen = results["chosen"][arm.key]
        rate, alpha = chosen["settings"]
        least = min(chosen["grid"], key=lambda point: point[-1])[-1]
        edge = "yes" if chosen["at_the_edge"] else ""
        rows.append([arm.label, _matched(arm.matched), f"{rate:g}", f"{alpha:g}", edge, f"{least:.4f}"])
    return _table(["chosen settings", "matched", "learning rate", "α / r", "edge of the grid", "validation NLL"], rows)


def _split_table(suite: Suite, results: dict[str, Any], budget: int, split: str, baselines: dict[str, Any]) -> str:
    metrics: list[tuple[str, Callable[[dict[str, float]], float], int]] = [
        ("EMD ↓", lambda s: s["emd"], 3),
        ("KL explained ↑", lambda s: 1 - s["kl"] / s["kl_marginal"], 2),
        ("gap closed ↑", lambda s: 1 - s["emd"] / s["emd_marginal"], 2),
        ("accuracy ↑", lambda s: s["accuracy"], 3),
    ]
    rows = []
    for name, by_world in baselines.items():
        values = [by_world[str(world)][split] for world in suite.worlds if split in by_world[str(world)]]
        if values:
            rows.append([name, "", "", ""] + [_mean([read(v) for v in values], digits) for _, read, digits in metrics])
    for arm in suite.arms:
        runs = results["sft"][arm.key]
        budgets = [run["budgets"][str(budget)] for run in runs.values()]
        values = [one["splits"][split] for one in budgets]
        parameters = next(iter(runs.values()))["parameters"]
        steps = f"{np.mean([one['steps'] for one in budgets]):.0f}"
        rows.append(
            [arm.label, _matched(arm.matched), f"{parameters:,}", steps]
            + [_mean([read(v) for v in values], digits) for _, read, digits in metrics]
        )
    header = [f"SFT, {SPLITS[split]}, {budget} steps", "matched", "parameters", "steps"]
    return _table([*header, *(title for title, _, _ in metrics)], rows)


def _comparisons(runner: Runner, results: dict[str, Any], budget: int) -> str:
    suite, rows = runner.suite, []
    for first, second in suite.compare:
        for split in _splits(results):
            if suite.data.source == "simulated":
                found = compare_worlds(*(emd_by_world(results, arm, budget, split) for arm in (first, second)))
            else:
                found = compare_cells(runner, results, first, second, budget, split)
            rows.append(
                [
                    f"{first} ÷ {second}",
                    SPLITS[split],
                    f"{found.ratio:.3f} [{found.low:.3f}, {found.high:.3f}]",
                    "" if found.p is None else f"{found.p:.3f}",
                    f"{found.detectable:.2f}",
                    found.verdict,
                ]
            )
    unit = f"{len(suite.worlds)} worlds" if suite.data.source == "simulated" else "country × question resampled"
    return _table([f"EMD ratio, {budget} steps, {unit}", "split", "ratio", "p", "detectable", "verdict"], rows)


def _dpo(suite: Suite, results: dict[str, Any], split: str) -> str:
    metrics = [("pair_log_loss", "pair log-loss ↓"), ("pair_accuracy", "pair accuracy ↑"), ("accuracy", "choice ↑")]
    rows = []
    for key, runs in results["arms"].items():
        values = [run["splits"][split] for run in runs.values()]
        chosen = results["chosen"][key]
        rate = f"{chosen['settings'][0]:g}{' (edge)' if chosen['at_the_edge'] else ''}"
        rows.append([suite.arm(key).label, rate, *(_mean([v[name] for v in values], 3) for name, _ in metrics)])
    return _table([f"DPO, {SPLITS[split]}", "learning rate", *(title for _, title in metrics)], rows)


def _mean(values: list[float], digits: int) -> str:
    found: Estimate = t_interval(np.array(values))
    if found.low is None:
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def _matched(matched: str) -> str:
    return "" if matched == "none" else matched


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * 2 + "|---:" * (len(header) - 2) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
