# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""People to vectors: profiles, encoders, and the table of unique profiles."""

from .encoders import DemographicEncoder, FieldEncoder, TextEncoder, encoder_from_state, load_demographic_encoder
from .profile import MISSING_VALUES, DemographicProfile
from .table import DemographicTable

__all__ = [
    "MISSING_VALUES",
    "DemographicEncoder",
    "DemographicProfile",
    "DemographicTable",
    "FieldEncoder",
    "TextEncoder",
    "encoder_from_state",
    "load_demographic_encoder",
]
