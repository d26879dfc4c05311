# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`trl-cuma prepare SOURCE …`: a public data set as a folder that every `dataset_name` reads."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from .community_alignment import SUBSETS as COMMUNITY_SUBSETS
from .community_alignment import convert_community_alignment
from .conversion import Conversion
from .global_opinions_rows import convert_global_opinions
from .prism import SUBSETS as PRISM_SUBSETS
from .prism import convert_prism
from .prompts import TEMPLATES, PromptFormat
from .splits import SplitOptions
from .worldvaluesbench import convert_worldvaluesbench


class Source(NamedTuple):
    """What the command line knows of a source: its converter, tasks, help, and the default of `--input`."""

    convert: Callable[..., Conversion]
    tasks: tuple[str, ...]
    help: str
    input: str
    subsets: tuple[str, ...] = ()
    splits: SplitOptions = SplitOptions()


SOURCES = {
    "worldvaluesbench": Source(
        convert_worldvaluesbench,
        ("sft", "dpo"),
        "WorldValuesBench: survey answers (needs the World Values Survey's licence)",
        "the checkout of WorldValuesBench in which data_preparation.py was run; required",
    ),
    "community_alignment": Source(
        convert_community_alignment,
        ("sft", "dpo", "choice"),
        "Community Alignment: four answers, one preferred, over several turns",
        "a Hub id, a file or a folder; default: facebook/community-alignment-dataset",
        COMMUNITY_SUBSETS,
    ),
    "prism": Source(
        convert_prism,
        ("sft", "dpo"),
        "PRISM: conversations with scored answers",
        "a Hub id or a folder of its files; default: HannahRoseKirk/prism-alignment",
        PRISM_SUBSETS,
    ),
    "global_opinions": Source(
        convert_global_opinions,
        ("distribution", "sft", "dpo"),
        "GlobalOpinionQA: how a country answered a question; people are drawn",
        "a Hub id or a file; default: Anthropic/llm_global_opinions",
        splits=SplitOptions(split_by=("prompt",)),
    ),
}


def main(argv: Sequence[str]) -> int:
    """
    Convert, write, and print what was read, dropped and written.

    Args:
        argv (`Sequence[str]`): What follows `trl-cuma prepare`.

    Returns:
        `int`: 0. What is wrong with the input is raised; the command line prints it.
    """
    args = vars(_parser().parse_args(list(argv)))
    source, output, overwrite = SOURCES[args.pop("source")], args.pop("output"), args.pop("overwrite", False)
    inputs = [args.pop("input")] if "input" in args else []
    countries = args.get("holdout_countries")
    if countries is not None:
        numbers = [name for name in countries if name.isdecimal()]
        if numbers and len(countries) > 1:
            raise ValueError(f"`--holdout_countries` is {countries}: give one number, or names.")
        args["holdout_countries"] = int(numbers[0]) if numbers else tuple(countries)
    prompts = PromptFormat(**_taken(args, PromptFormat))
    splits = replace(source.splits, **_taken(args, SplitOptions))
    report = source.convert(*inputs, prompts=prompts, splits=splits, **args).save(output, overwrite=overwrite)
    print(report)
    print(f"Written to {output}: `dataset_name: {output}` in a recipe.")
    return 0


def _taken(args: dict[str, Any], options: type) -> dict[str, Any]:
    """Take out the arguments that are fields of `options`."""
    return {entry.name: args.pop(entry.name) for entry in fields(options) if entry.name in args}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-cuma prepare",
        description="Convert a public data set to TRL's columns and `demographic`, split without leakage.",
    )
    sources = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    for name, source in SOURCES.items():
        # SUPPRESS: what is not given keeps the converter's own default.
        command = sources.add_parser(
            name, help=source.help, description=source.help, argument_default=argparse.SUPPRESS
        )
        add = command.add_argument
        add("--task", choices=source.tasks, required=True)
        add("--output", type=Path, required=True, help="a folder that is not there yet")
        add("--input", required=name == "worldvaluesbench", help=source.input)
        add("--overwrite", action="store_true", help="replace what an earlier call wrote to --output")
        _add_prompt_options(command)
        _add_split_options(command)
        if name != "global_opinions":
            add("--min_count", type=int, help="profile values held by fewer people are grouped (default: 30)")
            add("--keep_unknown", action="store_true", help="keep people of whom no profile field is known")
            add("--languages", nargs="+", help="take these alone, as the source names them")
        if source.subsets:
            add("--subset", choices=source.subsets, help="take the rows alone that the source marks so")
        if name == "worldvaluesbench":
            add("--questions", nargs="+", metavar="ID", help="value questions to take (default: all)")
            add(
                "--people_split",
                choices=("source", "random"),
                help="the benchmark's split of people (default), or ours",
            )
            add("--weights", help="the World Values Survey's CSV, for a column `weight`")
            add("--max_train_rows", type=int, help="a uniform sample of the training rows")
        elif name == "community_alignment":
            add("--config", help="the configuration on the Hub, or of a folder")
            add("--source_split", help="the split on the Hub or of a folder (default: train)")
        elif name == "global_opinions":
            add("--answers_per_cell", type=int, help="answers to draw per question and country (default: 200)")
            add("--min_countries", type=int, help="leave out questions asked in fewer countries (default: 2)")
    return parser


def _add_prompt_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("prompts")
    group.add_argument(
        "--demographics",
        choices=("none", "system", "user"),
        help="where the prompt states the profile (default: none)",
    )
    group.add_argument("--template", choices=tuple(TEMPLATES), help="the wording (default: plain)")
    group.add_argument("--messages", action="store_true", help="for sft: `messages` instead of prompt and completion")


def _add_split_options(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("splits")
    group.add_argument("--seed", type=int, help="of the splits and of whatever is drawn (default: 0)")
    group.add_argument("--test", type=float, help="share of people and of prompts (default: 0.1)")
    group.add_argument("--validation", type=float, help="share of people and of prompts (default: 0)")
    group.add_argument(
        "--split_by",
        nargs="+",
        choices=("person", "prompt"),
        help="what training and test don't share (default: both; global_opinions: prompt, and person holds out a "
        "country's answers to single questions)",
    )
    group.add_argument(
        "--holdout_combinations", nargs=2, metavar="FIELD", help="hold out combinations of these two fields' values"
    )
    group.add_argument("--holdout_share", type=float, help="share of the training people that may cost (default: 0.1)")
    group.add_argument(
        "--holdout_countries", nargs="+", metavar="N|NAME", help="hold out so many countries, or the named ones"
    )
