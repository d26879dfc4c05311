# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Metrics and their intervals: pure functions of numpy arrays.

| module | about |
|---|---|
| `cells` | a predicted option distribution against the true one, per (question, profile) cell |
| `pooled` | ratios over many cells: information explained, collapse, spread, calibration |
| `choices` | predicted answers against those of individuals; WorldValuesBench's own EMD |
| `groups` | how evenly groups are served, without the sampling noise |
| `stereotypes` | differences between profiles exaggerated, within a profile flattened |
| `diversity` | variety of texts between profiles over within a profile |
| `intervals` | bootstrap over clusters, t, sign flips, Wilson, prediction, numbers of worlds |
"""

from .cells import (
    answer_distributions,
    emd,
    entropy,
    expected_accuracy,
    gap_closed,
    kl,
    nll,
    summarise_cells,
    weighted_mean,
)
from .choices import accuracy, country_macro_accuracy, macro_f1, wvb_emd
from .diversity import distinct_n, distinct_ratio
from .groups import inequity, inequity_table, scores_by_group
from .intervals import (
    Estimate,
    bootstrap_interval,
    bootstrap_weights,
    detectable_effect,
    prediction_interval,
    sign_flip_test,
    t_interval,
    wilson_interval,
    worlds_needed,
)
from .pooled import (
    calibration,
    collapse_index,
    entropy_bias,
    kl_explained,
    profile_information,
    spread_ratio,
)
from .stereotypes import neutral_divergence, stereotyping_table

__all__ = [
    "Estimate",
    "accuracy",
    "answer_distributions",
    "bootstrap_interval",
    "bootstrap_weights",
    "calibration",
    "collapse_index",
    "country_macro_accuracy",
    "detectable_effect",
    "distinct_n",
    "distinct_ratio",
    "emd",
    "entropy",
    "entropy_bias",
    "expected_accuracy",
    "gap_closed",
    "inequity",
    "inequity_table",
    "kl",
    "kl_explained",
    "macro_f1",
    "neutral_divergence",
    "nll",
    "prediction_interval",
    "profile_information",
    "scores_by_group",
    "sign_flip_test",
    "spread_ratio",
    "stereotyping_table",
    "summarise_cells",
    "t_interval",
    "weighted_mean",
    "wilson_interval",
    "worlds_needed",
    "wvb_emd",
]
