# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Survey data in TRL's dataset formats, with a `demographic` column."""

from .global_opinions import load_global_opinions
from .simulated import simulate_survey
from .survey import (
    OPTION_LETTERS,
    Answers,
    Cells,
    Question,
    Survey,
    format_completion,
    format_prompt,
    to_preference_dataset,
    to_sft_dataset,
)

__all__ = [
    "OPTION_LETTERS",
    "Answers",
    "Cells",
    "Question",
    "Survey",
    "format_completion",
    "format_prompt",
    "load_global_opinions",
    "simulate_survey",
    "to_preference_dataset",
    "to_sft_dataset",
]
