# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`trl-cuma export …`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..generation.loading import (
    add_loading_arguments,
    add_model_arguments,
    check_model_paths,
    check_path,
    load_model,
)
from ..generation.profiles import parse_profile
from ..generation.tables import read_table
from .distill import Distillation
from .folder import MAX_KL
from .people import MIN_PEOPLE

NAME = "name"
"""The column of a table of profiles that names the exports."""

FITTING = {
    "steps": "of the distillation",
    "learning_rate": "of its first step",
    "batch_size": "prompts of a step",
    "max_new_tokens": "of an answer",
    "held_out": "share of prompts to measure on",
    "seed": "of whatever is drawn",
}
"""Fields of [`Distillation`] that are options, and what their help says."""


def main(argv: Sequence[str]) -> int:
    """
    Export LoRAs.

    Returns:
        `int`: 0; 1 if some exports were refused, and the others are there.
    """
    args = _parser().parse_args(list(argv))
    check_model_paths(args.model, args.adapter)
    if args.adapter is None:
        raise ValueError("`--adapter` is not given: name the CuMA adapter to export from.")
    for option in ("train_data", "prompts"):
        check_path(f"--{option}", getattr(args, option))
    profiles = _profiles(args)
    if args.min_people < 0:
        raise ValueError(f"`--min_people` is {args.min_people}, expected 0 or more.")
    if args.min_people and args.train_data is None:
        raise ValueError(
            f"`--min_people` is {args.min_people}, and without `--train_data` nobody can be counted. Name the data "
            "that the adapter was trained on, or say with `--min_people 0` that you answer for the groups."
        )
    from ..evaluation.report import check_output_dir

    check_output_dir(args.output_dir)
    how = Distillation(**{name: getattr(args, name) for name in FITTING})
    people, prompts = _training_data(args)
    import torch

    from .bulk import export_profiles

    model, tokenizer, _ = load_model(
        args.model,
        args.adapter,
        dtype=args.dtype,
        load_in_4bit=args.load_in_4bit,
        trust_remote_code=args.trust_remote_code,
    )
    exports = export_profiles(
        model,
        tokenizer,
        profiles,
        args.output_dir,
        people=people,
        prompts=prompts,
        rank=args.rank,
        how=how,
        max_kl=args.max_kl,
        min_people=args.min_people,
        force=args.force,
        dtype=getattr(torch, args.lora_dtype),
        trust_remote_code=args.trust_remote_code,
    )
    document = exports.document()
    print(exports.table())
    print(
        f"\n{len(exports.records)} of {len(profiles)} exported, rank {exports.rank} (vLLM: --max-lora-rank "
        f"{document['vllm_max_lora_rank']}); worst group {document['worst_group']['name']}, mean KL "
        f"{document['worst_group']['mean_kl']:.2g} nats (limit {exports.max_kl:g}).\nWritten to {args.output_dir}."
    )
    if exports.refused:
        print(
            f"{len(exports.refused)} refused: farther from the routed model than `--max_kl`. Give more prompts, steps "
            "or rank, or `--force`."
        )
    return 1 if exports.refused else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-cuma export",
        description="Turn a CuMA adapter into one plain LoRA per profile, which PEFT and inference engines serve "
        "without trl_cuma. Exact for `routing: demographic`; otherwise distilled on your prompts, and how far it is "
        "from the routed model is measured on others of them.",
        epilog="Example: trl-cuma export --adapter runs/cuma --profile country=Kenya --profile country=Japan "
        "--train_data data/wvb --output_dir exports",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add_model_arguments(parser)
    add("--profile", action="append", default=[], help="field=value,…, or JSON; may be given several times")
    add("--profiles", type=Path, default=None, help="a table of profiles, .csv or .jsonl; a column `name` names them")
    add("--output_dir", type=Path, required=True, help="a folder that is not there yet")
    group = parser.add_argument_group("people")
    group.add_argument("--train_data", default=None, help="what the adapter was trained on, to count people")
    group.add_argument("--train_split", default="train", help="its training split; default: train")
    group.add_argument("--demographic_column", default="demographic", help="default: demographic")
    group.add_argument("--person_column", default="person_id", help="default: person_id")
    group.add_argument(
        "--min_people",
        type=int,
        default=MIN_PEOPLE,
        help="a profile of fewer is refused; 0: don't count; default: %(default)s",
    )
    group = parser.add_argument_group("approximation", "where a LoRA can't be the adapter itself")
    group.add_argument(
        "--prompts",
        default=None,
        help=".jsonl with `prompt`, as the LoRAs will get them; default: those of --train_data",
    )
    group.add_argument("--max_prompts", type=int, default=256, help="of more, so many are drawn; default: 256")
    group.add_argument("--rank", type=int, default=None, help="default: all experts' rank, 64 at most")
    for name, what in FITTING.items():
        default = getattr(Distillation, name)
        group.add_argument(f"--{name}", type=type(default), default=default, help=f"{what}; default: {default}")
    group.add_argument(
        "--max_kl", type=float, default=MAX_KL, help="nats; a LoRA farther away is refused; default: %(default)s"
    )
    group.add_argument("--force", action="store_true", help="write also what is above --max_kl")
    group = parser.add_argument_group("model")
    add_loading_arguments(group)
    group.add_argument(
        "--lora_dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the written LoRAs; default: float32",
    )
    return parser


