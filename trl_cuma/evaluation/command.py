# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`trl-cuma evaluate …` and `trl-cuma compare …`."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from . import generation_document as generation
from .inputs import COLUMNS, adapter_fingerprint, check_paths, evaluate_parser, load_model, set_columns

logger = logging.getLogger(__name__)


def main_evaluate(argv: Sequence[str]) -> int:
    """
    Measure a model, and write a report.

    Args:
        argv (`Sequence[str]`): What follows `trl-cuma evaluate`.

    Returns:
        `int`: 0. What is wrong with the input is raised; the command line prints it.
    """
    args = evaluate_parser().parse_args(list(argv))
    _check(args)
    from .report import check_output_dir

    check_output_dir(args.output_dir)  # before anything that takes long

    import torch
    from accelerate import PartialState

    from .report import write_report

    # `cpu`: else several processes without a GPU are not seen. `timeout`: the others wait while one scores, or asks a
    # judge, for longer than a backend's ten minutes.
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=1))
    evaluation, cells = _evaluate(args, state.is_main_process)
    if state.is_main_process:
        folder = write_report(evaluation, args.output_dir, cells)
        print("\n## ".join((folder / "tables.md").read_text(encoding="utf-8").split("\n## ")[:2]).rstrip())
        print(f"\nWritten to {folder}: report.html, tables.md, evaluation.json, cells.npz.")
    return 0


def main_compare(argv: Sequence[str]) -> int:
    """
    Put evaluations side by side.

    Args:
        argv (`Sequence[str]`): What follows `trl-cuma compare`.

    Returns:
        `int`: 0. What is wrong with the input is raised; the command line prints it.
    """
    args = _compare_parser().parse_args(list(argv))
    if args.num_samples < 1:
        raise ValueError(f"`--num_samples` is {args.num_samples}, expected 1 or more.")
    from .compare import compare_runs, comparison_markdown, write_comparison
    from .report import check_output_dir

    if args.output_dir:
        check_output_dir(args.output_dir)
    comparison = compare_runs(args.runs, num_samples=args.num_samples, seed=args.seed)
    print(comparison_markdown(comparison).rstrip())
    if args.output_dir:
        folder = write_comparison(comparison, args.output_dir)
        print(f"\nWritten to {folder}: comparison.html, comparison.md, comparison.json.")
    return 0


def _compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-cuma compare",
        description="Put evaluations side by side, with intervals. Where they are of the same cells and answers, the "
        "differences to the first are paired: both are resampled together.",
        epilog="Example: trl-cuma compare evaluations/lora evaluations/cuma --output_dir evaluations/comparison",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that `trl-cuma evaluate` wrote")
    parser.add_argument("--output_dir", type=Path, default=None, help="default: print the tables alone")
    parser.add_argument("--num_samples", type=int, default=2000, help="draws of the bootstrap; default: 2000")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap; default: 0")
    return parser


def _check(args: argparse.Namespace) -> None:
    if args.model is None and args.adapter is None:
        raise ValueError("Name what to evaluate: `--model`, `--adapter`, or both.")
    least = {"limit": 1, "min_group_size": 1, "permutations": 0, "num_samples": 1, "topology_prompts": 0}
    for name, low in (least | {"batch_tokens": 1} | generation.LEAST).items():
        value = getattr(args, name)
        if value is not None and not low <= value < float("inf"):
            raise ValueError(f"`--{name}` is {value}, expected {low} or more.")
    if not 0 <= args.max_bad_share <= 1:
        raise ValueError(f"`--max_bad_share` is {args.max_bad_share}, expected a share from 0 to 1.")
    generation.check_arguments(args)
    check_paths(args)


def _check_fields(args: argparse.Namespace, feature: Any) -> None:
    """Before anything is predicted, where the data says which fields its profiles have."""
    missing = [field for field in args.group_by or [] if isinstance(feature, Mapping) and field not in feature]
    if missing:
        raise ValueError(f"`--group_by` names {missing[0]!r}, which no profile has. Name some of {sorted(feature)}.")


