# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The data suite of `speed.py`: the same rows through TRL's trainer and through CuMA's, which also bring profiles."""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from speed_arms import QUERY_VALUE
from speed_measure import Run
from trl import SFTConfig, SFTTrainer

from trl_cuma import CuMAConfig, CuMASFTConfig, CuMASFTTrainer, FieldEncoder
from trl_cuma.testing import tiny_model, word_tokenizer

BATCH = 16


@contextmanager
def loaders(rows: int, countries: int, batches: int, device: torch.device) -> Iterator[dict[str, Run]]:
    """Two runs, TRL's and CuMA's, that load `batches` batches of `rows` rows with `40 * countries` profiles."""
    dataset = survey_rows(rows, countries)
    tokenizer = word_tokenizer([" ".join(f"w{i}" for i in range(500))])
    targets = list(QUERY_VALUE)
    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = dict(output_dir=folder, per_device_train_batch_size=BATCH, report_to="none")
        common |= dict(bf16=False, use_cpu=device.type == "cpu", max_length=None)
        plain = SFTTrainer(
            tiny_model("qwen3", vocab_size=len(tokenizer)),
            args=SFTConfig(**common),
            train_dataset=dataset.remove_columns("demographic"),
            processing_class=tokenizer,
            peft_config=LoraConfig(target_modules=targets, task_type="CAUSAL_LM"),
        )
        cuma = CuMASFTTrainer(
            tiny_model("qwen3", vocab_size=len(tokenizer)),
            args=CuMASFTConfig(**common, demographic_cache_dir=folder),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=CuMAConfig(target_modules=targets, task_type="CAUSAL_LM"),
            demographic_encoder=FieldEncoder(),
        )
        yield {"SFTTrainer": _loading(plain, batches), "CuMASFTTrainer": _loading(cuma, batches)}


def _loading(trainer: SFTTrainer, batches: int) -> Run:
    loader = trainer.get_train_dataloader()

    def run(mark: Callable[[], None]) -> None:
        for batch in itertools.islice(loader, batches):
            assert batch["input_ids"].shape[0] == BATCH
        mark()

    return run


def survey_rows(count: int, countries: int) -> Dataset:
    """`count` tokenized rows of about 128 tokens, of `40 · countries` different profiles."""
    draw = random.Random(0)
    fields = {
        "country": [f"country {i}" for i in range(countries)],
        "age": ["18-24", "25-34", "35-44", "45-64", "65+"],
        "gender": ["female", "male"],
        "education": ["none", "primary", "secondary", "higher"],
    }
    people = [dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())]
    return Dataset.from_dict(
        {
            "input_ids": [[draw.randrange(3, 503) for _ in range(draw.randint(96, 160))] for _ in range(count)],
            "demographic": [people[row] if row < len(people) else draw.choice(people) for row in range(count)],
        }
    )
