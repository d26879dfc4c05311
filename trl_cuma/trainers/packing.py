# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Several documents in one row, each with its own profile."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from trl import pack_dataset

from ..demographics import DemographicTable
from .collation import TOKEN_PROFILES


@dataclass
class TokenProfiles:
    """For `Dataset.map(batched=True)`: the table's row of the profile, for each token. Its copies can be pickled."""

    table: DemographicTable
    column: str

    def __call__(self, batch: dict[str, list]) -> dict[str, list[list[int]]]:
        ids = self.table.lookup(batch[self.column]).tolist()
        return {TOKEN_PROFILES: [[row] * len(tokens) for row, tokens in zip(ids, batch["input_ids"], strict=True)]}


def pack_with_profiles(
    dataset: Dataset | IterableDataset, table: DemographicTable, column: str, args: Any
) -> Dataset | IterableDataset:
    """
    TRL's `pack_dataset`, with one more list column that it packs in lock-step: the table's row for each token.

    Args:
        dataset: tokenized, not truncated: columns `input_ids`, `labels` and the demographic one.
        args (`SFTConfig`): `max_length`, `packing_strategy`, `dataset_num_proc`.
    """
    map_kwargs: dict[str, Any] = {}
    is_map_style = isinstance(dataset, Dataset)
    if is_map_style:  # the key of what is cached: the ids mean something only with this table
        map_kwargs["new_fingerprint"] = Hasher.hash(
            (dataset._fingerprint, TOKEN_PROFILES, table.lookup(dataset[column]))
        )
    dataset = dataset.map(TokenProfiles(table, column), batched=True, **map_kwargs)
    dataset = dataset.select_columns(["input_ids", "labels", TOKEN_PROFILES])
    map_kwargs = {"num_proc": args.dataset_num_proc, "desc": "Packing the data set"} if is_map_style else {}
    return pack_dataset(dataset, args.max_length, args.packing_strategy, map_kwargs)


@torch.no_grad()
def keeps_documents_apart(model: Any, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], dim: int) -> bool:
    """
    Whether the documents of a joined row don't see each other. Measured, since no attribute of a model tells: the
    second of two documents must not change with the first, unlike the end of one document with its beginning.

    Args:
        model (`nn.Module`): the model, in the state that it is trained in.
        collate (`Callable`): TRL's padding-free collator.
        dim (`int`): length of the profiles' vectors, 0 where there are none.
    """

    def end(*documents: list[int]) -> torch.Tensor:
        batch = collate([{"input_ids": tokens} for tokens in documents])
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items() if k != "labels"}
        if dim:
            batch["demographic_embeds"] = torch.zeros(1, dim, device=device)
            batch["demographic_ids"] = torch.zeros_like(batch["input_ids"])
        total = sum(map(len, documents))
        return model(**batch, use_cache=False).logits[0, total - 2 : total].float()

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        apart = (end([1, 2], [2, 3]) - end([3, 2], [2, 3])).abs().max()
        joined = (end([1, 2, 2, 3]) - end([3, 2, 2, 3])).abs().max()
    finally:
        model.train(was_training)
    return bool(apart <= 0.1 * joined)  # rounding (quantized bases: other tokens' scales) is far below
