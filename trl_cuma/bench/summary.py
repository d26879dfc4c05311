# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
A finished suite in tables: means over worlds with 95 % t intervals, and paired comparisons (`comparison.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..evaluation.metrics.intervals import Estimate, t_interval
from .comparison import Comparison, by_world, compare_answers, compare_cells, compare_worlds, detectable
from .runner import Runner
from .sources import PreparedData
from .suite import MARGINAL, Suite

SPLITS = {
    "held_out_people": "held-out people",
    "held_out_combinations": "held-out combinations",
    "held_out_questions": "held-out questions",
    "held_out_cells": "held-out cells",
    "held_out_countries": "held-out countries",
    "test_combinations": "test, held-out combinations",
    "test_countries": "test, held-out countries",
}


UNSEEN_QUESTIONS = "held_out_questions"  # of a survey: without training answers their marginal is uniform
UNSEEN_COUNTRIES = "held_out_countries"  # of GlobalOpinionQA, where the country is all that is known of a person


def tables(runner: Runner, results: dict[str, Any]) -> str:
    """All tables of a finished suite, in Markdown."""
    suite = runner.suite
    parts = [f"# {suite.name}", _protocol(suite), _tuning(suite, results)]
    baselines = results.get("baselines", {})
    for factor in suite.training.factors:
        budget = factor * suite.training.steps
        parts += [_split_table(suite, results, budget, split, baselines) for split in _splits(results)]
    for factor in suite.training.factors:
        budget = factor * suite.training.steps
        if suite.compare and isinstance(suite.data, PreparedData):
            parts.append(_differences(runner, results, budget))
        elif suite.compare and (suite.data.source != "simulated" or len(suite.worlds) > 1):
            parts.append(_comparisons(runner, results, budget))
    if "dpo" in results:
        parts += [_dpo(suite, results["dpo"], split) for split in _splits(results)]
    return "\n\n".join(parts) + "\n"


def _splits(results: dict[str, Any]) -> list[str]:
    run = next(iter(next(iter(results["sft"].values())).values()))
    return list(next(iter(run["budgets"].values()))["splits"])


def _scores_of_a_run(results: dict[str, Any], budget: int, split: str) -> dict[str, Any]:
    run = next(iter(next(iter(results["sft"].values())).values()))
    return run["budgets"][str(budget)]["splits"][split]


def _protocol(suite: Suite) -> str:
    worlds, tuning = suite.worlds, suite.tuning
    grid = len(tuning.learning_rates) * len(tuning.alphas)
    if isinstance(suite.data, PreparedData):
        return (
            f"Seeds of training: {_listed(worlds)}. Settings of every arm chosen from the same {grid} by the log-loss "
            f"of {suite.data.validation_answers:,} validation answers, with seed {_listed(tuning.worlds)}; steps by "
            f"the same, every {suite.training.select_every} up to the budget. Mean over seeds and its 95 % t "
            "interval, which is of the training alone: the comparisons resample people and questions. n/a: there are "
            "no training answers to a question."
        )
    both = [world for world in worlds if world in tuning.worlds]
    of_both = f" Settings were also chosen in {len(both)} of the {len(worlds)} reported worlds." if both else ""
    return (
        f"{len(worlds)} worlds ({_listed(worlds)}); settings of every arm chosen from the same {grid} by the log-loss "
        f"of validation answers in {'world' if len(tuning.worlds) == 1 else 'worlds'} {_listed(tuning.worlds)}; steps "
        f"chosen by the same, every {suite.training.select_every} up to the budget. Mean over worlds and its 95 % t "
        f"interval.{of_both}"
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
        edges = " and ".join(_edges(chosen))
        rows.append([arm.label, _matched(arm.matched), f"{rate:g}", f"{alpha:g}", edges, f"{least:.4f}"])
    return _table(["chosen settings", "matched", "learning rate", "α / r", "edge of the grid", "validation NLL"], rows)


def _edges(chosen: dict[str, Any]) -> list[str]:
    """Settings that were chosen at the end of their grid, beyond which a better one may be."""
    *grids, _ = zip(*chosen["grid"], strict=True)
    names = ("learning rate", "α")[: len(grids)]
    return [
        name
        for name, grid, value in zip(names, grids, chosen["settings"], strict=True)
        if len(set(grid)) > 1 and value in (min(grid), max(grid))
    ]


Metrics = list[tuple[str, Callable[[dict[str, float]], float], int]]  # heading, from a split's scores, digits

AGAINST_MARGINAL: Metrics = [
    ("KL explained ↑", lambda s: 1 - s["kl"] / s["kl_marginal"], 2),
    ("gap closed ↑", lambda s: 1 - s["emd"] / s["emd_marginal"], 2),
]
# Who knew a question's mean alone, and nothing of profiles, would explain much of the distance to a uniform answer.
NO_MARGINAL: Metrics = [(title, lambda s: None, digits) for title, _, digits in AGAINST_MARGINAL]
OF_SURVEYS, OF_UNSEEN_QUESTIONS = (
    [("EMD ↓", lambda s: s["emd"], 3), *of_marginal, ("accuracy ↑", lambda s: s["accuracy"], 3)]
    for of_marginal in (AGAINST_MARGINAL, NO_MARGINAL)
)
HEADINGS = {"nll": "log-loss ↓", "accuracy": "accuracy ↑", "emd": "EMD ↓", "kl": "KL ↓"}


def _of_prepared(scores: dict[str, Any], suffix: str = "") -> Metrics:
    names = [name for name in HEADINGS if name in scores]
    return [(HEADINGS[name], lambda s, name=name + suffix: s[name], 4 if name == "nll" else 3) for name in names]


def _split_table(suite: Suite, results: dict[str, Any], budget: int, split: str, baselines: dict[str, Any]) -> str:
    metrics, rows = OF_UNSEEN_QUESTIONS if split == UNSEEN_QUESTIONS else OF_SURVEYS, []
    if isinstance(suite.data, PreparedData):
        scores = _scores_of_a_run(results, budget, split)  # the marginal's are the same in all
        metrics = _of_prepared(scores)
        marginal = [_mean([read(scores)], digits) for _, read, digits in _of_prepared(scores, "_marginal")]
        rows.append(["training marginal", "", "", "", *marginal])
    for name, scores in baselines.items():
        values = [scores[str(world)][split] for world in suite.worlds if split in scores[str(world)]]
        if values:
            means = [_mean([read(v) for v in values], digits) for _, read, digits in metrics]
            rows.append([_reference(name, split), "", "", "", *means])
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
    header = [f"SFT, {_title(split)}, {budget} steps", "matched", "parameters", "steps"]
    table = _table([*header, *(title for title, _, _ in metrics)], rows)
    if split == UNSEEN_COUNTRIES and any(arm.of.reads_profiles and arm.encoder == "field" for arm in suite.arms):
        return (
            f"{table}\n\nA field encoder doesn't know these countries: unless the prompt names the country, an arm "
            "with one answers for nobody in particular."
        )
    if metrics is not OF_UNSEEN_QUESTIONS:
        return table
    return (
        f"{table}\n\nThere are no training answers to these questions: the reference is a uniform answer, and what is "
        "measured against a training marginal is n/a."
    )


def _comparisons(runner: Runner, results: dict[str, Any], budget: int) -> str:
    suite, rows = runner.suite, []
    for first, second in suite.compare:
        for split in _splits(results):
            if suite.data.source == "simulated":
                found = compare_worlds(*(by_world(results, arm, budget, split) for arm in (first, second)))
            else:
                found = compare_cells(runner, results, first, second, budget, split)
            rows.append(
                [
                    f"{_reference(first, split)} ÷ {_reference(second, split)}",
                    _title(split),
                    _ratio(found),
                    "" if found.p is None else f"{found.p:.3f}" if found.p >= 0.0005 else "<0.001",
                    "n/a" if found.detectable is None else f"{found.detectable:.2f}",
                    *([] if found.needed is None else [f"{found.needed}"]),
                    found.verdict,
                ]
            )
    unit = f"{len(suite.worlds)} worlds" if suite.data.source == "simulated" else "country × question resampled"
    header = [f"EMD ratio, {budget} steps, {unit}", "split", "ratio", "p", "detectable"]
    header += ["worlds for a fifth"] if suite.data.source == "simulated" else []
    return _table([*header, "verdict"], rows) + _by_chance(rows)


def _differences(runner: Runner, results: dict[str, Any], budget: int) -> str:
    """Of prepared data: on the same answers, averaged over seeds."""
    suite = runner.suite
    names = [name for name in HEADINGS if name in _scores_of_a_run(results, budget, _splits(results)[0])]
    rows, units = [], set()
    for first, second in suite.compare:
        for split in _splits(results):
            found = compare_answers(runner, results, first, second, budget, split)
            values = [_estimate(found[name][0]) if name in found else "n/a" for name in names]
            least, verdict = "n/a", "n/a"
            if "nll" in found:
                nll, unit = found["nll"]
                units.add(unit)
                if nll.low is not None:
                    least, verdict = f"{detectable(nll):.4f}", _verdict(nll)
            rows.append([f"{first} − {second}", _title(split), *values, least, verdict])
    title = ", ".join(
        [f"differences, {budget} steps, mean over seeds", *(f"{unit} resampled" for unit in sorted(units))]
    )
    header = [title, "split", *(HEADINGS[name] for name in names), "detectable", "log-loss is"]
    return _table(header, rows) + _by_chance(rows)


def _by_chance(rows: list[list[str]]) -> str:
    """What is to be kept in mind of a table with several verdicts, which are its last column."""
    verdicts = sum(row[-1] != "n/a" for row in rows)
    if verdicts < 2:
        return ""
    return (
        f"\n\n{verdicts} comparisons, each at 95 %: of those where nothing differs, about one in twenty shows a "
        "difference by chance."
    )


def _ratio(found: Comparison) -> str:
    if found.ratio is None or found.low is None:
        return "n/a" if found.ratio is None else f"{found.ratio:.3f}"
    return f"{found.ratio:.3f} [{found.low:.3f}, {found.high:.3f}]"


def _reference(name: str, split: str) -> str:
    """The name of a baseline, or of an arm: the marginal of questions that nobody answered in training is uniform."""
    return "uniform" if split == UNSEEN_QUESTIONS and name in (MARGINAL, "training marginal") else name


def _verdict(difference: Estimate) -> str:
    if difference.high < 0:
        return "better"
    return "worse" if difference.low > 0 else "no difference shown"


def _estimate(found: Estimate) -> str:
    if found.low is None:
        return "n/a" if found.value is None else f"{found.value:+.4f}"
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _dpo(suite: Suite, results: dict[str, Any], split: str) -> str:
    metrics = [("pair_log_loss", "pair log-loss ↓"), ("pair_accuracy", "pair accuracy ↑"), ("accuracy", "choice ↑")]
    rows = []
    for key, runs in results["arms"].items():
        values = [run["splits"][split] for run in runs.values()]
        chosen = results["chosen"][key]
        rate = f"{chosen['settings'][0]:g}{' (edge)' if _edges(chosen) else ''}"
        rows.append([suite.arm(key).label, rate, *(_mean([v[name] for v in values], 3) for name, _ in metrics)])
    return _table([f"DPO, {_title(split)}", "learning rate", *(title for _, title in metrics)], rows)


def _title(split: str) -> str:
    return SPLITS.get(split, split.replace("_", " "))


def _mean(values: Sequence[float | None], digits: int) -> str:
    if None in values:
        return "n/a"
    found: Estimate = t_interval(np.array(values))
    if found.low is None:
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def _matched(matched: str) -> str:
    return "" if matched == "none" else matched


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * 2 + "|---:" * (len(header) - 2) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])
