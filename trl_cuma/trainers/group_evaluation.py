# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Evaluation that also tells, by group, where the routers send people's tokens."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..adapter.routing import ROUTING_BY_PROFILE
from .routing import GroupRouting


class GroupEvaluationMixin:
    """With `cuma_group_by`, each evaluation takes the [`GroupRouting`] of the policy's forwards, for `log`."""

    _group_routing: GroupRouting | None = None  # of the evaluation that is running
    _group_prefix: str | None = None

    def _make_group_routing(self, dataset: Any, args: Any) -> GroupRouting:
        return GroupRouting(
            dataset,
            self.demographic_table,
            args.demographic_column,
            args.demographic_person_column,
            args.cuma_group_by,
            args.cuma_min_group_size,
            rows_per_example=self.rows_per_example,
        )

    def _profiled_rows(self, dataset: Any) -> Any:
        """The data set with the profiles of `dataset`'s rows: itself, unless packing took the column away."""
        return dataset

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        if not self.args.cuma_group_by:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if isinstance(eval_dataset, Mapping):  # as `Trainer` does; each has a prefix of its own
            metrics: dict[str, float] = {}
            for name, dataset in eval_dataset.items():
                metrics |= self.evaluate(dataset, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        self._group_prefix = metric_key_prefix
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._group_routing = self._group_prefix = None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if self._group_prefix is not None:  # here the rows are prepared: truncation may have taken some away
            dataset = self.eval_dataset if eval_dataset is None else eval_dataset
            if isinstance(eval_dataset, str):
                dataset = self.eval_dataset[eval_dataset]
            self._group_routing = self._make_group_routing(self._profiled_rows(dataset), self.args)
        return super().get_eval_dataloader(eval_dataset)

    def _observed(self, model: Any) -> Callable:
        """The model, of whose forwards the routing statistics are taken in."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._group_routing is None:
                return model(*args, **kwargs)
            outputs = model(*args, output_routing_by_profile=True, **kwargs)
            embeds = kwargs["demographic_embeds"]
            rows = self._rows_that_count(len(embeds)).to(embeds.device)
            self._group_routing.add(embeds[rows], outputs["router_load"][rows], outputs["router_entropy"][rows])
            rest = {name: value for name, value in outputs.items() if name not in ROUTING_BY_PROFILE}
            return type(outputs)(**rest)

        return forward

    def _rows_that_count(self, rows: int) -> torch.Tensor:
        """Boolean `(rows,)`: in a distributed run's last batch some rows repeat others, so that all have as many."""
        state, examples = self.accelerator.gradient_state, rows // self.rows_per_example
        repeated = self.accelerator.num_processes > 1 and state.end_of_dataloader and state.remainder > 0
        number = torch.arange(rows) % max(examples, 1) + self.accelerator.process_index * examples
        return number < state.remainder if repeated else torch.ones(rows, dtype=torch.bool)
