# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Tiny models, their configurations as files, and trainers that really train them on the CPU."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from trl_cuma import CuMAConfig, CuMADPOConfig, CuMADPOTrainer, CuMASFTConfig, CuMASFTTrainer
from trl_cuma.testing import tiny_model, word_tokenizer

WORDS = [f"w{number}" for number in range(60)]
LENGTH, DIM = 48, 6
SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.fixture
def make_base() -> Callable[..., PreTrainedModel]:
    def make(architecture: str = "qwen3", dtype: torch.dtype = torch.float32, **fields: Any) -> PreTrainedModel:
        return tiny_model(architecture, vocab_size=63, dtype=dtype, **(SIZES | fields))

    return make


@pytest.fixture
def config_file(make_base: Callable, tmp_path: Path) -> Callable[..., str]:
    """The path of a tiny model's config.json."""

    def write(architecture: str = "qwen3", **fields: Any) -> str:
        path = tmp_path / f"{architecture}.json"
        path.write_text(json.dumps(make_base(architecture, **fields).config.to_dict()))
        return str(path)

    return write


@pytest.fixture
def adapter() -> Callable[..., CuMAConfig]:
    def make(**fields: Any) -> CuMAConfig:
        sizes = {"demographic_dim": DIM, "num_experts": 4, "r": 4, "router_hidden": 8, "task_type": "CAUSAL_LM"}
        return CuMAConfig(**(sizes | fields))

    return make


def rows(method: str, count: int) -> Dataset:
    """Rows of which the first is the longest, so that the others are padded."""
    generator = torch.Generator().manual_seed(0)

    def text(words: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(60, (words,), generator=generator))

    made = []
    for row in range(count):
        length = LENGTH - 1 if row == 0 else LENGTH - 9  # the end-of-sequence token is added
        made.append({"demographic": torch.randn(DIM, generator=generator).tolist()})
        if method == "sft":
            made[-1] |= {"text": text(length)}
        else:
            made[-1] |= {"prompt": text(8) + " ", "chosen": text(length - 8), "rejected": text(length - 10)}
    return Dataset.from_list(made)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    """A trainer of four rows or pairs at once; returns it with a function that does a training step."""

    def make(model: Any, peft_config: CuMAConfig | None, method: str = "sft", batch: int = 4, **fields: Any) -> Any:
        config, trainer = {"sft": (CuMASFTConfig, CuMASFTTrainer), "dpo": (CuMADPOConfig, CuMADPOTrainer)}[method]
        settings = {"gradient_checkpointing": False, "bf16": False} | fields
        args = config(
            output_dir=str(tmp_path / "out"),
            per_device_train_batch_size=batch,
            max_length=LENGTH,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        trainer = trainer(
            model,
            args=args,
            train_dataset=rows(method, batch),
            peft_config=peft_config,
            processing_class=word_tokenizer([" ".join(WORDS)]),
        )
        prepared = trainer.accelerator.prepare_model(trainer.model)  # puts autocast around its forward
        if settings["gradient_checkpointing"]:  # as `train` does
            trainer.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs or {"use_reentrant": False})
        batch_of_rows = next(iter(trainer.get_train_dataloader()))
        trainer.current_gradient_accumulation_steps = 1

        def step() -> None:
            trainer.training_step(prepared, dict(batch_of_rows), torch.tensor(100) if method == "sft" else None)

        return trainer, step, tuple(batch_of_rows["input_ids"].shape)

    return make
