# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A small adapter on disk whose answers depend on who asks, and the people it might have been trained on."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel, get_peft_model
from transformers import PreTrainedTokenizerFast

from trl_cuma import CuMAConfig, FieldEncoder
from trl_cuma.testing import tiny_model, word_tokenizer

WORDS = [f"w{number}" for number in range(40)]
PROMPTS = [f"{a} {b} {c}" for a in WORDS[:4] for b in WORDS[4:8] for c in WORDS[8:10]]  # 32
PEOPLE = [
    {"country": country, "age": age}
    for country, age, count in (
        ("Kenya", "18-29", 60),
        ("Kenya", "30+", 60),
        ("Japan", "30+", 140),
        ("Peru", "18-29", 50),
    )
    for _ in range(count)
]


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """32 different ones."""
    return PROMPTS


@pytest.fixture(scope="session")
def people() -> list[dict[str, str]]:
    """120 in Kenya, half of them young; 140 in Japan, all old; 50 in Peru, all young."""
    return PEOPLE


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(WORDS)


@pytest.fixture
def make_model(tokenizer: PreTrainedTokenizerFast) -> Callable[..., PeftModel]:
    """A routed model; `base` is where its base is saved, if it has to be found there."""

    def make(base: Path | None = None, scale: float = 0.3, **fields) -> PeftModel:
        torch.manual_seed(0)
        encoder = FieldEncoder().fit(PEOPLE)
        fields = {"routing": "demographic", "num_experts": 4, "r": 3, **fields}
        config = CuMAConfig(
            task_type="CAUSAL_LM",
            demographic_dim=encoder.dim,
            demographic_encoder=encoder.state(),
            init_weights=False,
            **fields,
        )
        model = tiny_model("llama", vocab_size=len(tokenizer))
        if base is not None:
            model.save_pretrained(base)
            tokenizer.save_pretrained(base)
            model.name_or_path = str(base)
        model = get_peft_model(model, config).eval()
        for name, parameter in model.named_parameters():
            if "weight_b" in name:
                torch.nn.init.normal_(parameter, std=scale)
        return model

    return make


@pytest.fixture
def training_data(tmp_path: Path) -> Path:
    """What `trl-cuma prepare` might have written: a row per person."""
    rows = [
        {
            "prompt": PROMPTS[number % len(PROMPTS)],
            "completion": " w1",
            "demographic": who,
            "person_id": f"person {number}",
        }
        for number, who in enumerate(PEOPLE)
    ]
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def no_check_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the process that loads what was exported, seconds of imports that other tests wait for."""
    monkeypatch.setattr("trl_cuma.export.bulk.check_loads", lambda *args, **kwargs: None)