def _evaluate(args: argparse.Namespace, is_main: bool) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The document and the cells; in other processes than the main one, whose results nobody reads, empty."""
    from .evaluation_data import MARGINAL_ROWS, Wording, load_splits, sample_rows, training_marginal
    from .preference_rows import row_kind, sample_choices
    from .rows import read_rows
    from .scoring import grouping_fields, score_prediction
    from .survey import predict_rows

    splits, train = load_splits(args.data, args.data_config, args.split, args.train_split or "train")
    set_columns(args, splits)
    columns = {name: getattr(args, name) for name in ("answer_by", *COLUMNS)}
    if args.train_split and train is None:
        raise ValueError(
            f"`--train_split` names {args.train_split!r}, which the data lacks. Name the split that was trained "
            "on, or leave the option out: then 'train' is taken, if there is one."
        )
    surveys, choices = {}, {}
    for name, rows in splits.items():
        _check_fields(args, rows.features.get(args.demographic_column))
        if row_kind(rows) == "survey":
            rows, taken = sample_rows(rows, args.limit, args.seed), "answers to a survey"
            surveys[name] = rows
        else:
            rows = sample_choices(rows, args.limit, args.person_column, args.seed)
            choices[name], taken = rows, "people's choices between texts"
        if is_main:
            print(f"Split {name!r}: {len(rows):,} rows, taken for {taken}.")
    to_draw = generation.rows_to_draw(args)
    if to_draw and not choices:
        raise ValueError(
            "`--judge` and `--generate` are for rows of `prompt`, `chosen` and `rejected`; these are none."
        )
    judge = generation.make_judge(args) if args.judge and is_main else None
    model, tokenizer, about = load_model(args, args.model, args.adapter, splits)
    marginal = {}
    if is_main and train is not None and surveys:
        known = read_rows(sample_rows(train, MARGINAL_ROWS, args.seed), show_progress=True, **columns)
        marginal = training_marginal(known)
    document: dict[str, Any] = {"version": 1, "model": about, "data": args.data}
    document |= {"min_group_size": args.min_group_size, "splits": {}}
    if is_main and args.adapter:
        document["weights"] = adapter_fingerprint(args.adapter)
    cells: dict[str, np.ndarray] = {}
    for number, (name, rows) in enumerate(surveys.items()):
        prediction = predict_rows(
            model,
            tokenizer,
            rows,
            permutations=args.permutations,
            max_bad_share=args.max_bad_share,
            max_batch_tokens=args.batch_tokens,
            **columns,
        )
        if not is_main:
            continue
        bad = [number for numbers in prediction.bad_rows.values() for number in numbers]
        if "weight" in rows.column_names:  # who doesn't count among the answers counts in no group
            bad += [number for number, weight in enumerate(rows["weight"][:]) if weight == 0]
        rows = rows.select(np.setdiff1d(np.arange(len(rows)), bad))
        wording = Wording(rows, **columns)
        scores, tables = score_prediction(
            prediction,
            marginal,
            group_by=args.group_by,
            questions=wording.questions,
            min_group_size=args.min_group_size,
            num_samples=args.num_samples,
            seed=args.seed,
        )
        if "cells" in tables:
            least = args.min_group_size if prediction.truth is None else None
            scores["cells"] = {"by": tables["cells"].units[0], "min_people": least}
        document["splits"][name] = scores
        cells[f"{name}/key"] = np.array(_key(prediction))
        for table, values in tables.items():
            cells |= values.arrays(f"{name}/{table}")
        about.setdefault("prompt_profile", wording.prompt_profile)
        if number == 0 and args.topology_prompts:
            fields, prompts = grouping_fields(prediction, args.group_by), list(wording.prompts.values())
            document |= _topology(args, model, tokenizer, rows, wording.prompt_profile, prompts, fields)
    if args.neutral is not None:
        document["neutral"] = _neutral(args, model, tokenizer, next(iter(splits.values())), predict_rows)
    if choices:
        found, arrays = generation.own_choices(args, model, tokenizer, choices)
        document["generation"] = {"own_choices": found}
        cells |= arrays
        rows = next(iter(choices.values()))
        stated, prompts, fields = generation.prompts_and_fields(args, rows)
        about.setdefault("prompt_profile", stated)
        if is_main and args.topology_prompts and not surveys:
            document |= _topology(args, model, tokenizer, rows, stated, prompts, fields)
    if to_draw:
        drawn = generation.draw(args, model, tokenizer, choices)
        answers = [generation.write_answers(args, model, tokenizer, about, drawn)]
        if args.judge and args.against is None:
            with model.disable_adapter():
                answers.append(generation.write_answers(args, model, tokenizer, about | {"adapter": None}, drawn))
        elif args.judge:
            del model  # there may be no room for two
            model, tokenizer, other = load_model(args, *generation.read_against(args), choices, "--against")
            answers.append(generation.write_answers(args, model, tokenizer, other, drawn))
        if is_main:
            document["generation"]["answers"] = generation.answers_document(args, drawn, answers, judge)
    if is_main and args.adapter and (log := _training_log(Path(args.adapter))):
        document["training"] = {"log_history": log}
    return document, cells


def _neutral(args: argparse.Namespace, model: Any, tokenizer: Any, rows: Any, predict: Any) -> dict[str, Any]:
    from .neutral import neutral_document, neutral_rows

    asked = neutral_rows(args.neutral, rows, args.demographic_column, args.seed)
    prediction = predict(
        model, tokenizer, asked, answer_by=args.answer_by, max_bad_share=1.0, max_batch_tokens=args.batch_tokens
    )
    return neutral_document(prediction, num_samples=args.num_samples, seed=args.seed)


def _topology(
    args: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    rows: Any,
    stated: bool | None,
    prompts: Sequence[Any],
    fields: Sequence[str],
) -> dict[str, Any]:
    """The document's `topology`, or the reason why a CuMA adapter has none: what was measured is not lost with it."""
    from ..adapter import CuMAConfig
    from ..generation.vectors import demographic_table
    from .evaluation_data import people_of
    from .profile_routing import routing_config
    from .topology import evaluate_topology, fields_with_groups

    if not any(isinstance(config, CuMAConfig) for config in getattr(model, "peft_config", {}).values()):
        if args.reference_map:
            logger.warning("`--reference_map` is not used: without a CuMA adapter there is no topology.")
        return {"topology": None}
    try:
        config = routing_config(model)
        if stated:
            raise ValueError("The prompts state the profile, so that they fit no other one.")
        if not prompts:
            raise ValueError("Whether the prompts state the profile can't be told: no question is asked of two.")
        profiles, are_people = people_of(rows, args.demographic_column, args.person_column)
        least = args.min_group_size if are_people else 1
        usable = fields_with_groups(profiles, fields, least)
        if not usable:
            raise ValueError(
                f"None of the fields {list(fields)} makes two groups of {least} of the {len(profiles):,} "
                f"{'people (`--min_group_size`)' if are_people else 'profiles'}."
            )
        chosen = np.unique(np.linspace(0, len(prompts) - 1, min(len(prompts), args.topology_prompts)).astype(int))
        options = dict(table=demographic_table(model), min_group_size=least, seed=args.seed, show_progress=True)
        # Where all experts serve every token, only how much each of them counts can tell people apart.
        options |= dict(
            reference=args.reference_map, measure="gate" if config.experts_per_token == config.num_experts else "load"
        )
        found = evaluate_topology(model, tokenizer, [prompts[i] for i in chosen], profiles, usable[:1], **options)
    except ValueError as error:
        logger.warning("No topology: %s", error)
        return {"topology": None, "topology_note": str(error)}
    return {"topology": found.to_dict() | {"unit": "people" if are_people else "profiles"}}


