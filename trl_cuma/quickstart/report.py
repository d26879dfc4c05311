# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The quick start's tables (Markdown) and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..adapter.router import CuMARouter
from ..data.survey import Cells, Survey, format_prompt
from ..extras import needs_extra

SPLIT_NAMES = {
    "held_out_people": "held-out people",
    "held_out_combinations": "held-out combinations",
    "held_out_cells": "held-out question-country cells",
}
BASELINE_NAMES = {"marginal": "training marginal", "oracle": "oracle (truth)"}


def sft_table(results: Sequence[Mapping[str, Any]], fitted_name: str) -> str:
    """One row per arm and baseline, one block per split; over several runs the mean ± standard deviation."""
    first = results[0]["sft"]
    splits = list(next(iter(first["baselines"].values())))
    metrics = [
        ("emd", "EMD ↓", 3),
        ("kl", "KL ↓", 3),
        ("accuracy", "accuracy ↑", 3),
        ("gap_closed", "gap closed ↑", 2),
    ]
    metrics.append(("outside", "outside ↓", 4))
    blocks = []
    for split in splits:
        lines = _header([f"SFT, {SPLIT_NAMES[split]}", "parameters", *(title for _, title, _ in metrics)])
        names = {**BASELINE_NAMES, "fitted": fitted_name}
        for key in ("marginal", "fitted"):
            lines.append(_row(results, ("sft", "baselines", key, split), names[key], "", metrics))
        for key, arm in first["arms"].items():
            lines.append(_row(results, ("sft", "arms", key, split), arm["label"], f"{arm['parameters']:,}", metrics))
        lines.append(_row(results, ("sft", "baselines", "oracle", split), names["oracle"], "", metrics))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def dpo_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Preference metrics; EMD and entropy are shown beside them and never ranked."""
    first = results[0]["dpo"]
    metrics = [
        ("pair_log_loss", "pair log-loss ↓", 3),
        ("pair_accuracy", "pair accuracy ↑", 3),
        ("accuracy", "choice accuracy ↑", 3),
        ("emd", "EMD *", 3),
        ("entropy", "entropy, nats *", 2),
    ]
    blocks = []
    for split in first["oracle"]:
        lines = _header([f"DPO, {SPLIT_NAMES[split]}", *(title for _, title, _ in metrics)])
        for key, arm in first["arms"].items():
            lines.append(_row(results, ("dpo", "arms", key, split), arm["label"], None, metrics))
        lines.append(_row(results, ("dpo", "oracle", split), "oracle (uniform pairs)", None, metrics))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n\n\\* sharpened by the objective: DPO's optimum is π_ref · p^(1/β). Not ranked.\n"


def _header(titles: list[str]) -> list[str]:
    return ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]


def _row(
    results: Sequence[Mapping[str, Any]],
    path: tuple[str, ...],
    label: str,
    parameters: str | None,
    metrics: list[tuple[str, str, int]],
) -> str:
    cells = [label] if parameters is None else [label, parameters]
    for metric, _, digits in metrics:
        values = []
        for result in results:
            node: Any = result
            for key in path:
                node = node[key]
            if metric in node:
                values.append(node[metric])
        if not values:
            cells.append("")
        elif len(values) == 1:
            cells.append(f"{values[0]:.{digits}f}")
        else:
            cells.append(f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}")
    return "| " + " | ".join(cells) + " |"


def groups_of(survey: Survey, cells: Cells, limit: int = 4) -> dict[str, np.ndarray]:
    """
    Group name → the rows of `cells` that belong to it: a simulated profile's most likely latent group, or the
    countries with the most cells.
    """
    if survey.group_probs is not None:
        group = np.nan_to_num(survey.group_probs[cells.profile]).argmax(1)
        return {f"group {index + 1}": np.flatnonzero(group == index) for index in range(survey.group_probs.shape[1])}
    profile, count = np.unique(cells.profile, return_counts=True)
    largest = profile[np.argsort(-count, kind="stable")[:limit]]
    return {survey.profiles[index]["country"]: np.flatnonzero(cells.profile == index) for index in largest}


@torch.no_grad()
def expert_load(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    survey: Survey,
    cells: Cells,
    rows: np.ndarray,
    vectors: torch.Tensor,
    limit: int = 128,
) -> np.ndarray:
    """Share of the assignments that each expert gets, `(routers, experts)`, over some of a group's cells."""
    rows = rows[:limit]
    prompts = [format_prompt(survey.questions[index]) for index in cells.question[rows]]
    inputs = tokenizer(prompts, padding=True, return_tensors="pt", add_special_tokens=False)
    output = model(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        demographic_embeds=vectors[cells.profile[rows]],
        output_router_losses="local",
    )
    return output["router_load"].numpy()


def router_names(model: torch.nn.Module) -> list[str]:
    """`layer.module` of each router, in the order of `expert_load`."""
    keys = [key.split(".") for key, module in model.named_modules() if isinstance(module, CuMARouter)]
    return [f"{key[key.index('layers') + 1]}.{key[-3]}" for key in keys]


