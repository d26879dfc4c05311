# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""axolotl's trainers with CuMA. Apart from the plugin: axolotl makes the arguments' classes once plugins are known."""

from __future__ import annotations

from .axolotl import CuMAPlugin  # isort: skip  # first, since without axolotl it says what to install

from collections.abc import Callable
from typing import Any

from axolotl.core.trainers import AxolotlTrainer
from axolotl.core.trainers.dpo.args import AxolotlDPOConfig
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer
from axolotl.core.training_args import AxolotlTrainingArguments
from axolotl.integrations.base import PluginManager
from torch import nn

from ..demographics import DemographicEncoder
from ..trainers.collation import DemographicCollator
from ..trainers.mixin import CuMATrainerMixin
from ..trainers.reference import ReferenceMixin


def encoder_of_run() -> DemographicEncoder | None:
    """The encoder that the plugin made from the configuration."""
    plugins = PluginManager.get_instance().plugins.values()
    return next(plugin.encoder for plugin in plugins if isinstance(plugin, CuMAPlugin))


class _Recorded:
    """What axolotl saves without `save_model`, and its own arguments of the card."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        self._record_training()  # axolotl then calls the model's `save_pretrained`
        return result

    def create_model_card(self, model_name: str | None = None, dataset_tags: Any = None, **kwargs: Any) -> None:
        """Our card; `dataset_tags` are axolotl's names of the data sets."""
        super().create_model_card(dataset_name=", ".join(dataset_tags or ()) or None)


class _AsModule(nn.Module):
    """The mixin's function around the model, as a module: axolotl and accelerate look at it."""

    def __init__(self, function: Callable, model: nn.Module) -> None:
        super().__init__()
        self.function, self.config = function, model.config
        self.train(model.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


class _BelowMixin(AxolotlTrainer):
    """What [`CuMATrainerMixin`] hands down, as axolotl's trainer takes it."""

    def __init__(self, *args: Any, peft_config: None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # axolotl has made the adapter already

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not isinstance(model, nn.Module):
            model = _AsModule(model, self.accelerator.unwrap_model(self.model))
        return super().compute_loss(model, inputs, *args, **kwargs)


class CuMAAxolotlTrainer(_Recorded, CuMATrainerMixin, _BelowMixin):
    """axolotl's `AxolotlTrainer` (SFT); the only change is that each row is routed by its demographic column."""

    config_class = AxolotlTrainingArguments

    def __init__(self, *, model: Any, **kwargs: Any) -> None:
        super().__init__(model, demographic_encoder=encoder_of_run(), **kwargs)

    def _router_loss_scale(self, num_items_in_batch: Any) -> float:
        # As in `Trainer.training_step`: else it leaves the division by the accumulation steps to the loss.
        divides = num_items_in_batch is None or not self.model_accepts_loss_kwargs
        return 1.0 if divides else 1 / self.current_gradient_accumulation_steps

    @property
    def eval_data_collator(self) -> Callable | None:
        """axolotl's second collator, for evaluation."""
        return self._eval_data_collator

    @eval_data_collator.setter
    def eval_data_collator(self, collator: Callable | None) -> None:
        if self._routed and collator is not None:
            collator = DemographicCollator(
                collator, self.demographic_table, self._demographic_column, self.rows_per_example
            )
        self._eval_data_collator = collator


class CuMAAxolotlDPOTrainer(_Recorded, ReferenceMixin, CuMATrainerMixin, AxolotlDPOTrainer):
    """axolotl's `AxolotlDPOTrainer`; the only change is that each pair is routed by its demographic column."""

    config_class = AxolotlDPOConfig
    rows_per_example = 2

    def __init__(self, model: Any, ref_model: Any = None, **kwargs: Any) -> None:
        super().__init__(model, ref_model=ref_model, demographic_encoder=encoder_of_run(), **kwargs)
