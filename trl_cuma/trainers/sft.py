# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""SFT with CuMA."""

from typing import Any

from torch.utils.data import DataLoader
from trl import SFTTrainer

from .collation import DemographicCollator
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

    def get_train_dataloader(self) -> DataLoader:
        collator = self.data_collator
        if not self.args.demographic_dropout or not isinstance(collator, DemographicCollator):
            return super().get_train_dataloader()
        self.data_collator = DemographicCollator(
            collator.collator, collator.table, collator.column, dropout=self.args.demographic_dropout
        )
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator  # evaluation sees every profile
