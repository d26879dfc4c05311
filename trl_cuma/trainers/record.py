# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What a run leaves about itself in the adapter's configuration, and the model card."""

import os
from collections.abc import Sized
from typing import Any

import torch
import trl

from ..adapter import CuMAConfig
from ..adapter.card import write_card
from ..adapter.card_text import public_name
from ..demographics import DemographicTable, FieldEncoder


class RecordMixin:
    """Each saved adapter tells of all its training, and has a card."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._record_training()
        super().save_model(output_dir, _internal_call)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write the adapter's card into `output_dir`, where TRL's would tell of a pipeline that knows no profile.

        Args:
            model_name, tags: not used: the adapter's folder is its name.
            dataset_name (`str`, *optional*): the data set's name; it also goes into the cards of later checkpoints.
        """
        self._dataset_name = dataset_name or self._dataset_name
        self._record_training()
        if self.is_world_process_zero():
            os.makedirs(self.args.output_dir, exist_ok=True)
            write_card(self.args.output_dir, self._adapter_config())

    def _adapter_config(self) -> CuMAConfig:
        return self.accelerator.unwrap_model(self.model).active_peft_config

    def _record_training(self) -> None:
        if not self.state.global_step:
            return
        record = training_record(self, self._dataset_name, self.demographic_table if self._routed else None)
        self._adapter_config().training = [*self._earlier_training, record]


def training_record(trainer: Any, dataset_name: str | None, table: DemographicTable | None) -> dict[str, Any]:
    """
    Numbers and names of a run so far; nothing of any person.

    Args:
        trainer: a CuMA trainer.
        dataset_name (`str`, *optional*): by default the name that `datasets` knows. Of a path, the last part is kept.
        table ([`DemographicTable`], *optional*): the unique profiles in its data, and their encoder.
    """
    info = getattr(trainer.train_dataset, "info", None)
    encoder = None if table is None else table.encoder
    vocabulary = encoder.state()["vocabulary"] if isinstance(encoder, FieldEncoder) else None
    if dataset_name is None and info is not None and info.dataset_name != info.builder_name:  # equal for plain files
        dataset_name = info.dataset_name
    args, state = trainer.args, trainer.state
    sized = isinstance(trainer.train_dataset, Sized)
    routing = next((entry for entry in reversed(state.log_history) if "router/utilization" in entry), {})
    record = {
        "trainer": type(trainer).__name__,
        "dataset": public_name(dataset_name),
        "dataset_license": None if info is None else info.license or None,
        "rows": len(trainer.train_dataset) if sized else None,
        # A worker of a streaming run keeps its own count.
        "unique_profiles": len(table.embeds) if table is not None and sized else None,
        # The values themselves are in the configuration, once; a later run may have another encoder.
        "known_values": vocabulary and {name: len(values) for name, values in vocabulary.items()},
        "steps": state.global_step,
        "epochs": state.epoch,
        "samples_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "aux_loss_coef": args.cuma_aux_loss_coef,
        "aux_loss_type": args.cuma_aux_loss_type,
        "last_aux_loss": routing.get("aux_loss"),  # at an even load 1, or "published": the number of routers
        "last_router_utilization": routing.get("router/utilization"),  # 1 is even
        "last_router_entropy": routing.get("router/entropy"),  # nats
        "last_dead_experts": routing.get("router/dead_experts"),
        "versions": f"trl {trl.__version__}, torch {torch.__version__}",
    }
    return {name: value for name, value in record.items() if value is not None}
