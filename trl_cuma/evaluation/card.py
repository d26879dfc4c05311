# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`trl-cuma card …`: what was measured, in the model card of the adapter that it was measured on."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from ..adapter.card import weights_fingerprint, write_card
from ..adapter.card_text import public_name
from ..adapter.config import CuMAConfig
from ..data.people import MIN_COUNT
from .compare import Run, difference, load_run, verdict
from .group_gains import group_gains
from .report.tables import (
    INTERVALS,
    Table,
    escaped,
    heading,
    inequity_table,
    metrics_table,
    neutral_table,
    own_choices_summary,
    stereotyping_table,
)
from .report.text import HEADLINE, clean, estimate, metric_of, number, other_note, people_known

LONG = 12  # rows of a table that is folded


def main(argv: Sequence[str]) -> int:
    """
    Write an adapter's card.

    Args:
        argv (`Sequence[str]`): What follows `trl-cuma card`.

    Returns:
        `int`: 0. What is wrong with the input is raised; the command line prints it.
    """
    args = _parser().parse_args(list(argv))
    if args.num_samples < 1:
        raise ValueError(f"`--num_samples` is {args.num_samples}, expected 1 or more.")
    if args.against and not args.evaluation:
        raise ValueError("`--against` names what `--evaluation` is held against. Name that, too.")
    config = _adapter_config(args.adapter)
    if args.evaluation is None:
        write_card(args.adapter, config)
    else:
        run = _own_evaluation(args.evaluation, args.adapter)
        against = load_run(args.against, "against") if args.against else None
        measured = measured_markdown(run, against, num_samples=args.num_samples, seed=args.seed)
        write_card(args.adapter, config, measured=measured, results=eval_results(run))
    print(f"Written to {os.path.join(args.adapter, 'README.md')}. Read it before you publish it.")
    if args.push_to_hub:
        from huggingface_hub import HfApi

        from ..adapter.hub import upload_adapter

        repo = HfApi().create_repo(args.push_to_hub, private=args.private or None, exist_ok=True).repo_id
        done = upload_adapter(args.adapter, repo, commit_message="Upload adapter", revision=args.revision)
        print(f"Uploaded: {done.commit_url}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-cuma card",
        description="Write an adapter's model card (README.md), with what `trl-cuma evaluate` measured. What you "
        "wrote into it stays, outside of its marks.",
        epilog="Example: trl-cuma card --adapter runs/cuma --evaluation evaluations/cuma --against evaluations/lora",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--adapter", required=True, help="folder of a CuMA adapter")
    add("--evaluation", type=Path, default=None, help="what `trl-cuma evaluate` wrote of this adapter")
    add("--against", type=Path, default=None, help="an evaluation of another model on the same data, for the gains")
    add("--num_samples", type=int, default=2000, help="draws of the bootstrap; default: 2000")
    add("--seed", type=int, default=0, help="of the bootstrap; default: 0")
    group = parser.add_argument_group("Hub")
    group.add_argument(
        "--push_to_hub", default=None, metavar="ID", help="upload adapter, card and tokenizer, and nothing else"
    )
    group.add_argument("--private", action="store_true", help="a repository that is made for it is private")
    group.add_argument("--revision", default=None, help="a branch that is there; default: main")
    return parser


def _adapter_config(adapter: str) -> CuMAConfig:
    from peft import PeftConfig

    if not os.path.isfile(os.path.join(adapter, "adapter_config.json")):
        raise FileNotFoundError(f"`--adapter` {adapter} is no folder with an adapter_config.json.")
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, CuMAConfig):
        raise ValueError(f"`--adapter` {adapter} holds an adapter of type {config.peft_type}, and no CuMA adapter.")
    return config


def _own_evaluation(folder: Path, adapter: str) -> Run:
    run = load_run(folder, "this")
    weights = weights_fingerprint(adapter)
    if weights is None or run.evaluation.get("weights") != weights:
        raise ValueError(
            f"`--evaluation` {folder} is not of the weights in {adapter}: they were trained further since, or it is "
            "of another adapter. Evaluate this one."
        )
    least = run.evaluation.get("min_group_size")
    if least is None or least < MIN_COUNT:
        raise ValueError(
            f"`--evaluation` {folder} may name groups of {least} people, and a card is for everybody. Evaluate again "
            f"with `--min_group_size {MIN_COUNT}` or more."
        )
    return run


