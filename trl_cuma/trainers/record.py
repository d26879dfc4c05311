# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What a run leaves about itself in the adapter's configuration, for the model card."""

import os
from collections.abc import Sized
from typing import Any

import torch
import trl


def training_record(trainer: Any, dataset_name: str | None, profiles: int | None) -> dict[str, Any]:
    """
    Numbers and names of a run so far; nothing of any person.

    Args:
        trainer: a CuMA trainer.
        dataset_name (`str`, *optional*): by default the name that `datasets` knows. Of a path, the last part is kept.
        profiles (`int`, *optional*): number of unique profiles in its data.
    """
    info = getattr(trainer.train_dataset, "info", None)
    if dataset_name is None and info is not None and info.dataset_name != info.builder_name:  # equal for plain files
        dataset_name = info.dataset_name
    if dataset_name is not None and os.path.exists(dataset_name):
        dataset_name = os.path.basename(os.path.normpath(dataset_name))
    args, state = trainer.args, trainer.state
    routing = next((entry for entry in reversed(state.log_history) if "router/utilization" in entry), {})
    record = {
        "trainer": type(trainer).__name__,
        "data set": dataset_name,
        "rows": len(trainer.train_dataset) if isinstance(trainer.train_dataset, Sized) else None,
        "unique profiles": profiles,
        "steps": state.global_step,
        "epochs": state.epoch,
        "samples a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning rate": args.learning_rate,
        "balance loss coefficient": args.cuma_aux_loss_coef,
        "load-balancing loss at the end (1 is even)": routing.get("aux_loss"),
        "expert utilization at the end (1 is even)": routing.get("router/utilization"),
        "router entropy at the end (nats)": routing.get("router/entropy"),
        "dead experts at the end": routing.get("router/dead_experts"),
        "versions": f"trl {trl.__version__}, torch {torch.__version__}",
    }
    return {name: value for name, value in record.items() if value is not None}
