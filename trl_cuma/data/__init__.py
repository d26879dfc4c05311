# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Survey and preference data in TRL's dataset formats, with a `demographic` column: converters of public data sets,
splits without leakage, and a simulated survey.
"""

from .community_alignment import convert_community_alignment
from .conversion import Conversion
from .duplicates import near_duplicate_groups
from .global_opinions import load_global_opinions
from .global_opinions_rows import convert_global_opinions
from .leakage import assert_disjoint
from .people import canonical_people
from .prism import convert_prism
from .prompts import TEMPLATES, PromptFormat
from .report import Report
from .simulated import simulate_survey
from .splits import SplitOptions
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
from .worldvaluesbench import convert_worldvaluesbench

__all__ = [
    "OPTION_LETTERS",
    "TEMPLATES",
    "Answers",
    "Cells",
    "Conversion",
    "PromptFormat",
    "Question",
    "Report",
    "SplitOptions",
    "Survey",
    "assert_disjoint",
    "canonical_people",
    "convert_community_alignment",
    "convert_global_opinions",
    "convert_prism",
    "convert_worldvaluesbench",
    "format_completion",
    "format_prompt",
    "load_global_opinions",
    "near_duplicate_groups",
    "simulate_survey",
    "to_preference_dataset",
    "to_sft_dataset",
]
