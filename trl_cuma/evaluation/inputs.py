# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What `trl-cuma evaluate` is given, read and checked: errors name the option, before anything takes long."""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..generation import loading
from . import generation_document as generation

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = {"demographic_column": "demographic", "person_column": "person_id"}
"""Options that name a column, and its name where they are not given: rows may lack it then."""


def evaluate_parser() -> argparse.ArgumentParser:
    """The parser of `trl-cuma evaluate`."""
    parser = argparse.ArgumentParser(
        prog="trl-cuma evaluate",
        description="Measure how a model predicts the answers of people and groups that were held out, and write a "
        "report: report.html, tables.md, evaluation.json, and cells.npz for `trl-cuma compare`. Rows of questions "
        "with options (`num_options`) are survey answers; rows of `prompt`, `chosen` and `rejected` without options "
        "are people's choices between texts.",
        epilog="Example: trl-cuma evaluate --adapter runs/cuma --data data/wvb --group_by country religion "
        "--output_dir evaluations/cuma. On several GPUs: accelerate launch -m trl_cuma.cli evaluate …",
        allow_abbrev=False,
    )
    add = parser.add_argument
    loading.add_model_arguments(parser)
    add("--data", required=True, help="what `trl-cuma prepare` wrote, or rows like it; or the id of a data set")
    add("--data_config", default=None, help="configuration of the data set")
    add("--split", nargs="+", default=["test"], help="splits to evaluate; default: test")
    add(
        "--train_split", default=None, help="whose answers make the training marginal; default: train, if there is one"
    )
    add("--output_dir", type=Path, required=True, help="a folder that is not there yet")
    group = parser.add_argument_group("rows")
    group.add_argument("--answer_by", choices=("letter", "text"), default="letter", help="what a row answers")
    for name, default in COLUMNS.items():
        group.add_argument(f"--{name}", default=None, help=f"default: {default}, if there is one")
    group.add_argument(
        "--limit",
        type=int,
        default=None,
        help="evaluate so many rows of each split, drawn evenly: answers, not people with all of theirs",
    )
    group.add_argument(
        "--max_bad_share", type=float, default=0.01, help="of rows, 0 to 1, where it stops; default: 0.01"
    )
    group = parser.add_argument_group("measures")
    group.add_argument(
        "--group_by", nargs="+", default=None, metavar="FIELD", help="fields; default: all, country first"
    )
    group.add_argument(
        "--min_group_size", type=int, default=30, help="people; smaller groups are never named; default: 30"
    )
    group.add_argument("--permutations", type=int, default=0, help="orders of the options to average; default: 0")
    group.add_argument("--num_samples", type=int, default=2000, help="draws of the bootstrap; default: 2000")
    group.add_argument("--seed", type=int, default=0, help="of whatever is drawn; default: 0")
    group.add_argument(
        "--topology_prompts", type=int, default=8, help="questions to route; 0: no topology; default: 8"
    )
    group.add_argument(
        "--neutral",
        type=Path,
        default=None,
        help="JSON lines of `question` and `options` that no profile has a bearing on (arithmetic, facts), to see how "
        "much profiles change the answers",
    )
    group.add_argument("--reference_map", type=Path, default=None, help="CSV of group, x, y, to hold the map against")
    group = parser.add_argument_group("model")
    group.add_argument("--batch_tokens", type=int, default=8192, help="tokens of a batch; default: 8192")
    loading.add_loading_arguments(group)
    generation.add_arguments(parser)
    return parser


def check_paths(args: argparse.Namespace) -> None:
    """
    Check what paths lead to; `args.neutral` becomes the questions that it holds.

    Raises:
        `FileNotFoundError`: A path leads nowhere.
        `ValueError`: A model is an adapter or an adapter is none; or the reference map is none, or not used.
    """
    for name in ("data", "against"):
        loading.check_path(f"--{name}", getattr(args, name))
    loading.check_model_paths(args.model, args.adapter)
    if args.reference_map is not None:
        _check_reference_map(args)
    if args.neutral is not None:
        from .neutral import read_neutral_questions

        if not args.neutral.is_file():
            raise FileNotFoundError(f"`--neutral` {args.neutral} is no file.")
        with loading.named("`--neutral`"):
            args.neutral = read_neutral_questions(args.neutral)


