# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A profile's LoRA computes what the adapter does for that profile."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from trl_cuma import CuMAConfig
from trl_cuma.adapter.export import (
    adapted_layers,
    collapse,
    exported_adapter,
    in_place_of_experts,
    is_exact,
    lora_config,
    mean_gates,
    save_lora,
    to_rank,
)
from trl_cuma.testing import ARCHITECTURES, tiny_model

DIM = 6
EXACT = {
    "default": {},
    "soft": {"gate": "soft"},
    "double_softmax": {"gate": "double_softmax"},
    "share_a": {"share_a": True},
    "rslora": {"use_rslora": True},
    "one": {"num_experts": 1, "top_k": 1},
    "projection, groups": {"demographic_projection": 3, "router_groups": [["q_proj", "v_proj"]]},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "some layers": {"layers_to_transform": [1]},
    "joint, one": {"routing": "joint", "num_experts": 1, "top_k": 1},
}


def routed(architecture: str = "llama", dtype: torch.dtype = torch.float32, **fields) -> PeftModel:
    torch.manual_seed(0)
    fields = {"routing": "demographic", "num_experts": 4, "r": 3, **fields}
    config = CuMAConfig(task_type="CAUSAL_LM", demographic_dim=DIM, init_weights=False, **fields)
    model = get_peft_model(tiny_model(architecture, vocab_size=60, dtype=dtype), config).eval()
    for name, parameter in model.named_parameters():
        if "weight_b" in name:  # experts that change the answer much
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def exported(model: PeftModel, embeds: torch.Tensor, folder) -> PeftModel:
    """What PEFT makes of the two files, on a base of its own."""
    factors = collapse(model, embeds)
    rank = max(len(a) for a, _ in factors.values())
    factors = {name: to_rank(pair, rank) for name, pair in factors.items()}
    dtype = next(model.parameters()).dtype
    save_lora(folder, factors, lora_config(model, rank), torch.float32 if dtype == torch.bfloat16 else dtype)
    base = copy.deepcopy(model).unload()
    return PeftModel.from_pretrained(base, folder).eval()


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("case", EXACT)
@torch.no_grad()
def test_the_loras_logits_are_the_adapters(tmp_path, case):
    model = routed(**EXACT[case])
    assert is_exact(model.peft_config["default"])
    ids, embeds = torch.randint(3, 60, (4, 7)), torch.randn(2, DIM)
    lora = exported(model, embeds[0], tmp_path)
    mine, others = (model(ids, demographic_embeds=each.expand(4, -1)).logits for each in embeds)
    assert relative(lora(ids).logits, mine) < 1e-5
    if model.peft_config["default"].num_experts > 1:
        assert relative(lora(ids).logits, others) > 1e-3  # it is this profile's, and no other's


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_every_architecture_exports(tmp_path, architecture):
    model, embeds = routed(architecture), torch.randn(DIM)
    ids = torch.randint(3, 60, (4, 7))
    expected = model(ids, demographic_embeds=embeds.expand(4, -1)).logits
    with model.disable_adapter():
        base = model(ids).logits
    lora = exported(model, embeds, tmp_path)
    assert relative(lora(ids).logits, expected) < 1e-5 < relative(base, expected)


@torch.no_grad()
def test_greedy_answers_are_equal_on_200_prompts(tmp_path):
    model, embeds = routed(), torch.randn(DIM)
    lora = exported(model, embeds, tmp_path)
    prompts = torch.randint(3, 60, (200, 6), generator=torch.Generator().manual_seed(1))
    options = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "max_new_tokens": 12}
    own = model.generate(input_ids=prompts, demographic_embeds=embeds.expand(200, -1), **options)
    assert torch.equal(lora.generate(input_ids=prompts, **options), own)


@torch.no_grad()
def test_in_double_precision_nothing_but_rounding_to_float_is_lost():
    model, embeds = routed().double(), torch.randn(DIM, dtype=torch.float64)
    ids = torch.randint(3, 60, (4, 7))
    expected = model(ids, demographic_embeds=embeds.expand(4, -1)).logits
    with in_place_of_experts(model, collapse(model, embeds)):
        assert relative(model(ids).logits, expected) < 1e-6


