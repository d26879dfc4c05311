# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""DPO with CuMA."""

from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher
from trl import DPOTrainer

from .config import CuMADPOConfig
from .mixin import CuMATrainerMixin


class CuMADPOTrainer(CuMATrainerMixin, DPOTrainer):
    """
    TRL's `DPOTrainer`; the only change is that each pair is routed by its demographic column, see
    [`CuMATrainerMixin`]. The reference is TRL's own choice: the base model for a new adapter, a frozen copy for one
    that was trained before; it sees the same profiles.
    """

    config_class = CuMADPOConfig

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        # TRL's cache key knows the model and the data set, but not how profiles become vectors.
        model_hash = self._precompute_model_hash
        if self._routed and self.demographic_table.encoder is not None:
            self._precompute_model_hash = Hasher.hash((model_hash, self.demographic_table.encoder.fingerprint))
        try:
            return super()._precompute_ref_logps(dataset, *args, **kwargs)
        finally:
            self._precompute_model_hash = model_hash
