# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Rewards for GRPO that know whom an answer is for: a judge over any OpenAI-compatible endpoint, and survey data."""

from .group_likelihood import GroupLikelihoodReward, parse_option
from .judge import ProfileJudge
from .judge_ledger import JudgeError, JudgeStats
from .verdict import JUDGE_TEMPLATE, parse_verdict

__all__ = [
    "JUDGE_TEMPLATE",
    "GroupLikelihoodReward",
    "JudgeError",
    "JudgeStats",
    "ProfileJudge",
    "parse_option",
    "parse_verdict",
]