def _training_log(adapter: Path) -> list[dict[str, Any]]:
    """The trainer's log, of the adapter's folder or of its last checkpoint; empty where there is none."""
    from transformers.trainer_utils import get_last_checkpoint

    last = get_last_checkpoint(str(adapter)) if adapter.is_dir() else None
    for folder in (adapter, last and Path(last)):
        if folder and (folder / "trainer_state.json").is_file():
            log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8")).get("log_history", [])
            # What it holds of groups is of those that were large enough for the training's own limit.
            return [{key: entry[key] for key in ("step", "loss", "eval_loss") if key in entry} for entry in log]
    return []


def _key(prediction: Any) -> str:
    """Of which cells and answers a prediction is: equal for every model that is asked the same."""
    digest = hashlib.sha256()
    # With `answer_person`: people are resampled, so that other people make other intervals.
    parts: Mapping[str, Any] = {
        name: getattr(prediction, name)
        for name in (
            *("question_id", "num_options", "profile", "truth"),
            *("answer_cell", "answer_choice", "answer_person", "answer_weight"),
        )
    }
    for name, values in parts.items():
        digest.update(name.encode())
        if values is not None:
            text = "\n".join(values.tolist()) if values.dtype.kind == "U" else None
            digest.update(text.encode() if text is not None else np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
