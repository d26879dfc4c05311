# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What a model reads of the people whom it answers: vectors of their profiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..adapter.layer import CuMALayer
from ..demographics import DemographicTable, FieldEncoder, TextEncoder, encoder_from_state
from ..demographics.profile import is_vector, read_profiles

NOT_KNOWN = "nothing that the adapter's encoder knows is known about the person"
"""Why a row is left out that [`can_encode`] says no of."""


def demographic_table(
    model: torch.nn.Module, encoder: FieldEncoder | TextEncoder | None = None
) -> DemographicTable | None:
    """
    The table from profiles to the vectors that a model's active adapter reads: by the encoder that it carries, or by
    the one given. Without either, it takes vectors. `None` for a model that reads no profile now.
    """
    configs = (
        layer.config[name]
        for layer in model.modules()
        if isinstance(layer, CuMALayer) and not layer.disable_adapters
        for name in layer.active_adapters
        if name in layer.config
    )
    config = next((config for config in configs if config.routing != "semantic"), None)
    if config is None:
        return None
    if encoder is None and config.demographic_encoder is not None:
        encoder = encoder_from_state(config.demographic_encoder)
    return DemographicTable(encoder, missing=config.missing_demographics)


def can_encode(table: DemographicTable, demographics: Sequence[Any]) -> np.ndarray:
    """bool, `(rows,)`: of whose profile or vector the encoder knows something, or needs to know nothing."""
    profiles = read_profiles(None if is_vector(value) else value for value in demographics)

    def can(value: Any, profile: Any) -> bool:
        if is_vector(value):
            return True
        if table.encoder is None or profile.is_missing:
            return not profile.is_missing or table.missing == "zero"
        try:
            table.encoder.check([profile], table.missing)
        except ValueError:
            return False
        return True

    return np.array([can(*pair) for pair in zip(demographics, profiles, strict=True)], dtype=bool)


def profile_vectors(
    model: torch.nn.Module, demographics: Sequence[Any], table: DemographicTable | None = None
) -> torch.Tensor | None:
    """
    What a model reads of people: the vectors of their profiles, by its own adapter's encoder.

    Args:
        model (`torch.nn.Module`): With a CuMA adapter or not.
        demographics (`Sequence`): Profiles or vectors, one per row.
        table (`DemographicTable`, *optional*): Makes the vectors instead, for any model.

    Returns:
        `torch.Tensor` of shape `(rows, dim)`: float32, on the CPU; `None` for a model without an active adapter that
        reads profiles.

    Raises:
        ValueError: A row has no profile and the adapter needs one, or it was trained on vectors and gets profiles.
    """
    table = table or demographic_table(model)
    return None if table is None else table(demographics)
