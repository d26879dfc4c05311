# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The reference model of DPO and KTO."""

from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher
from peft import PeftModel
from torch import nn

from ..adapter import CuMAConfig


class ReferenceMixin:
    """
    Put before [`CuMATrainerMixin`] where TRL's trainer has a reference: an explicit `ref_model`, a plain model, gets
    no profiles, and the key of cached log-probabilities also holds each row's vector.

    Raises:
        TypeError: if `ref_model` is not a model.
        ValueError: if it has an adapter; without one, if `cuma_reset_router` is set: the reference is a copy of the
            adapter, and reads the vectors that the routers were trained on.
    """

    def __init__(self, *args: Any, ref_model: Any = None, **kwargs: Any) -> None:
        if isinstance(ref_model, PeftModel):
            raise ValueError(
                "`ref_model` has an adapter, whose weights TRL's reference would go past. Leave `ref_model` out and "
                "name the adapter with `cuma_adapter_path`: its frozen copy is then the reference."
            )
        if ref_model is not None and not isinstance(ref_model, nn.Module):
            raise TypeError(f"`ref_model` must be a model, got {type(ref_model).__name__}. Load it first.")
        if ref_model is not None:
            ref_model.register_forward_pre_hook(_drop_profiles, with_kwargs=True)
        super().__init__(*args, ref_model=ref_model, **kwargs)

    def _check_before_loading(self, config: CuMAConfig, args: Any, kwargs: dict[str, Any]) -> None:
        if args.cuma_reset_router and kwargs.get("ref_model") is None:
            raise ValueError(reset_needs_no_reference())
        super()._check_before_loading(config, args, kwargs)

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        # TRL's cache key knows the model and the data set, but not whose vector each row gets.
        model_hash = self._precompute_model_hash
        if self._routed and isinstance(dataset, Dataset):
            vectors = self.demographic_table(dataset[self._demographic_column])
            self._precompute_model_hash = Hasher.hash((model_hash, vectors))
        try:
            return super()._precompute_ref_logps(dataset, *args, **kwargs)
        finally:
            self._precompute_model_hash = model_hash


def reset_needs_no_reference() -> str:
    """Why routers can't start anew in a run whose reference is a copy of the adapter."""
    return (
        "`cuma_reset_router=True` in a run whose reference is a copy of the adapter: it would have new routers too, "
        "and be no reference. Reset the routers in SFT first, and go on from that adapter."
    )


def _drop_profiles(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name != "demographic_embeds"}
