# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Offline settings, and the builders that many tests share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny; each test process has a core to itself
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from trl_cuma import CuMAConfig, FieldEncoder
from trl_cuma.testing import chat_tokenizer, tiny_model, word_tokenizer

VOCABULARY = 50
DIM = 6


@pytest.fixture
def make_config() -> Callable[..., CuMAConfig]:
    """A small adapter whose residual is not zero; any field can be given."""

    def make(**fields: Any) -> CuMAConfig:
        defaults: dict[str, Any] = {
            "target_modules": ["q_proj", "v_proj"],
            "demographic_dim": DIM,
            "num_experts": 4,
            "r": 4,
            "lora_alpha": 32,
            "router_hidden": 8,
            "init_weights": False,
            "task_type": "CAUSAL_LM",
        }
        return CuMAConfig(**(defaults | fields))

    return make


@pytest.fixture
def make_model(make_config: Callable[..., CuMAConfig]) -> Callable[..., PeftModel]:
    """A tiny language model with a CuMA adapter, in evaluation mode; the same arguments give the same weights."""

    def make(
        architecture: str = "qwen3",
        *,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        base: dict[str, Any] | None = None,
        **fields: Any,
    ) -> PeftModel:
        torch.manual_seed(1)
        model = tiny_model(architecture, vocab_size=VOCABULARY, **(base or {}))
        config = make_config(**fields)
        return get_peft_model(
            model, config, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
        ).eval()

    return make


@pytest.fixture
def make_batch() -> Callable[..., dict[str, torch.Tensor]]:
    """Random tokens and profiles; `lengths` gives right-padded rows of these lengths."""

    def make(rows: int = 3, length: int = 6, *, lengths: list[int] | None = None, seed: int = 0) -> dict:
        generator = torch.Generator().manual_seed(seed)
        rows, length = (len(lengths), max(lengths)) if lengths else (rows, length)
        mask = torch.ones(rows, length, dtype=torch.long)
        for row, real in enumerate(lengths or []):
            mask[row, real:] = 0
        tokens = torch.randint(3, VOCABULARY, (rows, length), generator=generator)
        return {
            "input_ids": tokens * mask,  # the padding token is 0
            "attention_mask": mask,
            "demographic_embeds": torch.randn(rows, DIM, generator=generator),
        }

    return make


@pytest.fixture
def qwen3_8b() -> PreTrainedModel:
    """Qwen/Qwen3-8B by the sizes of its config.json, on the meta device: no weights."""
    with torch.device("meta"):
        return Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=151_936,
                hidden_size=4096,
                intermediate_size=12_288,
                num_hidden_layers=36,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
            )
        )


PEOPLE = [{"country": country, "age": age} for country in ("Kenya", "Japan", "Korea, South") for age in ("18", "70")]
WORDS = "What makes a good life ? Tea or coffee family money friends health peace music work home travel food"


@pytest.fixture(scope="session")
def saved_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """
    The folder of an adapter that knows `PEOPLE`'s fields and whose answers differ between them, beside its base: with
    a chat template, or with words as tokens and none. Fields are CuMAConfig's. It is made once.
    """

    @functools.cache
    def make(chat: bool = True, **fields: Any) -> Path:
        folder = tmp_path_factory.mktemp("saved")
        tokenizer = chat_tokenizer([WORDS] * 3) if chat else word_tokenizer([WORDS])
        # Logits far apart, so that answers hang on the profile and not on rounding.
        model = tiny_model("qwen3", vocab_size=len(tokenizer), hidden_size=32, initializer_range=0.3)
        model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        encoder = FieldEncoder(min_count=1).fit(PEOPLE)
        config = CuMAConfig(
            **{
                "target_modules": ["q_proj", "v_proj", "down_proj"],
                "demographic_dim": encoder.dim,
                "demographic_encoder": encoder.state(),
                "num_experts": 4,
                "r": 4,
                "lora_alpha": 512,
                "router_hidden": 8,
                "init_weights": False,
                "task_type": "CAUSAL_LM",
            }
            | fields
        )
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        torch.manual_seed(0)
        get_peft_model(model, config).save_pretrained(folder / "adapter")
        return folder / "adapter"

    return make
