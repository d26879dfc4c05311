# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Metrics of predicted option distributions, and baselines to hold them against."""

from .baselines import AdditiveModel, FactorModel
from .metrics import emd, entropy, expected_accuracy, gap_closed, kl, summarise_cells

__all__ = [
    "AdditiveModel",
    "FactorModel",
    "emd",
    "entropy",
    "expected_accuracy",
    "gap_closed",
    "kl",
    "summarise_cells",
]
