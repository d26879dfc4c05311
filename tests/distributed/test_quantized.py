# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Quantized bases in two processes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from .cells import reference
from .compare import check_logs, deviation, logits
from .conftest import Read

# FSDP2 leaves a base that isn't stored as floats whole, and accelerate breaks on int8; under ZeRO-3 each process keeps
# all of an int8 base.
RUNS = [(engine, scheme) for engine in ("ddp", "zero2") for scheme in ("nf4", "int8")]
RUNS += [(engine, scheme) for engine in ("zero3", "fsdp2") for scheme in ("nf4", "nf4-float32")]


@pytest.mark.parametrize(("launch", "cell"), [(engine, f"sft-{scheme}") for engine, scheme in RUNS])
def test_two_processes_train_what_one_does(launch: str, cell: str, read: Read, record: Callable) -> None:
    first, second = read(launch, cell)
    [alone] = read("single", reference(cell))
    largest = deviation(first, alone)
    record(f"{largest:.0e}")
    check_logs(first["logs"], alone["logs"])
    assert largest < 1e-3
    assert all(second["weights"][name].equal(weight) for name, weight in first["weights"].items())


@pytest.mark.parametrize(("launch", "cell"), [(engine, f"sft-{scheme}") for engine, scheme in RUNS])
def test_what_is_saved_was_trained_and_loads(launch: str, cell: str, read: Read, results: Path) -> None:
    first, second = read(launch, cell)
    assert first["engine"]["sharded"] is (launch == "zero3" or cell.endswith("float32"))
    folder = results / launch / cell / "saved"
    saved = load_file(folder / "adapter_model.safetensors")
    for name, weight in first["weights"].items():
        assert weight.dtype == torch.float32
        assert not weight.equal(first["start"][name]), name
        assert second["weights"][name].equal(weight), name
        assert saved[name.replace(".default.", ".")].equal(weight), name

    int8 = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(
        results / launch / "base",
        dtype=torch.float32,
        quantization_config=int8 if "int8" in cell else nf4,
        device_map={"": "cpu"},
    )
    model = PeftModel.from_pretrained(base, folder)
    found = logits(model, results / launch / "base", folder)
    torch.testing.assert_close(found, first["logits"], rtol=1e-4, atol=1e-4)
