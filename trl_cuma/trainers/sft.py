# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""SFT with CuMA."""

import copy
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names

from ..adapter import CuMAConfig
from .collation import TOKEN_PROFILES
from .config import CuMASFTConfig
from .mixin import CuMATrainerMixin
from .packing import keeps_documents_apart, pack_with_profiles


class CuMASFTTrainer(CuMATrainerMixin, SFTTrainer):
    """
    TRL's `SFTTrainer`; the only change is that each document is routed by its demographic column, see
    [`CuMATrainerMixin`], also in packed and padding-free rows; `demographic_dropout` of the training profiles are
    zeroed.

    Raises:
        ValueError: at the first step, if rows are packed (`bfd`, `bfd_split`) or padding-free and the model's
            documents see each other (BLOOM, OPT): its attention mask doesn't follow `position_ids`.
    """

    config_class = CuMASFTConfig
    _keeps_documents_apart: bool | None = None  # not known yet

    def __init__(self, model: Any, **kwargs: Any) -> None:
        self._packed: list[tuple[Any, Any]] = []  # (packed data set, its rows)
        super().__init__(model, **kwargs)

    def _check_before_loading(self, config: CuMAConfig, args: CuMASFTConfig, kwargs: dict[str, Any]) -> None:
        if args.eval_packing and not (args.packing or args.padding_free) and args.packing_strategy != "wrapped":
            raise ValueError(
                "`eval_packing=True` without `packing` lets the documents of a packed row see each other. Set "
                "`packing=True` too, or `eval_packing=False`."
            )
        if args.demographic_dropout and config.routing == "semantic":
            raise ValueError("`demographic_dropout` with `routing='semantic'`, which reads no profile. Leave it out.")

    def _router_loss_scale(self, num_items_in_batch: Any) -> float:
        # With `num_items_in_batch` Trainer leaves the division by the accumulation steps to the loss.
        return 1.0 if num_items_in_batch is None else 1 / self.current_gradient_accumulation_steps

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if TOKEN_PROFILES not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, TOKEN_PROFILES]

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Dataset | IterableDataset:
        if not (packing and self._routed):
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if args.max_length is None:
            raise ValueError("When packing is enabled, `max_length` can't be `None`: it is the packed rows' length.")
        if any(dataset is packed for packed, _ in self._packed):  # `evaluate` got one that is prepared
            return dataset
        if TOKEN_PROFILES in get_dataset_column_names(dataset):
            raise ValueError(
                "The data set was packed by another trainer, whose table of profiles is not this one's. Pass the rows "
                "before packing."
            )
        rows = dataset
        # TRL drops all columns but tokens and labels before it packs: let it do all the rest, and pack here.
        unpacked = copy.copy(args)
        unpacked.max_length = None
        dataset = super()._prepare_dataset(dataset, processing_class, unpacked, False, formatting_func, dataset_name)
        with args.main_process_first(desc="packing"):
            dataset = pack_with_profiles(dataset, self.demographic_table, self._demographic_column, args)
        dataset = dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
        self._packed.append((dataset, rows))
        return dataset

    def _profiled_rows(self, dataset: Any) -> Any:
        rows = next((rows for packed, rows in self._packed if packed is dataset), dataset)
        if rows is not dataset and self.accelerator.num_processes > 1:
            raise ValueError(
                "`cuma_group_by` with packed evaluation rows on several processes, which share out repeated rows that "
                "can't be told from others. Set `eval_packing=False`."
            )
        return rows

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.padding_free and self._keeps_documents_apart is None:
            self._check_documents(model)
        if self._routed and self.args.demographic_dropout and self.model.training:
            # Here and not in the collator, which runs ahead of the steps: a resumed run then drops the same rows.
            embeds = inputs["demographic_embeds"]
            keep = torch.rand(embeds.shape[0], 1, device=embeds.device) >= self.args.demographic_dropout
            inputs["demographic_embeds"] = embeds * keep
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _check_documents(self, model: Any) -> None:
        # At the first step and not before: only now the model is placed, and whole under ZeRO-3 and FSDP.
        collate = self.data_collator.collator if self._routed else self.data_collator
        dim = self.demographic_table.dim if self._routed else 0
        self._keeps_documents_apart = keeps_documents_apart(model, collate, dim)
        if not self._keeps_documents_apart:
            name = type(self.accelerator.unwrap_model(self.model).get_base_model()).__name__
            raise ValueError(
                f"{name} lets the documents of a packed row see each other: its attention mask doesn't follow "
                "`position_ids`. Set `packing=False` and `padding_free=False`, or use a base model that keeps them "
                "apart (Llama, Qwen, Mistral, Gemma, Phi, GPT-2)."
            )
