# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The reference model of DPO and KTO."""

from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher
from peft import PeftModel


class ReferenceMixin:
    """
    Put between [`CuMATrainerMixin`] and a TRL trainer with a reference: an explicit `ref_model`, a plain model, gets
    no profiles, and the key of cached log-probabilities also holds how profiles become vectors.

    Raises:
        ValueError: if `ref_model` has an adapter.
    """

    def __init__(self, *args: Any, ref_model: Any = None, **kwargs: Any) -> None:
        if isinstance(ref_model, PeftModel):
            raise ValueError(
                "`ref_model` has an adapter, whose weights TRL's reference would go past. Leave `ref_model` out and "
                "name the adapter with `cuma_adapter_path`: its frozen copy is then the reference."
            )
        if ref_model is not None:
            ref_model.register_forward_pre_hook(_drop_profiles, with_kwargs=True)
        super().__init__(*args, ref_model=ref_model, **kwargs)

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        # TRL's cache key knows the model and the data set, but not how profiles become vectors.
        model_hash = self._precompute_model_hash
        if self._routed and self.demographic_table.encoder is not None:
            self._precompute_model_hash = Hasher.hash((model_hash, self.demographic_table.encoder.fingerprint))
        try:
            return super()._precompute_ref_logps(dataset, *args, **kwargs)
        finally:
            self._precompute_model_hash = model_hash


def _drop_profiles(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {name: value for name, value in kwargs.items() if name != "demographic_embeds"}
