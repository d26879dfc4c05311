# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The two encoders behind one name."""

import os
from typing import Any

from peft import PeftConfig

from .field_encoder import FieldEncoder
from .text_encoder import TextEncoder

DemographicEncoder = TextEncoder | FieldEncoder


def encoder_from_state(state: dict[str, Any]) -> DemographicEncoder:
    """
    The fitted encoder that a saved state describes, chosen by `state["type"]`.

    Args:
        state (`dict[str, Any]`):
            What an encoder's `state()` returned, for example an adapter's `CuMAConfig.demographic_encoder`.

    Raises:
        ValueError: The type is neither `"text"` nor `"field"`, or the state is incomplete or was changed.
    """
    if state.get("type") == "text":
        return TextEncoder.from_state(state)
    if state.get("type") == "field":
        return FieldEncoder.from_state(state)
    raise ValueError(f'The encoder state has type {state.get("type")!r}, expected "text" or "field".')


def load_demographic_encoder(adapter_path: str | os.PathLike, **kwargs: Any) -> DemographicEncoder:
    """
    The fitted encoder of a saved adapter: what turns a profile into the vector that its routers know.

    Args:
        adapter_path (`str` or `os.PathLike`): the adapter's folder, or its id on the Hub.
        kwargs: for the Hub: `revision`, `subfolder`, `token`, `cache_dir`, …

    Raises:
        ValueError: if there is no CuMA adapter, it was trained on ready-made vectors or without profiles, or its
            encoder's state was changed.
    """
    config = PeftConfig.from_pretrained(os.fspath(adapter_path), **kwargs)
    if config.peft_type != "CUMA":
        raise ValueError(f"{adapter_path} holds no CuMA adapter (its peft_type is {config.peft_type}).")
    if config.demographic_encoder is None:
        reason = (
            "reads no profile: call the model without `demographic_embeds`"
            if config.routing == "semantic"
            else f"was trained on ready-made vectors: pass your own, of {config.demographic_dim} entries"
        )
        raise ValueError(f"The adapter at {adapter_path} {reason}.")
    return encoder_from_state(config.demographic_encoder)
