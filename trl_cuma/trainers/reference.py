# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Reference log-probabilities that TRL computes once and caches."""

from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher


class PrecomputedReferenceMixin:
    """
    Put between [`CuMATrainerMixin`] and a TRL trainer with `precompute_ref_log_probs`; the only change is that the
    cache's key also holds how profiles become vectors. TRL's knows the model and the data set.
    """

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        model_hash = self._precompute_model_hash
        if self._routed and self.demographic_table.encoder is not None:
            self._precompute_model_hash = Hasher.hash((model_hash, self.demographic_table.encoder.fingerprint))
        try:
            return super()._precompute_ref_logps(dataset, *args, **kwargs)
        finally:
            self._precompute_model_hash = model_hash
