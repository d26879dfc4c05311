# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Rows with a demographic column → batches with `demographic_embeds`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..demographics import DemographicTable


@dataclass
class DemographicCollator:
    """
    A data collator around TRL's own: the batch it makes also holds `demographic_embeds` `(rows, dim)`.

    Args:
        collator (`Callable`): the trainer's collator.
        table (`DemographicTable`): profile → vector.
        column (`str`): the rows' column with the profile.

    Raises:
        KeyError: if a row has no such column.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    table: DemographicTable
    column: str

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        missing = [row for row, example in enumerate(examples) if self.column not in example]
        if missing:
            raise KeyError(
                f"Rows {missing} of the batch have no {self.column!r} column, only {sorted(examples[missing[0]])}. "
                "Add the column to the data set, or name yours with `demographic_column`."
            )
        embeds = self.table([example[self.column] for example in examples])
        batch = self.collator(examples)
        rows = batch["input_ids"].shape[0]
        if rows == 2 * len(examples):  # preference collators stack [chosen; rejected]
            embeds = torch.cat([embeds, embeds])
        elif rows != len(examples):
            raise ValueError(
                f"The collator made {rows} rows of {len(examples)} examples, so a profile no longer belongs to a row. "
                "Set `packing=False` and `padding_free=False`."
            )
        batch["demographic_embeds"] = embeds
        return batch