@pytest.mark.parametrize("fields", [{}, {"share_a": True}], ids=["separate A", "shared A"])
@torch.no_grad()
def test_film_without_its_shift_is_exact_under_given_gates(fields):
    model, embeds = routed(film_hidden=5, **fields), torch.randn(DIM)
    for layer in adapted_layers(model, "default").values():
        film = layer.cuma_film["default"]
        film.last.weight[film.num_experts * film.r :] = 0  # the half that makes β
        film.last.bias[film.num_experts * film.r :] = 0
    ids = torch.randint(3, 60, (4, 7))
    expected = model(ids, demographic_embeds=embeds.expand(4, -1)).logits
    with in_place_of_experts(model, collapse(model, embeds)):
        assert relative(model(ids).logits, expected) < 1e-5
    assert not is_exact(model.peft_config["default"])  # in general there is a shift


@torch.no_grad()
def test_mean_gates_are_means_over_tokens_that_are_no_padding():
    model, embeds = routed(routing="joint", gate="soft"), torch.randn(2, DIM)
    rows = [torch.randint(3, 60, (1, length)) for length in (5, 3)]
    seen: dict[str, list[torch.Tensor]] = {}
    for row, each in zip(rows, embeds, strict=True):  # alone, without padding: by hand
        hooks = [
            layer.register_forward_pre_hook(
                lambda m, args, name=name: seen.setdefault(name, []).append(m.gates("default", args[0])[0])
            )
            for name, layer in adapted_layers(model, "default").items()
        ]
        model(row, demographic_embeds=each[None])
        for hook in hooks:
            hook.remove()
    ids = torch.zeros(2, 5, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : row.shape[1]], mask[number, : row.shape[1]] = row[0], 1
    with mean_gates(model) as gates:
        model(input_ids=ids, attention_mask=mask, demographic_embeds=embeds)
    assert gates.keys() == seen.keys() and len(gates) == 4
    for name, values in seen.items():
        torch.testing.assert_close(gates[name], torch.cat(values).mean(0), rtol=1e-5, atol=1e-6)


def test_a_lower_rank_is_the_nearest_and_a_higher_one_the_same():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 9, generator=generator), torch.randn(7, 5, generator=generator)
    low = to_rank((a, b), 2)
    u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
    torch.testing.assert_close(low[1] @ low[0], u[:, :2] * s[:2] @ v[:2], rtol=1e-4, atol=1e-5)
    high = to_rank((a, b), 8)
    assert high[0].shape == (8, 9) and torch.equal(high[1] @ high[0], b @ a)


@torch.no_grad()
def test_the_model_is_as_it_was_after_standing_in(tmp_path):
    model, embeds = routed(), torch.randn(DIM)
    ids = torch.randint(3, 60, (2, 4))
    before = model(ids, demographic_embeds=embeds.expand(2, -1)).logits
    with pytest.raises(RuntimeError, match="stop"), in_place_of_experts(model, collapse(model, embeds)):
        raise RuntimeError("stop")
    with pytest.raises(RuntimeError, match="stop"), mean_gates(model):
        raise RuntimeError("stop")
    assert torch.equal(model(ids, demographic_embeds=embeds.expand(2, -1)).logits, before)


def test_what_no_lora_can_hold_is_refused():
    with pytest.raises(ValueError, match="`routing='semantic'` the adapter reads no profile"):
        exported_adapter(routed(routing="semantic"))
    with pytest.raises(ValueError, match="has `modules_to_save`"):
        exported_adapter(routed(modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match="the model has 0"):
        exported_adapter(get_peft_model(tiny_model("llama", vocab_size=60), LoraConfig(task_type="CAUSAL_LM")))
    with pytest.raises(ValueError, match="`routing='joint'` the gates depend on the token"):
        collapse(routed(routing="joint"), torch.randn(DIM))


def test_layers_are_named_by_their_last_part_where_that_is_enough():
    assert lora_config(routed(), 4).target_modules == {"q_proj", "v_proj"}
    some = lora_config(routed(layers_to_transform=[1]), 4).target_modules
    assert some == {f"model.layers.1.self_attn.{name}" for name in ("q_proj", "v_proj")}
