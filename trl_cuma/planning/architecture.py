# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A model's id, folder or config.json → the real model and adapter on the meta device: shapes, no weights."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from ..adapter import CuMAConfig
from ..extras import needs_extra

CONFIGS = Path(__file__).parent / "configs"
# Other ids of a shipped architecture.
ALIASES = {
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B-Instruct": "meta-llama/Llama-3.1-70B",
    "bigscience/bloomz-7b1": "bigscience/bloom-7b1",
    "bigscience/bloomz-7b1-mt": "bigscience/bloom-7b1",
    "bigscience/bloomz": "bigscience/bloom",
    "bigscience/bloomz-mt": "bigscience/bloom",
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def shipped_models() -> list[str]:
    """The ids whose architecture is known without a network."""
    files = [path.stem.replace("--", "/") for path in CONFIGS.glob("*.json")]
    return sorted([*files, *ALIASES])


def load_config(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """
    The architecture of a model.

    Args:
        name (`str`): an id that is shipped ([`shipped_models`]) or that the hub or its cache has, a local folder, or
            the path of a config.json.
        revision (`str`, *optional*), trust_remote_code (`bool`): as in `from_pretrained`; not read for shipped ids.

    Raises:
        ValueError: if there is no such model, or the file is no transformers configuration.
    """
    shipped = CONFIGS / f"{ALIASES.get(name, name).replace('/', '--')}.json"
    path = shipped if name in shipped_models() else Path(name)
    if path.suffix == ".json":
        try:
            fields = json.loads(path.read_text())
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        except FileNotFoundError as error:
            raise ValueError(f"`model_name_or_path` is {name!r}, but there is no such file.") from error
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError, ValueError) as error:
            raise ValueError(
                f"`model_name_or_path` is {name!r}, which is no configuration of a transformers model: {error}. Pass "
                "a model's config.json, with its `model_type`."
            ) from error
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        where = "holds no config.json that transformers reads" if os.path.isdir(name) else "can't be looked up"
        raise ValueError(
            f"`model_name_or_path` is {name!r}, which {where} ({str(error).splitlines()[0]}). Without a network, pass "
            f"a local folder or the path of a config.json, or one of {', '.join(shipped_models())}."
        ) from error


@dataclass(frozen=True)
class Base:
    """
    How the base model is held.

    Args:
        dtype (`torch.dtype`): of what isn't quantized, and of the computation over quantized layers.
        quantization (`str`, *optional*): `"nf4"` or `"int8"`.
        double_quantization (`bool`): nf4 only: the blocks' factors in 8 bit.
        storage (`torch.dtype`): nf4 only: of the tensors that hold the packed weights.
    """

    dtype: torch.dtype
    quantization: str | None = None
    double_quantization: bool = False
    storage: torch.dtype = torch.uint8


def build_model(config: PretrainedConfig, base: Base, adapter: CuMAConfig | None) -> PreTrainedModel | PeftModel:
    """
    The model on the meta device, its linear layers quantized as bitsandbytes would, with the adapter as the trainers
    have it without DeepSpeed: in float32.

    Raises:
        ImportError: if a quantized base is asked for without bitsandbytes.
        ValueError: if the adapter's targets aren't found.
    """
    config = copy.deepcopy(config)  # a model writes into its own
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=base.dtype)
        if base.quantization is not None:
            _quantize(model, base)
        if adapter is None:
            return model
        return get_peft_model(model, copy.deepcopy(adapter))


def with_layers(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same architecture with fewer decoder layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """What FSDP's transformer policy wraps: the model's repeated layers, by name."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = set(base._no_split_modules or ())
    return {name: module for name, module in model.named_modules() if type(module).__name__ in names}


def state_of(module: nn.Module) -> list[torch.Tensor]:
    """What a quantized layer keeps beside its parameters: factors of blocks or rows, tables. None of it is sharded."""
    weight = module._parameters.get("weight")  # not a tuner layer's property, which is the layer's within it
    state = getattr(weight, "quant_state", None)
    if state is None:
        return [weight.SCB] if getattr(weight, "SCB", None) is not None else []
    tensors = [state.absmax, state.code]
    if state.nested:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    return tensors


def _quantize(model: PreTrainedModel, base: Base) -> None:
    """Put bitsandbytes' own layers where transformers does, and give them the tensors that quantizing leaves."""
    with needs_extra("quantization", f"Planning `precision={base.quantization!r}`"):
        import bitsandbytes as bnb
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear
        from transformers.quantizers.base import get_keys_to_not_convert
    four_bit = base.quantization == "nf4"
    config = BitsAndBytesConfig(
        load_in_4bit=four_bit,
        load_in_8bit=not four_bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=base.dtype,
        bnb_4bit_use_double_quant=base.double_quantization,
        bnb_4bit_quant_storage=base.storage,
    )
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), config)
    for module in model.modules():
        if not isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            continue
        if module.bias is not None:
            module.bias.data = module.bias.data.to(base.dtype)  # as loading does
        if isinstance(module, bnb.nn.Linear4bit):
            shape = module.weight.shape
            module.weight.data = torch.empty(-(-shape.numel() // 2) // base.storage.itemsize, 1, dtype=base.storage)
            module.weight.quant_state = _blockwise_state(bnb, shape, base)
        else:
            rows = module.weight.shape[0]
            values = torch.empty(module.weight.shape, dtype=torch.int8)
            module.weight = bnb.nn.Int8Params(
                values, requires_grad=False, CB=values, SCB=torch.empty(rows, dtype=torch.float32)
            )


def _blockwise_state(bnb: Any, shape: torch.Size, base: Base) -> Any:
    """bitsandbytes' `QuantState`: one factor for 64 weights in float32; doubly quantized, in 8 bit, 256 to a block."""
    blocks = -(-shape.numel() // 64)
    common = {"shape": shape, "code": torch.empty(16), "blocksize": 64, "quant_type": "nf4", "dtype": base.dtype}
    if not base.double_quantization:
        return bnb.functional.QuantState(absmax=torch.empty(blocks), **common)
    outer = bnb.functional.QuantState(
        absmax=torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32
    )
    absmax = torch.empty(blocks, dtype=torch.uint8)
    return bnb.functional.QuantState(absmax=absmax, offset=torch.empty(()), state2=outer, **common)
