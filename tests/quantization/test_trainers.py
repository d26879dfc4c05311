# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""QLoRA through the trainers: `model` is a path, and TRL quantizes it by `quantization_config`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from trl_cuma import CuMAConfig, CuMADPOConfig, CuMADPOTrainer, CuMASFTConfig, CuMASFTTrainer, FieldEncoder

PEOPLE = [{"country": "FR"}, {"country": "JP"}]


def rows(*columns: str) -> Dataset:
    """Eight rows; `columns` are answered "yes" and "no" in turn."""
    return Dataset.from_list(
        [
            {"prompt": f"Question {row}? ", "demographic": PEOPLE[row % 2]}
            | {column: ("yes", "no")[(row + shift) % 2] for shift, column in enumerate(columns)}
            for row in range(8)
        ]
    )


@pytest.fixture
def nf4() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes", reason="needs the extra trl_cuma[quantization]")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    """What keeps a short run on this machine; bf16 and gradient checkpointing are TRL's default."""
    return {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "demographic_cache_dir": str(tmp_path / "cache"),
        "model_init_kwargs": {"dtype": "bfloat16"},
        "max_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 8,  # all rows: the loss of a step can be compared with the next
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
    }


@pytest.fixture
def fresh_base(saved_base: Callable[[str], Path], nf4: BitsAndBytesConfig) -> Callable[[], PreTrainedModel]:
    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            saved_base("qwen3"), quantization_config=nf4, device_map={"": "cpu"}, dtype=torch.bfloat16
        )

    return load


@pytest.fixture
def sft(saved_base: Callable, nf4: BitsAndBytesConfig, arguments: dict) -> CuMASFTTrainer:
    trainer = CuMASFTTrainer(
        str(saved_base("qwen3")),
        args=CuMASFTConfig(**arguments),
        train_dataset=rows("completion"),
        peft_config=adapter_config(),
        demographic_encoder=FieldEncoder(min_count=1),
        quantization_config=nf4,
    )
    trainer.train()
    return trainer


def adapter_config() -> CuMAConfig:
    return CuMAConfig(target_modules=["q_proj", "v_proj"], num_experts=4, r=2, router_hidden=8)


def logits(model: PeftModel) -> torch.Tensor:
    encoder_dim = model.peft_config["default"].demographic_dim
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 6, 7], [5, 6, 7]]), demographic_embeds=torch.eye(2, encoder_dim)).logits


def unwrapped(trainer: Any) -> PeftModel:
    """The trained model without accelerate's autocast around its forward."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


def history(trainer: Any, key: str) -> list[float]:
    return [record[key] for record in trainer.state.log_history if key in record]


def test_sft_trains_a_quantized_base_and_reloads(
    sft: CuMASFTTrainer, fresh_base: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    losses = history(sft, "loss")
    assert len(losses) == 3 and losses[-1] < losses[0]
    trained = {name: p for name, p in sft.model.named_parameters() if p.requires_grad}
    assert trained and all("cuma_" in name for name in trained)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    base = fresh_base().state_dict()
    ours = {
        name.replace(".base_layer", ""): value
        for name, value in sft.model.get_base_model().state_dict().items()
        if "cuma_" not in name
    }
    assert ours.keys() == base.keys() and all(torch.equal(ours[name], value) for name, value in base.items())

    expected = logits(unwrapped(sft))
    sft.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(fresh_base(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
    assert not torch.equal(expected[0], expected[1])  # the same tokens: the person matters


@pytest.mark.parametrize("start", ["new", "continued"])
def test_small_updates_are_not_rounded_away(start, sft, saved_base, nf4, arguments, tmp_path):
    """TRL casts the adapter to bfloat16, where a step of 1e-5 from a weight of 0.1 changes nothing."""
    sft.save_model(str(tmp_path / "sft"))
    new = {"peft_config": adapter_config(), "demographic_encoder": FieldEncoder(min_count=1)}
    fields = arguments | {"max_steps": 1, "learning_rate": 1e-5}
    if start == "continued":
        fields, new = fields | {"cuma_adapter_path": str(tmp_path / "sft")}, {}
    trainer = CuMASFTTrainer(
        str(saved_base("qwen3")),
        args=CuMASFTConfig(**fields),
        train_dataset=rows("completion"),
        quantization_config=nf4,
        **new,
    )
    named = dict(trainer.model.named_parameters())
    biases = {name for name, p in named.items() if p.requires_grad and name.endswith("bias")}
    before = {name: named[name].detach().clone() for name in biases}
    if start == "continued":
        saved = load_file(tmp_path / "sft" / "adapter_model.safetensors")
        assert all(torch.equal(before[name], saved[name.replace(".default", "")]) for name in biases)
        assert any((value.bfloat16() != value).any() for value in before.values())
    trainer.train()
    changed = torch.cat([(named[name] != before[name]).flatten() for name in biases])
    assert changed.float().mean() > 0.5  # a dead unit's bias has no gradient
    rounded = torch.cat([(named[name].bfloat16() != before[name].bfloat16()).flatten() for name in biases])
    assert rounded.float().mean() < 0.2


@pytest.mark.parametrize("start", ["new", "continued"])
def test_dpo_trains_a_quantized_base_and_reloads(
    start: str,
    sft: CuMASFTTrainer,
    saved_base: Callable[[str], Path],
    nf4: BitsAndBytesConfig,
    arguments: dict[str, Any],
    fresh_base: Callable[[], PreTrainedModel],
    tmp_path: Path,
) -> None:
    new = {"peft_config": adapter_config(), "demographic_encoder": FieldEncoder(min_count=1)}
    adapter = {}
    if start == "continued":
        sft.save_model(str(tmp_path / "sft"))
        adapter, new = {"cuma_adapter_path": str(tmp_path / "sft")}, {}
    trainer = CuMADPOTrainer(
        str(saved_base("qwen3")),
        args=CuMADPOConfig(**(arguments | adapter)),
        train_dataset=rows("chosen", "rejected"),
        quantization_config=nf4,
        **new,
    )
    trainer.train()
    margins = history(trainer, "rewards/margins")
    assert margins[0] == 0 < margins[-1]  # the reference, base or frozen copy, is the policy at first
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    expected = logits(unwrapped(trainer))
    trainer.save_model(str(tmp_path / "dpo"))
    again = PeftModel.from_pretrained(fresh_base(), tmp_path / "dpo")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
