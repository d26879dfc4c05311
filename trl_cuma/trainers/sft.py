# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""SFT with CuMA."""

from typing import Any

import torch
from trl import SFTTrainer

from .config import CuMASFTConfig
from .mixin import CuMATrainerMixin


class CuMASFTTrainer(CuMATrainerMixin, SFTTrainer):
    """
    TRL's `SFTTrainer`; the only change is that each row is routed by its demographic column, see
    [`CuMATrainerMixin`], of whose profiles `demographic_dropout` are zeroed in training.
    """

    config_class = CuMASFTConfig

    def _router_loss_scale(self, num_items_in_batch: Any) -> float:
        # With `num_items_in_batch` Trainer leaves the division by the accumulation steps to the loss.
        return 1.0 if num_items_in_batch is None else 1 / self.current_gradient_accumulation_steps

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self._routed and self.args.demographic_dropout and self.model.training:
            # Here and not in the collator, which runs ahead of the steps: a resumed run then drops the same rows.
            embeds = inputs["demographic_embeds"]
            keep = torch.rand(embeds.shape[0], 1, device=embeds.device) >= self.args.demographic_dropout
            inputs["demographic_embeds"] = embeds * keep
        return super().compute_loss(model, inputs, *args, **kwargs)
