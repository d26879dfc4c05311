# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""DPO with CuMA."""

from trl import DPOTrainer

from .config import CuMADPOConfig
from .mixin import CuMATrainerMixin
from .reference import ReferenceMixin


class CuMADPOTrainer(ReferenceMixin, CuMATrainerMixin, DPOTrainer):
    """
    TRL's `DPOTrainer`; the only change is that each pair is routed by its demographic column, see
    [`CuMATrainerMixin`]. The reference is TRL's own choice: the base model for a new adapter, a frozen copy for one
    that was trained before; it sees the same profiles.
    """

    config_class = CuMADPOConfig
    rows_per_example = 2
