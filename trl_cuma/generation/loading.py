# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A model and its adapter for use: the one place where they are loaded. Errors name the option."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

ADAPTER_FILE = "adapter_config.json"

DTYPES = ("auto", "bfloat16", "float16", "float32")


def add_model_arguments(parser: argparse._ActionsContainer) -> None:
    """The options that say what is loaded: `--model` and `--adapter`."""
    add = parser.add_argument
    add("--model", default=None, help="id or folder of a causal language model; default: the adapter's base")
    add("--adapter", default=None, help="folder or id of a PEFT adapter of any kind")


def add_loading_arguments(parser: argparse._ActionsContainer) -> None:
    """The options that say how it is loaded: `--dtype`, `--load_in_4bit`, `--trust_remote_code`."""
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default="auto", help="default: the model's own")
    add("--load_in_4bit", action="store_true", help="quantize the base to NF4 (bitsandbytes)")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")


def check_path(option: str, value: str | None) -> None:
    """Raise a `FileNotFoundError` if `value` can only be a path and leads nowhere."""
    if value is not None and _is_path(value) and not os.path.exists(value):
        raise FileNotFoundError(f"`{option}` is {value!r}, and there is no such file or folder.")


def check_model_paths(model: str | None, adapter: str | None) -> None:
    """
    Check `--model` and `--adapter` before anything is imported or loaded.

    Raises:
        `FileNotFoundError`: One is a path that leads nowhere.
        `ValueError`: The model is an adapter, or the adapter is none.
    """
    check_path("--model", model)
    check_path("--adapter", adapter)
    if model is not None and os.path.isfile(os.path.join(model, ADAPTER_FILE)):
        raise ValueError(f"`--model` is {model!r}, the folder of an adapter. Pass it as `--adapter`.")
    if adapter is not None and os.path.isdir(adapter) and not os.path.isfile(os.path.join(adapter, ADAPTER_FILE)):
        raise ValueError(
            f"`--adapter` is {adapter!r}, a folder without {ADAPTER_FILE}. Name the one that training wrote, or a "
            "checkpoint in it; pass a whole model as `--model`."
        )


def _is_path(name: str) -> bool:
    """Whether it can't be an id on the Hub: "runs/cuma" could be one, "./cuma" and "runs/sft/cuma" could not."""
    return name.startswith((".", "~", os.sep)) or ("://" not in name and name.count("/") > 1)


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Errors of libraries about something that was not found or can't be read, with the option that it is from."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error


def load_model(
    model_id: str | None,
    adapter: str | None,
    *,
    dtype: str = "auto",
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
    option: str | None = None,
    check_tokenizer: Callable[[PreTrainedTokenizerBase, str], Any] | None = None,
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase, str]:
    """
    A causal language model with its adapter, in evaluation mode, and its tokenizer.

    Args:
        model_id (`str`, *optional*): Id or folder of the model, by default the adapter's base.
        adapter (`str`, *optional*): Id or folder of a PEFT adapter.
        dtype (`str`): One of [`DTYPES`].
        load_in_4bit (`bool`): Quantize the base to NF4.
        trust_remote_code (`bool`): Run code that comes with the model.
        option (`str`, *optional*): Which both come from, in place of `--model` and `--adapter`, for errors.
        check_tokenizer (`Callable`, *optional*): Gets the tokenizer and where it is from, and raises what is wrong
            with it, before weights are read.

    Returns:
        The model, the tokenizer, and the base model's name.

    Raises:
        `ValueError`: Something can't be found or read.
    """
    import torch
    from accelerate import PartialState
    from peft import PeftConfig, PeftModel
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
        tokenizer = AutoTokenizer.from_pretrained(adapter if own else name, trust_remote_code=trust_remote_code)
    if check_tokenizer is not None:
        check_tokenizer(tokenizer, adapter if own else name)
    quantization = None
    if load_in_4bit:
        compute = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    with named(of_model):
        model = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": PartialState().device},
            trust_remote_code=trust_remote_code,
        )
    if adapter:
        with named(of_adapter):
            model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), tokenizer, str(name)
