# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The two encoders behind one name."""

from typing import Any

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
