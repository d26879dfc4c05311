# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What a run leaves about itself in the adapter's configuration, for the model card."""

from collections.abc import Sized
from typing import Any

import torch
import trl

from ..adapter.card import public_name


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
    args, state = trainer.args, trainer.state
    sized = isinstance(trainer.train_dataset, Sized)
    routing = next((entry for entry in reversed(state.log_history) if "router/utilization" in entry), {})
    record = {
        "trainer": type(trainer).__name__,
        "dataset": public_name(dataset_name),
        "rows": len(trainer.train_dataset) if sized else None,
        "unique_profiles": profiles if sized else None,  # a worker of a streaming run keeps its own count
        "steps": state.global_step,
        "epochs": state.epoch,
        "samples_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "aux_loss_coef": args.cuma_aux_loss_coef,
        "last_aux_loss": routing.get("aux_loss"),  # 1 is an even load
        "last_router_utilization": routing.get("router/utilization"),  # 1 is even
        "last_router_entropy": routing.get("router/entropy"),  # nats
        "last_dead_experts": routing.get("router/dead_experts"),
        "versions": f"trl {trl.__version__}, torch {torch.__version__}",
    }
    return {name: value for name, value in record.items() if value is not None}