def draw_figures(
    output_dir: Path,
    survey: Survey,
    cells: Cells,
    predicted: Mapping[str, np.ndarray],
    load: Mapping[str, np.ndarray],
    routers: Sequence[str],
    before_after: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> list[Path]:
    """
    Draw predicted against true distributions, expert use, and sharpening.

    Args:
        output_dir (`Path`): where `figures/` goes.
        survey, cells: what was evaluated.
        predicted (`dict`): arm label → option distributions `(cells, max_options)`.
        load (`dict`): group → expert load `(routers, experts)`.
        routers (`Sequence[str]`): the routers' names.
        before_after (`dict`): arm label → entropies `(cells,)` after SFT and after DPO.

    Raises:
        ImportError: without matplotlib, of the `evaluation` extra.
    """
    with needs_extra("evaluation", "Drawing the figures"):
        import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder = output_dir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "distributions.png", folder / "experts.png", folder / "sharpening.png"]

    panels = _panels(survey, cells)
    columns = 4
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.1 * columns, 2.5 * lines), squeeze=False)
    for axis, (title, rows) in zip(axes.flat, panels, strict=False):
        question = cells.question[rows[0]]
        options = np.arange(survey.num_options[question])
        axis.bar(options, cells.truth[rows].mean(0)[options], color="0.82", label="truth")
        axis.plot(options, survey.training_marginal[question][options], ":", color="0.35", label="training marginal")
        for marker, (label, probs) in zip("os^D", predicted.items(), strict=False):
            axis.plot(options, probs[rows].mean(0)[options], marker + "-", ms=4, label=label)
        axis.set_xticks(options, [str(option + 1) for option in options])
        axis.set_title(title, fontsize=9)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("probability")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=9, frameon=False)
    figure.suptitle("Answers after SFT, by option")
    figure.tight_layout(rect=(0, 0.05, 1, 0.98))
    figure.savefig(paths[0], dpi=120)
    plt.close(figure)

    figure, axes = plt.subplots(
        1, len(load), figsize=(3.1 * len(load), 3.2), squeeze=False, sharey=True, layout="constrained"
    )
    for axis, (group, shares) in zip(axes.flat, load.items(), strict=True):
        image = axis.imshow(shares, aspect="auto", vmin=0, vmax=0.5, cmap="viridis")
        axis.set_title(group, fontsize=10)
        axis.set_xlabel("expert")
        axis.set_xticks(range(shares.shape[1]), [str(expert + 1) for expert in range(shares.shape[1])])
    axes[0, 0].set_yticks(range(len(routers)), routers, fontsize=8)
    figure.suptitle("Expert use after SFT: share of assignments, by group")
    figure.colorbar(image, ax=axes.ravel().tolist(), shrink=0.8)
    figure.savefig(paths[1], dpi=120)
    plt.close(figure)

    figure, axis = plt.subplots(figsize=(7, 3.6))
    truth = -(cells.truth * np.log(np.where(cells.truth > 0, cells.truth, 1))).sum(1)
    positions = np.arange(len(before_after))
    for offset, (name, index) in enumerate((("SFT", 0), ("DPO", 1))):
        means = [pair[index].mean() for pair in before_after.values()]
        axis.bar(positions + 0.38 * offset - 0.19, means, width=0.36, label=f"after {name}")
    axis.axhline(truth.mean(), color="k", ls="--", lw=1, label="truth")
    axis.set_xticks(positions, [label.replace(", ", ",\n") for label in before_after], fontsize=7)
    axis.set_ylabel("mean entropy of the answers, nats")
    axis.set_title("Sharpening from SFT to DPO", fontsize=11)
    axis.set_ylim(0, 1.2 * axis.get_ylim()[1])
    axis.legend(fontsize=8, ncols=3, loc="upper center")
    figure.tight_layout()
    figure.savefig(paths[2], dpi=120)
    plt.close(figure)
    return paths


def _panels(survey: Survey, cells: Cells) -> list[tuple[str, np.ndarray]]:
    """
    What the first figure shows, title and rows of `cells`. Of a simulated survey: the two questions on which the
    groups differ most and a consensus question, each for every latent group (mean over its profiles). Of a real one:
    eight cells, each the farthest from its question's mean.
    """
    if survey.group_probs is None:
        distance = np.abs(cells.truth - survey.training_marginal[cells.question]).sum(1)
        order = np.argsort(-distance, kind="stable")
        _, first = np.unique(cells.question[order], return_index=True)  # each question once
        shown = order[np.sort(first)[:8]]
        return [
            (
                f"{survey.profiles[cells.profile[row]]['country']}, {_short(survey, cells.question[row])}",
                np.array([row]),
            )
            for row in shown
        ]
    groups = groups_of(survey, cells)
    members = {
        question: [rows[cells.question[rows] == question] for rows in groups.values()]
        for question in np.unique(cells.question).tolist()
    }
    members = {question: rows for question, rows in members.items() if all(len(some) for some in rows)}
    spread = {q: np.stack([cells.truth[some].mean(0) for some in rows]).std(0).sum() for q, rows in members.items()}
    ranked = sorted(members, key=spread.__getitem__, reverse=True)
    divided = [question for question in ranked if not survey.questions[question].consensus]
    agreed = [question for question in ranked if survey.questions[question].consensus]
    return [
        (f"{group}, {_short(survey, question)}{' (consensus)' if survey.questions[question].consensus else ''}", rows)
        for question in divided[:2] + agreed[:1]
        for group, rows in zip(groups, members[question], strict=True)
    ]


def _short(survey: Survey, question: int) -> str:
    return f"question {survey.questions[question].question_id[:12]}"
