# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""KTO with CuMA."""

import functools
from typing import Any

from trl import KTOTrainer

from .config import CuMAKTOConfig
from .mixin import CuMATrainerMixin
from .reference import ReferenceMixin


class CuMAKTOTrainer(ReferenceMixin, CuMATrainerMixin, KTOTrainer):
    """
    TRL's `KTOTrainer`; the only change is that each row is routed by its demographic column, see
    [`CuMATrainerMixin`]. The reference is chosen as in DPO. The mismatched completions of the KL term are those of
    other rows, answered to this row's person: they get the profile that goes with the prompt.
    """

    config_class = CuMAKTOConfig

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> Any:
        # Other rows' completions: not for this evaluation's routing statistics.
        routing, self._group_routing = self._group_routing, None
        try:
            return super()._compute_kl_logps(model, batch)
        finally:
            self._group_routing = routing

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        # The forwards for precomputed log-probabilities pass ids, mask and labels only.
        if self._routed:
            model = functools.partial(model, demographic_embeds=inputs["demographic_embeds"])
        return super().compute_ref_log_probs(model, inputs)
