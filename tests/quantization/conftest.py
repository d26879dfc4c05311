# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Tiny bases, quantized in every way that is tested: each call quantizes anew from one saved full-precision model."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AwqConfig,
    BitsAndBytesConfig,
    GPTQConfig,
    PreTrainedModel,
    TorchAoConfig,
)

from trl_cuma.testing import chat_tokenizer, tiny_model

VOCABULARY = 300
EXTRA = "needs the extra trl_cuma[quantization]"
GPTQMODEL = "needs `pip install gptqmodel optimum` (its own environment: it pins numpy)"
CPU = {"": "cpu"}


@pytest.fixture(scope="session")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an architecture's tiny model in float32, with its tokenizer."""

    @functools.cache
    def save(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        # Ten times the usual standard deviation: with 0.02, logits of so small a model are all nearly 0, whatever
        # its adapters do.
        spread = {"init_std": 0.2} if architecture == "opt" else {"initializer_range": 0.2}
        tiny_model(architecture, vocab_size=VOCABULARY, seed=1, **spread).save_pretrained(folder)
        chat_tokenizer(["Question 0? yes no"], vocab_size=VOCABULARY).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def load_base(saved_base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """`load_base("nf4", "qwen3")`: a fresh quantized base; the same arguments give the same one."""

    @functools.cache
    def calibrated(scheme: str, architecture: str) -> Path:
        folder = tmp_path_factory.mktemp(f"{scheme}-{architecture}")
        (_save_gptq if scheme == "gptq" else _save_awq)(saved_base(architecture), folder)
        return folder

    def load(scheme: str, architecture: str) -> PreTrainedModel:
        if scheme in ("gptq", "awq"):  # their calibration is not repeated: everybody loads the quantized model
            pytest.importorskip("gptqmodel", reason=GPTQMODEL, exc_type=ImportError)
            pytest.importorskip("optimum", reason=GPTQMODEL)
            # GPT-QModel's default GPTQ kernel for the CPU decides in its first forward for inference or for training,
            # and for good: after one without gradients it passes none back, silently. The "torch" kernel always does.
            kernel = {"quantization_config": GPTQConfig(bits=4, backend="torch")} if scheme == "gptq" else {}
            return AutoModelForCausalLM.from_pretrained(
                calibrated(scheme, architecture), device_map=CPU, dtype=torch.float32, **kernel
            )
        if scheme in ("torchao-by-hand", "hqq-4", "hqq-8"):
            model = AutoModelForCausalLM.from_pretrained(saved_base(architecture), dtype=torch.float32)
            return _quantize_torchao(model) if scheme == "torchao-by-hand" else _quantize_hqq(model, int(scheme[-1]))
        model = AutoModelForCausalLM.from_pretrained(
            saved_base(architecture),
            quantization_config=_config(scheme),
            device_map=CPU,
            dtype=torch.float32,
        )
        for module in model.modules():
            # On CPUs with AVX512-BF16 bitsandbytes packs 4-bit weights at the first forward without gradients, and
            # `state_dict()` unpacks them wrongly: a plain base answers otherwise after it (0.50.2).
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model

    return load


def _config(scheme: str) -> Any:
    if scheme.startswith("torchao"):
        torchao = pytest.importorskip("torchao.quantization", reason=EXTRA)
        if scheme == "torchao-int8":
            return TorchAoConfig(torchao.Int8WeightOnlyConfig())
        # Int4WeightOnlyConfig has no kernel for the CPU; this is the int4 that has one
        granularity = torchao.PerGroup(32)
        return TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity))
    pytest.importorskip("bitsandbytes", reason=EXTRA)
    if scheme == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if scheme == "int8-rowwise":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)  # no outlier columns
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=scheme == "nf4-double",
        bnb_4bit_compute_dtype=torch.float32,
    )


def _quantize_torchao(model: PreTrainedModel) -> PreTrainedModel:
    torchao = pytest.importorskip("torchao.quantization", reason=EXTRA)

    def is_body(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name != "lm_head"

    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=is_body)
    return model


def _quantize_hqq(model: PreTrainedModel, bits: int) -> PreTrainedModel:
    """By hand: transformers 5.23 refuses `HqqConfig` ("not available yet")."""
    hqq = pytest.importorskip("hqq.core.quantize", reason=EXTRA)
    config = hqq.BaseQuantizeConfig(nbits=bits, group_size=64)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            quantized = hqq.HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            model.set_submodule(name, quantized)
    return model


def _save_gptq(base: Path, folder: Path) -> None:
    config = GPTQConfig(
        bits=4, group_size=32, dataset=["Question 0? yes no " * 20] * 4, tokenizer=str(base), model_seqlen=64
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map=CPU, dtype=torch.float32)
    model.save_pretrained(folder)


def _save_awq(base: Path, folder: Path) -> None:
    """
    A model in AWQ's format, rounded to the nearest: AWQ's own search for scales needs a GPU, and changes which numbers
    are stored, not how a layer computes with them.
    """
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from transformers.integrations import replace_quantization_scales

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = AwqConfig(bits=4, group_size=32, zero_point=True, backend="torch_awq")
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        groups = module.weight.detach().unflatten(1, (-1, config.group_size))  # (out, groups, group_size)
        low, high = groups.amin(-1), groups.amax(-1)
        scales = ((high - low) / 15).half().float()  # AWQ stores float16
        packed = AwqTorchLinear(
            bits=4,
            group_size=config.group_size,
            sym=False,
            desc_act=False,
            in_features=module.in_features,
            out_features=module.out_features,
            bias=module.bias is not None,
        )
        packed.pack(module, scales, (-low / scales).round().clamp(0, 15))
        model.set_submodule(name, packed)
    replace_quantization_scales(model, model.config.model_type)  # BLOOM's activation has one more tensor in AWQ
    model.config.quantization_config = config
    model.save_pretrained(folder)