def measured_markdown(run: Run, against: Run | None = None, *, num_samples: int = 2000, seed: int = 0) -> str:
    """
    What a card says of an evaluation: headline metrics, groups and the gaps between them, stereotyping. Groups have
    the names that the evaluation gives them: those of too few people are "Other" in it.

    Args:
        run (`Run`): The adapter's.
        against (`Run`, *optional*): Another model's, on the same data, for gains.
        num_samples (`int`), seed (`int`): Of the bootstrap of the gains.
    """
    evaluation = run.evaluation
    least, model = evaluation.get("min_group_size"), evaluation["model"]
    facts = [f"By `trl-cuma evaluate` on held-out data: {_name(evaluation.get('data'))}."]
    if model.get("prompt_profile") is not None:
        facts.append(f"The prompts {'state' if model['prompt_profile'] else 'do not state'} the profile.")
    facts.append("Intervals are 95 % each, not corrected for their number.")
    parts = [" ".join(facts)]
    if against is not None:
        other = against.evaluation["model"]
        parts.append(
            f"Changes are from {_name(other.get('adapter') or other['name'])} to this adapter, on the same data."
        )
    options = {"num_samples": num_samples, "seed": seed}
    own_choices = (evaluation.get("generation") or {}).get("own_choices") or {}
    for split, found in evaluation["splits"].items():
        if split in own_choices:
            continue
        parts.append(f"### Split: {escaped(split)}")
        parts += _split(split, found, least)
        gains = {}
        if against is not None and split in against.evaluation["splits"]:
            parts.append(_shown(_gains_table(difference(against, run, split, **options))))
            gains = group_gains(against, run, split, **options)
        unit = "people" if people_known(found.get("counts") or {}) else "profiles"
        shown = 0 if (found.get("counts") or {}).get("answers") == 0 else least
        for field, entries in (found.get("groups") or {}).items():
            if entries:
                parts.append(_shown(_group_table(field, entries, gains.get(field) or {}, unit, shown)))
        parts += _gaps(found, shown)
    if own_choices:
        parts.append(_shown(own_choices_summary(own_choices)))
    parts.append("### Prompts that no profile has a bearing on")
    neutral = evaluation.get("neutral")
    parts.append(_shown(neutral_table(neutral)) if neutral else "Not measured (`trl-cuma evaluate --neutral`).")
    return "\n\n".join(parts)


def _name(name: Any) -> str:
    return escaped(public_name(str(name)) or "unknown") if name else "not recorded"


def _shown(table: Table) -> str:
    if len(table.rows) <= LONG:
        return table.markdown()
    summary = f"{escape(clean(table.title))} ({len(table.rows)})"
    return f"<details><summary>{summary}</summary>\n\n{table.markdown()}\n\n</details>"


def _split(split: str, found: Mapping[str, Any], least: int | None) -> list[str]:
    counts = found.get("counts") or {}
    names = ["answers", "people", "profiles", "questions"] if people_known(counts) else ["cells", "questions"]
    said = ", ".join(f"{number(counts[name])} {name}" for name in names if counts.get(name))
    parts = [f"Of {said}. Groups of fewer than {least} people are not named."] if said else []
    headline = {name: found["metrics"][name] for name in HEADLINE if name in (found.get("metrics") or {})}
    if headline:
        parts.append(_shown(metrics_table(headline)))
    return parts


def _gains_table(gains: Mapping[str, Any]) -> Table:
    rows = [
        [heading(name), estimate(entry, metric_of(name).digits), verdict(name, entry)]
        for name, entry in gains["metrics"].items()
        if name in HEADLINE
    ]
    note = clean(gains["note"] or "")
    note = f"{note[:1].upper()}{note[1:]}. " if note else ""
    note += f"Paired: both models' scores are resampled together. {INTERVALS}" if rows else ""
    columns = ["Metric", "Change", "Reading"]
    return Table("Changes", columns, rows or [["none", "n/a", ""]], frozenset({2}), note.strip())


def _group_table(
    field: str,
    entries: Sequence[Mapping[str, Any]],
    gains: Mapping[str, Mapping[str, Any]],
    unit: str,
    least: int | None,
) -> Table:
    """A field's groups, the worst first, with their gains."""
    of_people = any("people" in entry for entry in entries)
    keys = [key for key in ("accuracy", "emd") if any(key in entry for entry in entries)]
    gained = [name for name in ("accuracy", "nll", "emd") if any(name in gains.get(e["group"], {}) for e in entries)]
    columns = [clean(field), unit.capitalize() if of_people else "n", *map(heading, keys)]
    texts = set()
    for name in gained:
        columns += [f"{heading(name)}, change", "Reading"]
        texts.add(len(columns) - 1)
    rows = []
    for entry in entries:
        row = [clean(entry["group"]), number(entry.get("people") if of_people else entry.get("n"))]
        row += [estimate(entry.get(key)) for key in keys]
        for name in gained:
            found = gains.get(entry["group"], {}).get(name)
            row += [estimate(found), verdict(name, found) if found else ""]
        rows.append(row)
    note = f"The worst first. {INTERVALS}{other_note([entry['group'] for entry in entries], least)}"
    return Table(f"By {clean(field)}", columns, rows, frozenset(texts), note)


def _gaps(found: Mapping[str, Any], least: int | None) -> list[str]:
    parts = []
    if found.get("inequity"):
        parts.append(_shown(inequity_table(found["inequity"], least)))
    if not found.get("stereotyping"):
        return [*parts, "Stereotyping: not measured."]
    stereotyping = found["stereotyping"]
    named = {"all questions": stereotyping.get("all"), "consensus questions": stereotyping.get("consensus")}
    parts.append(_shown(stereotyping_table("Stereotyping", named)))
    if stereotyping.get("groups"):
        parts.append(_shown(stereotyping_table("Stereotyping by group", stereotyping["groups"], least)))
    return parts


def eval_results(run: Run) -> list[EvalResult]:
    """The headline metrics of each split, for the Hub's metadata."""
    name = public_name(str(run.evaluation.get("data") or "")) or "unknown"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            dataset_split=split,
            metric_type=metric,
            metric_name=metric_of(metric).title,
            metric_value=round(found["metrics"][metric]["value"], 4),
        )
        for split, found in run.evaluation["splits"].items()
        for metric in HEADLINE
        if ((found.get("metrics") or {}).get(metric) or {}).get("value") is not None
    ]
