# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Rows with a demographic column → batches with `demographic_embeds`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset

from ..demographics import DemographicTable

TOKEN_PROFILES = "cuma_token_profiles"  # a packed data set's column: the table's row for each token
ROW_NUMBERS = "row_numbers"  # in a batch: where its rows are in the data set, for a report

Example = dict[str, Any]


class RowsWithProfiles(Dataset):
    """
    A data loader's view of a `Dataset`, of which it fetches triples: the table's row for the profile, the data set's
    row, and the example. So no batch reads a profile again. The numbers are in no column, which could be saved, or
    cached, and be read with another table.

    Args:
        dataset (`Dataset`): the rows; they need no demographic column.
        ids (`torch.Tensor`): `(len(dataset),)`, what the table's `lookup` says of each row's profile.
    """

    def __init__(self, dataset: Dataset, ids: torch.Tensor) -> None:
        self.__dict__.update(dataset.__dict__)  # the same rows in the same format; nothing is copied
        self._profile_ids = ids.numpy()

    def __getitems__(self, keys: list[int]) -> list[tuple[int, int, Example]]:
        return list(zip(self._profile_ids[keys].tolist(), keys, super().__getitems__(keys), strict=True))


@dataclass
class DemographicCollator:
    """
    A data collator around TRL's own: the batch it makes also holds `demographic_embeds` `(rows, dim)`; where rows hold
    several documents (packing, padding-free), `(documents, dim)` and `demographic_ids` `(rows, seq)`, each token's
    document, -1 for padding. It takes examples with a demographic column, or what [`RowsWithProfiles`] gives.

    Args:
        collator (`Callable`): the trainer's collator.
        table (`DemographicTable`): profile → vector.
        column (`str`): the rows' column with the profile.
        rows_per_example (`int`): rows that the collator makes of each: 2 where it stacks [chosen; rejected].

    Raises:
        KeyError: if a row has no such column.
        ValueError: if the collator makes other rows, or pads packed rows on the left.
    """

    collator: Callable[[list[Example]], dict[str, Any]]
    table: DemographicTable
    column: str
    rows_per_example: int = 1

    def __call__(self, examples: list[Example] | list[tuple[int, int, Example]]) -> dict[str, Any]:
        known = {}
        if isinstance(examples[0], tuple):
            known[ROW_NUMBERS] = torch.tensor([row for _, row, _ in examples])
            ids = [profile for profile, _, _ in examples]
            examples = [example for _, _, example in examples]
        elif TOKEN_PROFILES in examples[0]:
            batch = self.collator(examples)
            return batch | self._by_document([torch.tensor(example[TOKEN_PROFILES]) for example in examples], batch)
        else:
            ids = self._lookup(examples)
        batch = self.collator(examples)
        if _is_joined(batch):
            per_token = [torch.full((len(e["input_ids"]),), row) for row, e in zip(ids, examples, strict=True)]
            return batch | known | self._by_document(per_token, batch)
        rows = batch["input_ids"].shape[0]
        if rows != self.rows_per_example * len(examples):
            expected = "two rows, [chosen; rejected]," if self.rows_per_example == 2 else "one row"
            raise ValueError(
                f"The collator made {rows} rows of {len(examples)} examples, so a profile no longer belongs to a row. "
                f"Pass a `data_collator` that makes {expected} of each example."
            )
        # Of so few rows numpy makes a tensor in less time than torch.
        embeds = self.table.embeds.numpy().take(ids * self.rows_per_example, axis=0)
        return batch | known | {"demographic_embeds": torch.from_numpy(embeds)}

    def _lookup(self, examples: list[Example]) -> list[int]:
        missing = [row for row, example in enumerate(examples) if self.column not in example]
        if missing:
            raise KeyError(
                f"Rows {missing} of the batch have no {self.column!r} column, only {sorted(examples[missing[0]])}. "
                "Add the column to the data set, or name yours with `demographic_column`."
            )
        return self.table.lookup([example[self.column] for example in examples]).tolist()

    def _by_document(self, per_token: list[torch.Tensor], batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        if _is_joined(batch):
            per_token = [torch.cat(per_token)]
        ids = torch.full(batch["input_ids"].shape, -1)
        for row, values in zip(ids, per_token, strict=True):
            row[: len(values)] = values
        if "attention_mask" in batch and not torch.equal(ids >= 0, batch["attention_mask"].bool()):
            raise ValueError("The collator padded packed rows on the left. Pass one that pads on the right.")
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
        if "position_ids" in batch:
            starts |= batch["position_ids"] == 0
        starts &= ids >= 0
        document = starts.flatten().cumsum(0).view_as(ids) - 1
        return {
            "demographic_embeds": self.table.embeds[ids[starts]],
            "demographic_ids": document.masked_fill(ids < 0, -1),
        }


def _is_joined(batch: dict[str, Any]) -> bool:
    """Whether the examples were joined to one row, whose documents `position_ids` tell apart."""
    return "attention_mask" not in batch and "position_ids" in batch and batch["input_ids"].shape[0] == 1
