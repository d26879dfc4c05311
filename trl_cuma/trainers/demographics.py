# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Which encoder a run uses, and the adapter configuration that goes with it."""

import os
from typing import Any

from datasets import Dataset, IterableDataset
from huggingface_hub.constants import HF_HOME
from trl.data_utils import get_dataset_column_names

from ..adapter import CuMAConfig
from ..adapter.config import DEFAULT_DEMOGRAPHIC_DIM
from ..demographics import DemographicTable, FieldEncoder, TextEncoder, encoder_from_state
from ..demographics.profile import is_vector
from .config import CuMATrainingArguments

Encoder = FieldEncoder | TextEncoder


def check_demographic_column(dataset: Dataset | IterableDataset, column: str, name: str) -> None:
    """Raise `ValueError`, naming the column and those present, if `dataset` hasn't got it."""
    columns = get_dataset_column_names(dataset)
    if column not in columns:
        raise ValueError(
            f"The {name} data set has no {column!r} column; it has {sorted(columns)}. CuMA routes each row by its "
            "profile: add the column (text, a mapping from field to value, or a vector), or name yours with "
            "`demographic_column`. A plain MoE-LoRA without profiles is `routing='semantic'`."
        )


def resolve_encoder(
    config: CuMAConfig, encoder: Encoder | None, dataset: Dataset | IterableDataset, args: CuMATrainingArguments
) -> Encoder | None:
    """
    The encoder of a run, fitted: the one that the adapter was trained with, or the user's, or the paper's text
    encoder. `None` where the column holds vectors. With `cuma_reset_router` the user's, or vectors, come first.

    Raises:
        ValueError: if the adapter was trained with another encoder, or an unfitted one meets a streaming data set.
    """
    vectors = is_vector(_first_known(dataset, args.demographic_column))
    changes = args.cuma_reset_router and (encoder is not None or vectors)
    if config.demographic_encoder is not None and not changes:
        if vectors:
            raise ValueError(
                f"The {args.demographic_column!r} column holds vectors, but the adapter was trained with an "
                "encoder, and nothing tells that it made them. Pass profiles, or set `cuma_reset_router=True`, which "
                "trains the routers anew."
            )
        if encoder is None:
            return encoder_from_state(config.demographic_encoder)
        expected = config.demographic_encoder["fingerprint"]
        if not encoder.is_fitted or encoder.fingerprint != expected:
            raise ValueError(
                "`demographic_encoder` is not the encoder that this adapter was trained with (fingerprint "
                f"{encoder.fingerprint[:12] if encoder.is_fitted else 'none: not fitted'}, the adapter's "
                f"{expected[:12]}), so its vectors would mean nothing to the router. Leave `demographic_encoder` out: "
                "the adapter keeps its own. To change it, set `cuma_reset_router=True`, which trains the routers anew."
            )
        return encoder
    if vectors:
        if encoder is not None:
            raise ValueError(
                f"The {args.demographic_column!r} column holds vectors, which need no encoder. Leave "
                "`demographic_encoder` out (in a recipe: `cuma_encoder: none`), or use a column of text or mappings."
            )
        return None
    encoder = encoder or TextEncoder()
    if not encoder.is_fitted:
        if args.cuma_adapter_path is not None and not args.cuma_reset_router:
            raise ValueError(
                f"The adapter in {args.cuma_adapter_path} was trained on vectors and keeps no encoder, but the "
                f"{args.demographic_column!r} column holds profiles. Pass vectors made as those were, or the fitted "
                "`demographic_encoder` that made them, or set `cuma_reset_router=True` to train the routers anew."
            )
        if not isinstance(dataset, Dataset):
            raise ValueError(
                "A streaming data set cannot fit the demographic encoder: it would have to be read twice. Fit it "
                "first, `encoder.fit(profiles)`, and pass it as `demographic_encoder`."
            )
        people = args.demographic_person_column
        encoder.fit(
            dataset[args.demographic_column],
            person_ids=dataset[people] if people in dataset.column_names else None,
            show_progress=not args.disable_tqdm,
        )
    return encoder


def check_resumed_encoder(checkpoint: str, encoder: Encoder | None) -> None:
    """Raise `ValueError` if the checkpoint's routers were trained on another encoder's vectors than this run's."""
    state = CuMAConfig.from_pretrained(checkpoint).demographic_encoder
    saved, own = (state or {}).get("fingerprint"), None if encoder is None else encoder.fingerprint
    if saved != own:
        raise ValueError(
            f"The checkpoint {checkpoint} was trained with another demographic encoder (fingerprint "
            f"{(saved or 'none: vectors')[:12]}) than this run's ({(own or 'none: vectors')[:12]}): the data or the "
            "settings have changed. Resume with those of the checkpoint, or go on from it as a new run with "
            "`cuma_adapter_path`, which keeps its encoder."
        )


def _first_known(dataset: Dataset | IterableDataset, column: str) -> Any:
    """The first value that is there: it tells vectors from profiles."""
    return next((row[column] for row in dataset.select_columns(column) if row[column] is not None), None)


def adopt_encoder(config: CuMAConfig, encoder: Encoder | None, dim: int, *, injected: bool) -> None:
    """
    Write the vectors' size and the encoder's state into the adapter's configuration.

    Args:
        injected (`bool`): the adapter exists already, so that its size is fixed.

    Raises:
        ValueError: if the configuration names another size.
    """
    if config.demographic_dim is None and not injected:
        config.demographic_dim = dim
    expected = config.demographic_dim or DEFAULT_DEMOGRAPHIC_DIM
    if expected != dim:
        raise ValueError(
            f"`demographic_dim={expected}` in CuMAConfig, but the profiles' vectors have {dim} entries. Leave "
            "`demographic_dim` unset and pass `peft_config` to the trainer, which then sets it."
        )
    if encoder is not None:
        config.demographic_encoder = encoder.state()


def build_table(
    config: CuMAConfig,
    encoder: Encoder | None,
    datasets: dict[str, Dataset | IterableDataset],
    args: CuMATrainingArguments,
) -> DemographicTable:
    """Encode the unique profiles of the data sets once. Streaming ones are encoded as they come."""
    cache_dir = args.demographic_cache_dir or os.path.join(HF_HOME, "trl_cuma", "demographics")
    table = DemographicTable(encoder, missing=config.missing_demographics, cache_dir=cache_dir)
    for name, dataset in datasets.items():
        check_demographic_column(dataset, args.demographic_column, name)
        if isinstance(dataset, Dataset):
            values = dataset[args.demographic_column]
        else:
            values = [_first_known(dataset, args.demographic_column)]
        try:
            with args.main_process_first(desc="demographic table"):  # the others then find the cache
                table.add(values, show_progress=not args.disable_tqdm)
        except (TypeError, ValueError) as error:
            raise type(error)(f"In the {name} data set: {error}") from None
    return table
