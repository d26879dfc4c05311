# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Folders that engines would not take, or PEFT not load, are found."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from trl_cuma.export.check import VLLM_RANKS, check_files, check_loads, vllm_rank
from trl_cuma.testing import tiny_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def folder(tmp_path):
    """A LoRA of PEFT's own, and its base beside it."""
    base = tiny_model("llama", vocab_size=40)
    base.save_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(tmp_path / "l")
    return tmp_path / "l"


def change(folder, config=(), tensors=()):
    settings = json.loads((folder / CONFIG).read_text()) | dict(config)
    (folder / CONFIG).write_text(json.dumps(settings))
    save_file(load_file(folder / WEIGHTS) | dict(tensors), folder / WEIGHTS)


def test_pefts_own_lora_passes(folder):
    check_files(folder)
    check_loads([folder], str(folder.parent / "base"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "`use_dora` is True, and engines take False only"),
        ({"rank_pattern": {"q_proj": 4}}, "`rank_pattern` is"),
        ({"bias": "all"}, "`bias` is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` is"),
        ({"peft_type": "CUMA"}, "`peft_type` is 'CUMA', expected 'LORA'"),
        ({"r": 1024}, "vLLM takes LoRAs of rank 512 at most"),
        ({"r": 4}, "and the rank is 4"),
    ],
)
def test_settings_that_engines_refuse_are_named(folder, config, message):
    change(folder, config)
    with pytest.raises(ValueError, match=message):
        check_files(folder)


def test_tensors_that_engines_refuse_are_named(folder):
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    for tensors, message in (
        ({f"{layer}.cuma_experts.weight_a": torch.zeros(8, 8)}, "is no layer's lora_A or lora_B"),
        ({"base_model.model.lone.lora_A.weight": torch.zeros(8, 8)}, "lone has no pair"),
        ({f"{layer}.lora_A.weight": torch.full((8, 64), torch.nan)}, "not finite"),
    ):
        kept = load_file(folder / WEIGHTS)
        change(folder, tensors=tensors)
        with pytest.raises(ValueError, match=message):
            check_files(folder)
        save_file(kept, folder / WEIGHTS)


def test_a_lora_of_another_base_does_not_load(folder):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    change(folder, tensors={key: torch.zeros(8, 32)})
    with pytest.raises(ValueError, match="does not load by PEFT alone: .*q_proj"):
        check_loads([folder], str(folder.parent / "base"))


def test_the_least_rank_that_vllm_takes():
    assert [vllm_rank(rank) for rank in (1, 2, 8, 9, 300, 512)] == [1, 8, 8, 16, 320, 512]
    assert all(vllm_rank(rank) == rank for rank in VLLM_RANKS)
