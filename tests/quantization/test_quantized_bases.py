# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
What a person who trains over a quantized base counts on: that it learns, that the base stays as it is, that the saved
adapter gives the same logits over a base that is quantized anew, and that `generate` knows whom it answers.

Each base's task can be learned from the profile alone: the same prompt is answered differently by two people.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import PreTrainedModel

from trl_cuma import CuMAConfig
from trl_cuma.adapter.layer import CuMALinear

DIM = 4
STEPS = 30
PROMPTS = [[5, 6, 7, 8], [9, 8, 7, 6]]
PEOPLE = torch.tensor([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0]])  # standardised, as an encoder gives them
ANSWERS = [20, 30]  # the first person's and the second's

# What is adapted: all kinds of linear layer of the architecture. (`all-linear` does not see HQQ's and GPT-QModel's.)
TARGETS = {
    "qwen3": ["q_proj", "v_proj", "down_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "mistral": ["q_proj", "v_proj", "down_proj"],
    "gemma": ["q_proj", "v_proj", "down_proj"],
    "phi": ["q_proj", "v_proj", "fc2"],
    "opt": ["q_proj", "v_proj", "fc2"],
    "bloom": ["query_key_value", "dense_4h_to_h"],
    "gpt2": ["c_attn", "c_proj"],
}
BACKENDS = {
    "nf4": "Bnb4bitBackend",
    "nf4-double": "Bnb4bitBackend",
    "int8": "Bnb8bitBackend",
    "int8-rowwise": "Bnb8bitBackend",
    "torchao-int8": "TorchaoBackend",
    "torchao-int4": "TorchaoBackend",
    "torchao-by-hand": "ForwardOnlyQuantizationBackend",
    "hqq-4": "HqqBackend",
    "hqq-8": "HqqBackend",
    "gptq": "ForwardOnlyQuantizationBackend",
    "awq": "ForwardOnlyQuantizationBackend",
}
# GPT-2's linear layers are Conv1D, which torchao, HQQ and AWQ leave unquantized; GPTQ quantizes them, but transformers
# can't load the result ("'_LinearWeightMetadata' object has no attribute 'normal_'")
QUANTIZES_CONV1D = {"nf4", "nf4-double", "int8", "int8-rowwise"}
# A variant of another scheme runs on one architecture
VARIANTS = {"nf4-double", "int8-rowwise", "torchao-by-hand", "hqq-8"}
QUICK = {
    ("nf4", "qwen3"),
    ("nf4", "gpt2"),
    ("int8", "bloom"),
    ("torchao-int8", "qwen3"),
    ("torchao-by-hand", "qwen3"),
    ("hqq-4", "qwen3"),
}
CASES = [
    pytest.param((scheme, architecture), id=f"{scheme}-{architecture}", marks=marks)
    for scheme in BACKENDS
    for architecture in (["qwen3"] if scheme in VARIANTS else TARGETS)
    if architecture != "gpt2" or scheme in QUANTIZES_CONV1D
    for marks in [[] if (scheme, architecture) in QUICK else pytest.mark.slow]
]


@dataclass
class Trained:
    """A CuMA model after training, and what was seen before and on the way."""

    scheme: str
    model: PeftModel
    load: Callable[[], PreTrainedModel]
    base_logits: torch.Tensor
    base_state: dict[str, list[torch.Tensor]]
    losses: list[float]
    without_gradient: set[str]
    unmoved: set[str]


def batch() -> dict[str, torch.Tensor]:
    """Each prompt answered by both people: `(4, 5)` tokens, of which the last is the answer."""
    rows = [(prompt, person) for prompt in PROMPTS for person in (0, 1)]
    tokens = torch.tensor([[*prompt, ANSWERS[person]] for prompt, person in rows])
    labels = tokens.clone()
    labels[:, :-1] = -100
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": labels,
        "demographic_embeds": PEOPLE[[person for _, person in rows]],
    }


def adapter_config(architecture: str, **fields: Any) -> CuMAConfig:
    sizes = {"num_experts": 4, "r": 4, "lora_alpha": 8, "router_hidden": 8, "demographic_dim": DIM}
    return CuMAConfig(**({"target_modules": TARGETS[architecture], "task_type": "CAUSAL_LM"} | sizes | fields))


def tensors_of(value: torch.Tensor) -> list[torch.Tensor]:
    """A copy of a tensor's data; of a torchao tensor's, that of its parts."""
    if hasattr(value, "__tensor_flatten__"):
        return [part for name in value.__tensor_flatten__()[0] for part in tensors_of(getattr(value, name))]
    return [value.detach().clone()]


def base_state(model: PeftModel) -> dict[str, list[torch.Tensor]]:
    state = model.get_base_model().state_dict()
    return {name: tensors_of(value) for name, value in state.items() if "cuma_" not in name}


@torch.no_grad()
def logits(model: Any, **fields: Any) -> torch.Tensor:
    inputs = {name: value for name, value in batch().items() if name in ("input_ids", "attention_mask")}
    return model(**inputs, **fields).logits


