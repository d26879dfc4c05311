# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Checks of a saved adapter, before anything of it is used. PEFT itself is content with missing and unknown tensors, and
leaves an adapter that failed to load in the model.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from .config import CuMAConfig

SHOWN = 3  # tensors that an error names


def check_saved_adapter(model: nn.Module, config: CuMAConfig) -> None:
    """
    Refuse a saved adapter that cannot be used with `model`, before the model is touched.

    Raises:
        ValueError: if the adapter was made for another type of base model, its weights are a pickle, or its file is
            damaged or lacks what `modules_to_save` and `trainable_token_indices` name.
    """
    model_type = base_model_type(model)
    if None not in (config.base_model_type, model_type) and config.base_model_type != model_type:
        raise ValueError(
            f"The adapter is for a base model of type {config.base_model_type!r}, not {model_type!r}. Load it on its "
            f"own base, {config.base_model_name_or_path!r}; for a new adapter, make a new CuMAConfig."
        )
    if config.source is None or (path := _weights_file(config.source)) is None:
        return
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or was not written to its end ({error}). Copy it again, or load an earlier checkpoint."
        ) from error
    others = [key for key in keys if not re.search(r"\.cuma_[a-z]+\.", key)]
    modules = [name for name, _ in model.named_modules()]
    for name in config.modules_to_save or []:
        if not any(re.search(rf"(^|\.){re.escape(name)}$", module) for module in modules):
            continue  # PEFT names both heads that a classifier may have
        if not any(re.search(rf"\.{re.escape(name)}(\.|$)", key) for key in others):
            raise ValueError(
                f"{path} has no tensor of {name!r}, which `modules_to_save` in its adapter_config.json names. Copy "
                "the adapter again."
            )
    if config.trainable_token_indices and not any("trainable_tokens" in key for key in others):
        raise ValueError(
            f"{path} has no trained tokens, which `trainable_token_indices` in its adapter_config.json names. Copy "
            "the adapter again."
        )


def _weights_file(source: dict[str, Any]) -> str | None:
    """The path of a saved adapter's safetensors; `None` in a folder that holds a configuration alone."""
    folder = os.path.join(*filter(None, (source["repo_id"], source["subfolder"])))
    if os.path.isdir(folder):
        path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
        if os.path.isfile(path):
            return path
        pickled = os.path.isfile(os.path.join(folder, WEIGHTS_NAME))
    else:
        try:
            return hf_hub_download(filename=SAFETENSORS_WEIGHTS_NAME, **source)  # PEFT's next step, from the cache
        except LocalEntryNotFoundError:  # no network, which is another matter
            raise
        except EntryNotFoundError:
            pickled = True  # all that PEFT would load now
    if pickled:
        raise ValueError(
            f"The adapter at {folder} has no {SAFETENSORS_WEIGHTS_NAME}, and {WEIGHTS_NAME}, a pickle, is not loaded. "
            "Save the adapter again with `safe_serialization=True`, PEFT's default."
        )
    return None


def check_tensors(
    model: nn.Module, config: CuMAConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> None:
    """
    Refuse tensors that are not those of the model's adapter, before any is copied. An adapter that is being loaded
    beside others is removed again.

    Args:
        model (`nn.Module`): with the adapter in place, its weights still at random.
        state_dict (`dict[str, torch.Tensor]`): the saved tensors, under the model's names.

    Raises:
        ValueError: naming the tensors that are missing, unknown, or of another shape.
    """
    own = re.compile(rf"(^|\.)cuma_[a-z]+\.{re.escape(adapter_name)}\.")
    tensors = dict([*model.named_buffers(), *model.named_parameters(remove_duplicate=False)])
    # Under ZeRO-3 a parameter is empty between uses, and keeps its shape in `ds_shape`.
    shapes = {key: tuple(getattr(value, "ds_shape", value.shape)) for key, value in tensors.items()}
    missing = [key for key in shapes if own.search(key) and key not in state_dict]
    unknown = [key for key in state_dict if key not in shapes]
    reshaped = [
        f"{key} has shape {tuple(value.shape)}, here {shapes[key]}"
        for key, value in state_dict.items()
        if key in shapes and tuple(value.shape) != shapes[key]
    ]
    problems = [
        f"{len(found)} of its tensors {what} ({'; '.join(found[:SHOWN])}{'; …' if len(found) > SHOWN else ''})"
        for what, found in (
            ("are missing", missing),
            ("have no place in this model", unknown),
            ("have another shape", reshaped),
        )
        if found
    ]
    if not problems:
        config.source = None  # from now on an adapter like any other
        return
    advice = "Load it on the base model that it was trained on, or copy its folder again if it is incomplete."
    if config.source is not None:
        # PEFT activates an adapter only after it is loaded: one that is active was there before.
        if isinstance(model, PeftModel) and adapter_name not in model.active_adapters:
            model.delete_adapter(adapter_name)
            advice += f" Adapter {adapter_name!r} was removed again; the others are as they were."
        elif len(model.peft_config) == 1:
            # Which of PEFT's functions made the adapter cannot be told from here.
            advice += (
                " If `PeftModel.from_pretrained` was loading it, reload the base model before you try again: it now "
                "holds an adapter without its weights."
            )
    raise ValueError(f"The saved CuMA adapter does not fit: {', and '.join(problems)}. {advice}")


def base_model_type(model: nn.Module) -> str | None:
    """`model_type` of a transformers model's configuration; `None` for another module."""
    config = getattr(model, "config", None)
    name = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    return name if isinstance(name, str) else None
