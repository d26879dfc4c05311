# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Tiny base models for PEFT's tests, in place of the ones that upstream takes from the Hub."""

import copy
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
)

from trl_cuma.testing import tiny_model

DECODERS = ("qwen3", "gpt2", "bloom", "llama", "opt", "gemma")

SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BERT = BertConfig(**SIZES, intermediate_size=64)
SIDES = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()
}
# Name → the class with the head, and a config.
OTHERS: dict[str, tuple[type, Any]] = {
    "t5": (
        AutoModelForSeq2SeqLM,
        T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0),
    ),
    "bart": (AutoModelForSeq2SeqLM, BartConfig(vocab_size=50, d_model=32, **SIDES)),
    "bert": (AutoModel, BERT),
    "bert-sequence": (AutoModelForSequenceClassification, BERT),
    "llama-sequence": (
        AutoModelForSequenceClassification,
        LlamaConfig(**SIZES, intermediate_size=64, pad_token_id=0),
    ),
    "bert-token": (AutoModelForTokenClassification, BERT),
    "bert-question": (AutoModelForQuestionAnswering, BERT),
}

NAMES = (*DECODERS, *OTHERS)


def model_id(name: str) -> str:
    """
    An id that doesn't tell the architecture: upstream skips, or does something else, where the id has "llama",
    "gemma", "gpt2", "qwen2", "bert" and others in it. It looks like one of the Hub, and is none.
    """
    return f"tiny/model-{NAMES.index(name)}"


def load_model(id_: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Stands in for `from_pretrained`: the same id always gives the same weights."""
    name = NAMES[int(id_.rpartition("-")[2])]
    if name in DECODERS:
        model = tiny_model(name, vocab_size=50, dtype=dtype)
    else:
        auto_class, config = OTHERS[name]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = auto_class.from_config(copy.deepcopy(config), dtype=dtype).eval()
    model.name_or_path = model.config.name_or_path = id_  # as `from_pretrained` does
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.max_new_tokens = 4
    return model