def conditioned_logits(model: PeftModel) -> torch.Tensor:
    return logits(model.eval(), demographic_embeds=batch()["demographic_embeds"])


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, load_base: Callable) -> Trained:
    scheme, architecture = request.param
    base = load_base(scheme, architecture)
    base_logits = logits(base)
    # bitsandbytes bases the way QLoRA does it, with gradient checkpointing; the others as a plain loop would
    prepare = BACKENDS[scheme].startswith("Bnb")
    if prepare:
        base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(0)
    model = get_peft_model(base, adapter_config(architecture)).train()
    layers = [module for module in model.modules() if isinstance(module, CuMALinear)]
    assert {type(layer.quantization_backend).__name__ for layer in layers} == {BACKENDS[scheme]}
    assert model.get_base_model().is_activation_checkpointing == prepare

    before = base_state(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    assert all("cuma_" in name for name in parameters)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.02, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)  # Trainer's default
    losses, without_gradient = [], set()
    for _ in range(STEPS):
        outputs = model(**batch(), output_router_losses="local")
        (outputs.loss + 0.01 * outputs["aux_loss"]).backward()
        losses.append(outputs.loss.item())
        without_gradient |= {name for name, p in parameters.items() if p.grad is None or not p.grad.isfinite().all()}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    unmoved = {name for name, p in parameters.items() if torch.equal(p, start[name])}
    return Trained(
        scheme, model, lambda: load_base(scheme, architecture), base_logits, before, losses, without_gradient, unmoved
    )


def test_it_learns_what_only_the_profile_tells(trained: Trained) -> None:
    # Without the profile the two answers to a prompt can't be told apart, and the mean loss is at least ln 2.
    assert trained.losses[0] > 2.0
    assert trained.losses[-1] < math.log(2) / 2
    assert not trained.without_gradient
    assert not trained.unmoved


def test_the_base_stays_as_it_is(trained: Trained) -> None:
    after = base_state(trained.model)
    assert after.keys() == trained.base_state.keys()
    for name, parts in trained.base_state.items():
        for part, now in zip(parts, after[name], strict=True):
            assert part.dtype == now.dtype and torch.equal(part, now), name


def test_a_disabled_adapter_is_the_base(trained: Trained) -> None:
    trained.model.eval()
    with trained.model.disable_adapter():
        assert torch.equal(logits(trained.model), trained.base_logits)
    assert (conditioned_logits(trained.model) - trained.base_logits).abs().max() > 1.0


def test_a_saved_adapter_gives_the_same_logits_over_a_base_quantized_anew(trained: Trained, tmp_path: Path) -> None:
    expected = conditioned_logits(trained.model)
    trained.model.save_pretrained(tmp_path)
    base = trained.load()
    assert torch.equal(logits(base), trained.base_logits)
    again = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(conditioned_logits(again), expected, rtol=0, atol=0)


def test_beams_and_samples_belong_to_their_person(trained: Trained) -> None:
    # LLM.int8 keeps a column apart if one row of the batch has an outlier there: the base itself, without an adapter,
    # computes a row a little differently (0.07 in a logit here) when its batch-mates change.
    base_depends_on_batch = trained.scheme == "int8"
    model = trained.model.eval()

    def generate(prompts: list[list[int]], people: torch.Tensor) -> torch.Tensor:
        tokens = torch.tensor(prompts)
        return model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            demographic_embeds=people,
            max_new_tokens=3,
            min_new_tokens=3,
            num_beams=3,
            num_return_sequences=3,
            do_sample=False,
        )

    together = generate([PROMPTS[0], PROMPTS[0], PROMPTS[1]], PEOPLE[[0, 1, 1]])
    for row, (prompt, person) in enumerate(((0, 0), (0, 1), (1, 1))):
        alone = generate([PROMPTS[prompt]], PEOPLE[[person]])
        ours = together[3 * row : 3 * row + 3]
        assert base_depends_on_batch or torch.equal(ours, alone)
        # the best beam starts with what the person was taught
        assert ours[0, len(PROMPTS[0])] == alone[0, len(PROMPTS[0])] == ANSWERS[person]


@pytest.mark.parametrize("scheme", ["nf4", "int8", "torchao-int8", "hqq-4"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_does_not_change_gradients(
    load_base: Callable, scheme: str, use_reentrant: bool
) -> None:
    base = load_base(scheme, "qwen3")
    torch.manual_seed(0)
    model = get_peft_model(base, adapter_config("qwen3", init_weights=False)).train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        outputs = model(**batch(), output_router_losses="local")
        (outputs.loss + 0.01 * outputs["aux_loss"]).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    model.enable_input_require_grads()  # without it, reentrant checkpointing gives no gradient at all
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
    for name, gradient in gradients().items():
        # the recomputed activations are the same numbers; only the order in which gradients are summed may differ
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("scheme", ["nf4", "int8", "torchao-int8", "torchao-by-hand"])
def test_all_linear_finds_every_quantized_layer(load_base: Callable, scheme: str) -> None:
    model = get_peft_model(load_base(scheme, "qwen3"), adapter_config("qwen3", target_modules="all-linear"))
    layers = [module for module in model.modules() if isinstance(module, CuMALinear)]
    assert len(layers) == 2 * 7  # of each decoder layer four in the attention, three in the MLP
    assert {type(layer.quantization_backend).__name__ for layer in layers} == {BACKENDS[scheme]}