def _profiles(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Name → profile, from both options; exports without a name are p000, p001, …"""
    rows: list[tuple[str | None, Any]] = [(None, parse_profile(text)) for text in args.profile]
    if args.profiles is not None:
        for row in read_table(args.profiles, "--profiles"):
            name = row.pop(NAME, None)
            known = {field: value for field, value in row.items() if value not in (None, "")}
            rows.append((None if name in (None, "") else str(name), known))
    if not rows:
        raise ValueError("Nobody to export: give `--profile country=Kenya,…` or a table, `--profiles`.")
    found: dict[str, dict[str, Any]] = {}
    for number, (name, profile) in enumerate(rows):
        name = name or f"p{number:03}"
        if name in found:
            raise ValueError(f"`--profiles` has the name {name!r} twice. Names are folders: give each once.")
        found[name] = profile
    return found


def _training_data(args: argparse.Namespace) -> tuple[list[Any] | None, list[Any]]:
    """Each training person's profile, and the prompts to fit to."""
    import numpy as np

    people, prompts = None, []
    if args.train_data is not None:
        from ..evaluation.evaluation_data import people_of, read_data

        splits = read_data(args.train_data, option="--train_data", split_option="--train_split")
        if args.train_split not in splits:
            raise ValueError(
                f"`--train_split` is {args.train_split!r}, and `--train_data` has {list(splits)}. Name one of them."
            )
        rows = splits[args.train_split]
        if args.demographic_column not in rows.column_names:
            raise ValueError(
                f"`--demographic_column` is {args.demographic_column!r}, and `--train_data` has no such column. Name "
                f"one of {sorted(rows.column_names)}."
            )
        people, are_people = people_of(rows, args.demographic_column, args.person_column)
        if args.min_people and not are_people:
            raise ValueError(
                f"`--train_data` has no people in the column {args.person_column!r}, so that nobody can be counted. "
                "Name the column by `--person_column`, or say `--min_people 0`."
            )
        if args.prompts is None and "prompt" in rows.column_names:
            drawn = np.random.default_rng(args.seed).permutation(len(rows))[: 50 * args.max_prompts]
            looked_at = rows.select(np.sort(drawn))
            prompts = _without_stated(list(looked_at["prompt"]), list(looked_at[args.demographic_column]))
    if args.prompts is not None:
        lines = read_table(Path(args.prompts), "--prompts")
        if not all(line.get("prompt") for line in lines):
            raise ValueError(f"`--prompts` {args.prompts}: every line must be an object with a `prompt`.")
        prompts = [line["prompt"] for line in lines]
    unique = list({json.dumps(prompt): prompt for prompt in prompts}.values())
    if len(unique) > args.max_prompts:
        kept = np.sort(np.random.default_rng(args.seed).permutation(len(unique))[: args.max_prompts])
        unique = [unique[row] for row in kept]
    return people, unique


def _without_stated(prompts: list[Any], demographics: list[Any]) -> list[Any]:
    """The prompts, unless they state people's profiles: those fit no single one."""
    from ..evaluation.preference_rows import states_profile

    states, _ = states_profile(prompts, demographics)
    if states:
        print("The prompts of `--train_data` state people's profiles, so that they fit no single one: none is used.")
    return [] if states else prompts
