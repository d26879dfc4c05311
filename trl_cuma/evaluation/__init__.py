# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Metrics of predicted option distributions (`evaluation.metrics` has them all), and baselines to hold against."""

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
