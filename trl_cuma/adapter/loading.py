# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Checks of a saved adapter, before anything of it is used. PEFT itself is content with missing and unknown tensors, and
leaves an adapter that failed to load in the model.
"""

from __future__ import annotations

import os
import re

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from .config import CuMAConfig

SHOWN = 3  # tensors that an error names


def check_saved_adapter(model: nn.Module, config: CuMAConfig) -> None:
    """
    Refuse a configuration that was loaded with an adapter which cannot be used with `model`, before the model is
    touched.

    Raises:
        ValueError: if the adapter was made for another type of base model, its weights are a pickle, or its file is
            damaged.
    """
    if config.source is None:
        return
    model_type = base_model_type(model)
    if config.base_model_type is not None and model_type is not None and config.base_model_type != model_type:
        raise ValueError(
            f"The adapter at {config.source} is for a base model of type {config.base_model_type!r}, not "
            f"{model_type!r}. Load it on its own base: `base_model_name_or_path` in its adapter_config.json is "
            f"{config.base_model_name_or_path!r}."
        )
    weights = os.path.join(config.source, SAFETENSORS_WEIGHTS_NAME)
    if os.path.isfile(weights):
        try:
            with safe_open(weights, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{weights} is damaged or was not written to its end ({error}). Copy it again, or load an earlier "
                "checkpoint."
            ) from error
    elif os.path.isfile(os.path.join(config.source, WEIGHTS_NAME)):
        raise ValueError(
            f"The adapter at {config.source} has its weights in {WEIGHTS_NAME}, a pickle, which CuMA does not load. "
            f"Save it again with `safe_serialization=True`, PEFT's default, which writes {SAFETENSORS_WEIGHTS_NAME}."
        )


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
    # Under ZeRO-3 a parameter is empty between uses, and keeps its shape in `ds_shape`.
    expected = {
        key: tuple(getattr(value, "ds_shape", value.shape))
        for key, value in model.named_parameters()
        if own.search(key)
    }
    every = model.state_dict().keys()  # embeddings may have been saved along
    missing = [key for key in expected if key not in state_dict]
    unknown = [key for key in state_dict if key not in every]
    reshaped = [
        f"{key} has shape {tuple(state_dict[key].shape)}, here {shape}"
        for key, shape in expected.items()
        if key in state_dict and tuple(state_dict[key].shape) != shape
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
        if isinstance(model, PeftModel) and len(model.peft_config) > 1:
            model.delete_adapter(adapter_name)
            advice += f" Adapter {adapter_name!r} was removed again; the others are as they were."
        else:
            advice += " Before you try again, reload the base model: it now holds an adapter without its weights."
    raise ValueError(f"The saved CuMA adapter does not fit: {', and '.join(problems)}. {advice}")


def base_model_type(model: nn.Module) -> str | None:
    """`model_type` of a transformers model's configuration; `None` for another module."""
    return BaseTuner.get_model_config(model).get("model_type") if hasattr(model, "config") else None
