# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Which adapter a run trains: a new one, or a trained one to continue."""

from collections.abc import Callable
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoProcessor
from trl.trainer.utils import get_config_model_id

from ..adapter import CuMAConfig


def adapter_config(model: Any, peft_config: PeftConfig | None) -> CuMAConfig:
    """
    The configuration of the adapter that is trained: `peft_config`, or that of the model's active adapter.

    Raises:
        TypeError: if there is none, or it is not CuMA's.
    """
    config = peft_config
    if config is None and isinstance(model, PeftModel):
        config = model.active_peft_config
    if not isinstance(config, CuMAConfig):
        raise TypeError(
            f"A CuMA trainer needs a CuMA adapter, got {'none' if config is None else type(config).__name__}. Pass "
            "`peft_config=CuMAConfig(...)`, a model with a CuMA adapter, or `cuma_adapter_path`."
        )
    return config


def load_adapter(
    model: Any, config: CuMAConfig, args: Any, trainer_kwargs: dict[str, Any], load_base: Callable[..., Any]
) -> PeftModel:
    """
    The base model with the trained adapter of `args.cuma_adapter_path`, trainable, as `default`; `config` is its own.

    Where `model` is a name, the base is loaded here as TRL would have, by `load_base`: `quantization_config` is taken
    out of `trainer_kwargs`, and a missing `processing_class` put in, since both belong to loading.

    Raises:
        ValueError: if the model has an adapter already.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "`cuma_adapter_path` was passed with a model that has an adapter. Pass the base model, or its name."
        )
    if isinstance(model, str):
        init_kwargs = dict(args.model_init_kwargs or {})
        quantization_config = trainer_kwargs.pop("quantization_config", None)
        if quantization_config is not None:
            if "quantization_config" in init_kwargs:
                raise ValueError(
                    "`quantization_config` was passed both to the trainer and in `model_init_kwargs`. Leave one out."
                )
            init_kwargs["quantization_config"] = quantization_config
        if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
            init_kwargs["device_map"] = None  # as TRL does: "auto" fails there
        init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
        model = load_base(model, **init_kwargs)
        if trainer_kwargs.get("processing_class") is None:
            trainer_kwargs["processing_class"] = AutoProcessor.from_pretrained(
                get_config_model_id(model.config),
                revision=init_kwargs.get("revision"),
                trust_remote_code=args.trust_remote_code,
            )
    return PeftModel.from_pretrained(model, args.cuma_adapter_path, config=config, is_trainable=True)