def _check_reference_map(args: argparse.Namespace) -> None:
    from .reference_map import MIN_MATCHED, read_reference_map

    path = args.reference_map
    if not path.is_file():
        raise FileNotFoundError(f"`--reference_map` {path} is no file.")
    if args.topology_prompts == 0:
        raise ValueError(
            "`--reference_map` is held against the topology, and `--topology_prompts` is 0: there is none. Leave one "
            "of them out."
        )
    try:
        places = read_reference_map(path)
    except (ValueError, OSError, csv.Error) as error:
        raise ValueError(f"`--reference_map` {path} can't be read as a map: {error}") from error
    if len(places) < MIN_MATCHED:
        raise ValueError(
            f"`--reference_map` {path} has {len(places)} groups; it takes {MIN_MATCHED} to compare maps. Add lines of "
            "group, x, y."
        )


def set_columns(args: argparse.Namespace, splits: Mapping[str, Dataset]) -> None:
    """
    Fill in the columns' names that were not given.

    Raises:
        `ValueError`: One that was given is no column.
    """
    for name, default in COLUMNS.items():
        given = getattr(args, name)
        if given is None:
            setattr(args, name, default)
            continue
        for split, rows in splits.items():
            if given not in rows.column_names:
                raise ValueError(
                    f"`--{name}` is {given!r}, and split {split!r} has no such column. Name one of "
                    f"{sorted(rows.column_names)}."
                )


def load_model(
    args: argparse.Namespace,
    model_id: str | None,
    adapter: str | None,
    splits: Mapping[str, Dataset],
    option: str | None = None,
) -> tuple[Any, Any, dict[str, Any]]:
    """
    Model, tokenizer, and what the document says of them.

    Args:
        args (`argparse.Namespace`): How to load: `dtype`, `load_in_4bit`, `trust_remote_code`.
        model_id (`str`, *optional*): Of a causal language model, by default the adapter's base.
        adapter (`str`, *optional*): Of a PEFT adapter.
        splits (`Mapping[str, Dataset]`): The rows that it is for.
        option (`str`, *optional*): Which both come from, in place of `--model` and `--adapter`.

    Raises:
        `ValueError`: Something can't be found or read, or rows are conversations and there is no chat template.
    """
    from peft import get_peft_model_state_dict

    model, tokenizer, name = loading.load_model(
        model_id,
        adapter,
        dtype=args.dtype,
        load_in_4bit=args.load_in_4bit,
        trust_remote_code=args.trust_remote_code,
        option=option,
        check_tokenizer=lambda tokenizer, where: _check_chat_template(tokenizer, where, splits),
    )
    trained = sum(values.numel() for values in get_peft_model_state_dict(model).values()) if adapter else None
    return model, tokenizer, {"name": name, "adapter": adapter, "parameters_trained": trained}


def adapter_fingerprint(adapter: str) -> str | None:
    """
    `sha256:…` of an adapter's weights, by which a card knows what was measured; `None` of weights in another format.

    Args:
        adapter (`str`): Its folder, or its id on the Hub, loaded before.
    """
    from huggingface_hub import hf_hub_download

    from ..adapter.card import weights_fingerprint

    is_local = os.path.isdir(adapter)
    return weights_fingerprint(adapter if is_local else Path(hf_hub_download(adapter, loading.ADAPTER_FILE)).parent)


def _check_chat_template(tokenizer: Any, name: str | None, splits: Mapping[str, Dataset]) -> None:
    from datasets import Value

    from ..generation.batches import has_chat_template

    if has_chat_template(tokenizer):
        return
    for split, rows in splits.items():
        if "messages" in rows.features or not isinstance(rows.features.get("prompt"), Value | None):
            raise ValueError(
                f"The rows of split {split!r} are conversations, and the tokenizer of {name} has no chat template to "
                "word them with. Set its `chat_template` to the one of the training and `save_pretrained` it into the "
                "adapter's folder (or the model's), or evaluate a model that has one."
            )
