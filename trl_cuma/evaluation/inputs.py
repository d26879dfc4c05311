# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What `trl-cuma evaluate` is given, read and checked: errors name the option, before anything takes long."""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

COLUMNS = {"demographic_column": "demographic", "person_column": "person_id"}
"""Options that name a column, and its name where they are not given: rows may lack it then."""

ADAPTER_FILE = "adapter_config.json"


def check_paths(args: argparse.Namespace) -> None:
    """
    Raises:
        `FileNotFoundError`: A path leads nowhere.
        `ValueError`: A model is an adapter or an adapter is none; or the reference map is none, or not used.
    """
    for name in ("data", "model", "adapter", "against"):
        value = getattr(args, name)
        if value is not None and _is_path(value) and not os.path.exists(value):
            raise FileNotFoundError(f"`--{name}` is {value!r}, and there is no such file or folder.")
    if args.model is not None and os.path.isfile(os.path.join(args.model, ADAPTER_FILE)):
        raise ValueError(f"`--model` is {args.model!r}, the folder of an adapter. Pass it as `--adapter`.")
    if args.adapter is not None and os.path.isdir(args.adapter):
        if not os.path.isfile(os.path.join(args.adapter, ADAPTER_FILE)):
            raise ValueError(
                f"`--adapter` is {args.adapter!r}, a folder without {ADAPTER_FILE}. Name the one that training wrote, "
                "or a checkpoint in it; pass a whole model as `--model`."
            )
    if args.reference_map is not None:
        _check_reference_map(args)


def _is_path(name: str) -> bool:
    """Whether it can't be an id on the Hub: "runs/cuma" could be one, "./cuma" and "runs/sft/cuma" could not."""
    return name.startswith((".", "~", os.sep)) or ("://" not in name and name.count("/") > 1)


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


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Errors of libraries about something that was not found or can't be read, with the option that it is from."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error


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
    import torch
    from accelerate import PartialState
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    import trl_cuma  # noqa: F401  its adapters can be loaded from here on

    of_adapter = f"`{option or '--adapter'}` {adapter}"
    name, of_model = model_id, f"`{option or '--model'}` {model_id}"
    if name is None:
        with named(of_adapter):
            name = PeftConfig.from_pretrained(adapter).base_model_name_or_path
        if not name:
            raise ValueError(f"{of_adapter} doesn't say which model it is for. Name it with `--model`.")
        of_model = f"{of_adapter} is for the model {name}; where that is elsewhere now, name it with `--model`"
    # What training saved beside the adapter may have another chat template.
    own = adapter and (Path(adapter) / "tokenizer_config.json").is_file()
    with named(of_adapter if own else of_model):
        tokenizer = AutoTokenizer.from_pretrained(adapter if own else name, trust_remote_code=args.trust_remote_code)
    _check_chat_template(tokenizer, adapter if own else name, splits)
    quantization = None
    if args.load_in_4bit:
        compute = torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype)
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    with named(of_model):
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=args.dtype,
            quantization_config=quantization,
            device_map={"": PartialState().device},
            trust_remote_code=args.trust_remote_code,
        )
    about: dict[str, Any] = {"name": str(name), "adapter": adapter, "parameters_trained": None}
    if adapter:
        with named(of_adapter):
            model = PeftModel.from_pretrained(model, adapter)
        about["parameters_trained"] = sum(values.numel() for values in get_peft_model_state_dict(model).values())
    return model.eval(), tokenizer, about


def _check_chat_template(tokenizer: Any, name: str | None, splits: Mapping[str, Dataset]) -> None:
    from datasets import Value

    # Some tokenizers word conversations without a template, and have no such attribute.
    if getattr(tokenizer, "chat_template", "none is needed"):
        return
    for split, rows in splits.items():
        if "messages" in rows.features or not isinstance(rows.features.get("prompt"), Value | None):
            raise ValueError(
                f"The rows of split {split!r} are conversations, and the tokenizer of {name} has no chat template to "
                "word them with. Set its `chat_template` to the one of the training and `save_pretrained` it into the "
                "adapter's folder (or the model's), or evaluate a model that has one."
            )
