# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Reward models with CuMA."""

from typing import Any

from transformers import AutoModelForSequenceClassification, PreTrainedModel
from trl import RewardTrainer
from trl.trainer.utils import create_model_from_path

from ..adapter import CuMAConfig
from .config import CuMARewardConfig
from .mixin import CuMATrainerMixin


class CuMARewardTrainer(CuMATrainerMixin, RewardTrainer):
    """
    TRL's `RewardTrainer`; the only change is that each pair is routed by its demographic column, see
    [`CuMATrainerMixin`]: one reward model for people who disagree. A new adapter has the task type `SEQ_CLS`, with
    which PEFT trains and saves the reward head, too.

    Raises:
        ValueError: if the adapter's task type is another, so that the reward head would stay as it was drawn.
    """

    config_class = CuMARewardConfig
    rows_per_example = 2
    task_type = "SEQ_CLS"

    def _check_before_loading(self, config: CuMAConfig, args: Any, kwargs: dict[str, Any]) -> None:
        task_type = getattr(config.task_type, "value", config.task_type)
        if task_type != "SEQ_CLS":
            raise ValueError(
                f"The adapter has `task_type={task_type!r}`, with which PEFT neither trains nor saves the reward "
                "head. Make it with `task_type='SEQ_CLS'`, or leave that to the trainer (in a recipe: "
                "`lora_task_type: SEQ_CLS`)."
            )

    @staticmethod
    def load_base(name: str, **kwargs: Any) -> PreTrainedModel:
        return create_model_from_path(name, AutoModelForSequenceClassification, num_labels=1, **kwargs)
