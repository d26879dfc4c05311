# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The quick start: one command from nothing to a trained, measured CuMA adapter."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from ..evaluation.metrics import entropy
from ..evaluation.options import split_options
from ..extras import needs_extra
from .pipeline import Quickstart
from .report import dpo_table, draw_figures, expert_load, groups_of, router_names, sft_table
from .training import ARMS, load_trained, profile_vectors

__all__ = ["quiet", "run_quickstart", "tables_of"]


def run_quickstart(
    output_dir: str | Path,
    *,
    seed: int = 0,
    data: str | Path | None = None,
    encoder: str | None = None,
    rejected: str = "uniform",
    prepare_only: bool = False,
) -> dict[str, Any]:
    """
    Run the quick start and write `results.json`, `tables.md`, `figures/`, the base model, the data and the adapters to
    `output_dir`. See [`Quickstart`] for the arguments.

    Args:
        prepare_only (`bool`): stop after the base model and the data.

    Returns:
        `dict`: the results; empty with `prepare_only`.
    """
    if not prepare_only:
        with needs_extra("evaluation", "Drawing the figures"):  # before minutes of training
            import matplotlib  # noqa: F401
    quiet()
    torch.set_num_threads(min(2, os.cpu_count() or 1))  # the same sums on every machine, so that a seed gives a table
    run = Quickstart(output_dir, seed=seed, data=data, encoder=encoder, rejected=rejected)
    if prepare_only:
        run.prepare()
        print(f"Model and data are in {run.output_dir}.")
        return {}
    results = run.run()
    tables = tables_of([results], real=data is not None)
    (run.output_dir / "tables.md").write_text(tables)
    paths = _figures(run)
    print(f"\n{tables}")
    print("One seed: illustrative. Beating a LoRA that is not told the profile shows only that being told helps.")
    print(f"{results['seconds']:.0f} seconds. Tables, figures and adapters: {run.output_dir} ({len(paths)} figures).")
    return results


def tables_of(results: list[dict[str, Any]], *, real: bool) -> str:
    """The SFT and the DPO table of one or several runs."""
    fitted = "factor model, same answers" if real else "additive model, same answers"
    return f"{sft_table(results, fitted)}\n\n{dpo_table(results)}"


def _figures(run: Quickstart) -> list[Path]:
    split = list(run.cells)[-1]
    cells = run.cells[split]
    shown = [arm for arm in ARMS if arm.name in ("lora", "lora-prompt", "cuma")]
    predicted = {arm.label.split(",")[0] + (" + prompt" if arm.prompt_profile else ""): arm.name for arm in shown}
    cuma = next(arm for arm in ARMS if arm.is_cuma)
    model, tokenizer = load_trained(run.model_dir, run.output_dir / "sft" / cuma.name)
    vectors = profile_vectors(model, run.survey.profiles)
    load = {
        group: expert_load(model, tokenizer, run.survey, cells, rows, vectors)
        for group, rows in groups_of(run.survey, cells).items()
        if len(rows)
    }
    distributions = {
        (arm.name, stage): split_options(run.predictions[arm.name][f"{stage}/{split}"])[0]
        for arm in ARMS
        for stage in ("sft", "dpo")
    }
    return draw_figures(
        run.output_dir,
        run.survey,
        cells,
        {label: distributions[name, "sft"] for label, name in predicted.items()},
        load,
        router_names(model),
        {arm.label: tuple(entropy(distributions[arm.name, stage]) for stage in ("sft", "dpo")) for arm in ARMS},
    )


def quiet() -> None:
    """One bar per stage: the libraries' own bars and notes for their developers would bury the table."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
