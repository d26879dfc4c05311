# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The report of an evaluation: JSON, a page of Markdown tables, and an HTML page with figures."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from . import figures, tables
from .answers import answers_tables
from .maps import topology_drawings
from .output import check_output_dir, write_folder
from .page import Section, render_page
from .text import clean, number, people_known

__all__ = ["VERSION", "check_output_dir", "plain", "write_report"]

VERSION = 1

TOPOLOGY = "Topology: which experts serve whom"

NEUTRAL = "Prompts that no profile has a bearing on. How much do profiles change their answers? Ideally not at all."

OWN_CHOICES = (
    "Held-out people were shown several answers and chose one. Does the model, given the prompt and what it is told "
    "of the person, find likelier what they chose? No judge stands between."
)


def write_report(
    evaluation: Mapping[str, Any],
    output_dir: str | os.PathLike[str],
    cells: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """
    Write an evaluation as `evaluation.json`, `tables.md` and `report.html`, all or none, readable by the owner alone.
    The same evaluation gives the same files.

    Args:
        evaluation (`Mapping`): `version`, `model` and `splits`, and where known `min_group_size`, `neutral`,
            `generation`, `topology` (or `topology_note`, why there is none) and `training`. What is not a number
            becomes `null`.
        output_dir (`str` or `PathLike`): A folder that is not there yet, or is empty.
        cells (`Mapping[str, np.ndarray]`, *optional*): Numbers per cell, for `cells.npz`, which `trl-cuma compare`
            reads.

    Returns:
        `Path`: The folder.

    Raises:
        `FileExistsError`: Something is in `output_dir`.
        `ImportError`: matplotlib is not there.
        `ValueError`: The evaluation is of another version.
    """
    if evaluation.get("version") != VERSION:
        raise ValueError(f"`version` of the evaluation is {evaluation.get('version')!r}, expected {VERSION}.")
    evaluation = plain(evaluation)
    sections = _sections(evaluation)
    title, facts = _title(evaluation["model"]), _facts(evaluation["model"])
    footer = (
        "Intervals are 95 %, from resampling whole clusters (people and questions, or countries and questions), where "
        "nothing else is said. The training marginal is of the training answers. Written by trl_cuma."
    )
    files = {
        "evaluation.json": json.dumps(evaluation, indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        "tables.md": _markdown(title, facts, sections, footer),
        "report.html": render_page(title, facts, sections, footer),
    }
    written = {name: text.encode() for name, text in files.items()}
    if cells is not None:
        stream = io.BytesIO()
        np.savez_compressed(stream, **cells)
        written["cells.npz"] = stream.getvalue()
    return write_folder(written, output_dir)


def plain(value: Any) -> Any:
    """JSON's own types: arrays as lists, numpy's numbers as Python's, and `None` for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sections(evaluation: Mapping[str, Any]) -> list[Section]:
    splits, least = evaluation["splits"], evaluation.get("min_group_size")
    generation = evaluation.get("generation") or {}
    own = generation.get("own_choices") or {}
    summaries = [tables.summary_table(splits)] if splits else []
    summaries += [tables.own_choices_summary(own)] if own else []
    sections = [Section("Summary", summaries)] if summaries else []
    sections += [_split_section(name, split, least) for name, split in splits.items()]
    if evaluation.get("neutral"):
        sections.append(Section("Neutral prompts", [tables.neutral_table(evaluation["neutral"])], text=NEUTRAL))
    if own:
        shown = [table for name, entry in own.items() for table in tables.own_choices_tables(name, entry)]
        sections.append(Section("People's own choices", shown, text=OWN_CHOICES))
    sections += [_answers_section(name, entry) for name, entry in (generation.get("answers") or {}).items()]
    if evaluation.get("topology"):
        topology = evaluation["topology"]
        groups, *others = tables.topology_tables(topology, least)
        sections.append(Section(TOPOLOGY, others, topology_drawings(topology), [groups]))
    elif note := evaluation.get("topology_note"):
        sections.append(Section(TOPOLOGY, text=f"There is none. {clean(note)}"))
    log = (evaluation.get("training") or {}).get("log_history")
    if log and (drawing := figures.training("training", log)):
        sections.append(Section("Training", drawings=[drawing]))
    return sections


def _split_section(name: str, split: Mapping[str, Any], least: int | None) -> Section:
    shown, drawings, details = [], [], []
    counts = split.get("counts") or {}
    unit = "people" if people_known(counts) else "profiles"
    least = 0 if counts.get("answers") == 0 else least
    if counts:
        shown.append(tables.counts_table(counts))
        shown.append(tables.bad_rows_table(counts.get("bad_rows") or {}, counts.get("rows")))
    if split.get("metrics"):
        shown.append(tables.metrics_table(split["metrics"]))
    if split.get("inequity"):
        shown.append(tables.inequity_table(split["inequity"], least))
    if split.get("stereotyping"):
        found = split["stereotyping"]
        named = {"all questions": found.get("all"), "consensus questions": found.get("consensus")}
        shown.append(tables.stereotyping_table("Stereotyping", named))
        if found.get("groups"):
            details.append(tables.stereotyping_table("Stereotyping by group", found["groups"], least))
    details += tables.group_tables(split.get("groups") or {}, unit, least)
    if panels := split.get("distributions"):
        drawings.append(figures.distributions("distributions", panels))
        details.append(tables.distribution_table(panels, least))
    if (split.get("collapse") or {}).get("true_entropy"):
        drawings.append(figures.collapse("collapse", split["collapse"], split.get("cells")))
    if (split.get("calibration") or {}).get("bins"):
        drawings.append(figures.calibration("calibration", split["calibration"]))
    return Section(f"Split: {clean(name)}", shown, drawings, details)


def _answers_section(split: str, entry: Mapping[str, Any]) -> Section:
    settings = entry["settings"]
    how = f"temperature {number(settings['temperature'], 2)}" if settings["temperature"] else "greedy"
    text = (
        f"Answers to {number(entry['rows'])} prompts, drawn from {number(entry['choices'])} choices of people of whom "
        f"something is known ({how}, {number(settings['max_new_tokens'])} tokens at most)."
    )
    if entry["too_long"]:
        text += f" {number(entry['too_long'])} longer than the model's context were drawn and left out."
    if entry.get("judge"):
        text += (
            f" Compared by {clean(entry['judge'])}, which is told the person's profile. A verdict is a language "
            "model's idea of what a person prefers: how often it meets what people chose is below."
        )
    if entry.get("note"):
        text += f" The judge gave up: {clean(entry['note'])}"
    return Section(f"Answers: {clean(split)}", answers_tables(entry), text=text)


def _title(model: Mapping[str, Any]) -> str:
    return f"Evaluation of {clean(model.get('adapter') or model['name'])}"


def _facts(model: Mapping[str, Any]) -> dict[str, str]:
    facts = {"Model": clean(model["name"])}
    if model.get("adapter"):
        facts["Adapter"] = clean(model["adapter"])
    if model.get("parameters_trained") is not None:
        facts["Trained parameters"] = number(model["parameters_trained"])
    if model.get("prompt_profile") is not None:
        facts["Profile in the prompt"] = "yes" if model["prompt_profile"] else "no"
    return facts


def _markdown(title: str, facts: Mapping[str, str], sections: list[Section], footer: str) -> str:
    lines = [f"# {tables.escaped(title)}", "\n".join(f"- {k}: {tables.escaped(v)}" for k, v in facts.items())]
    for section in sections:
        blocks = [tables.escaped(section.text)] if section.text else []
        blocks += [table.markdown() for table in (*section.tables, *section.details)]
        if blocks:
            lines += [f"## {tables.escaped(section.title)}", *blocks]
    return "\n\n".join([*lines, footer]) + "\n"
