# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Reward models with CuMA."""

from trl import RewardTrainer

from .config import CuMARewardConfig
from .mixin import CuMATrainerMixin


class CuMARewardTrainer(CuMATrainerMixin, RewardTrainer):
    """
    TRL's `RewardTrainer`; the only change is that each pair is routed by its demographic column, see
    [`CuMATrainerMixin`].
    """

    config_class = CuMARewardConfig
    task_type = "SEQ_CLS"
