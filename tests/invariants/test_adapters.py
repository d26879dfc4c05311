# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Adapters of one model do not touch each other, whatever they are called and however they were loaded."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from trl_cuma.testing import tiny_model

LINEAR = {"target_modules": "all-linear"}
# What sits beside the variant under test: other targets, routing, numbers of experts and ranks, and its own sharing.
NEIGHBOURS = {
    "joint": {
        "target_modules": ["v_proj", "gate_proj"],
        "router_groups": [["v_proj", "gate_proj"]],
        "demographic_projection": 2,
        "num_experts": 3,
        "r": 2,
    },
    "demographic": LINEAR | {"routing": "demographic", "gate": "soft", "num_experts": 5},
    "semantic": LINEAR | {"routing": "semantic", "router_layers": 1, "use_rslora": True},
}
neighbours = pytest.mark.parametrize("neighbour", NEIGHBOURS.values(), ids=NEIGHBOURS.keys())


@neighbours
def test_each_of_two_adapters_gives_what_it_gives_alone(
    make_model, make_batch, variant, neighbour: dict, tmp_path
) -> None:
    """Bitwise, through switching, deletion and training of the other."""
    batch = make_batch(lengths=[6, 3, 4])
    alone = make_model(**neighbour)
    alone.save_pretrained(tmp_path)
    model = make_model(**variant)
    first, second = model(**batch).logits, alone(**batch).logits
    assert (first - second).abs().max() > 1e-3
    tokens = model.generate(**batch, max_new_tokens=3)

    model.load_adapter(tmp_path, "second")
    assert torch.equal(model(**batch).logits, first)
    model.set_adapter("second")
    assert torch.equal(model(**batch).logits, second)

    weights = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    model.set_requires_grad("second")
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.grad is not None], lr=0.1).step()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if name in weights)
    model.eval().set_adapter("default")
    assert torch.equal(model(**batch).logits, first)
    model.delete_adapter("second")
    assert torch.equal(model(**batch).logits, first)
    assert torch.equal(model.generate(**batch, max_new_tokens=3), tokens)

    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(model(**batch).logits, second)


@neighbours
def test_two_active_adapters_each_add_their_part(make_model, make_config, make_batch, variant, neighbour) -> None:
    """On one layer, where the sum can be seen; each keeps its own routing, profile and number of experts."""
    here = {"target_modules": ["lm_head"], "router_groups": None}
    model, batch = make_model(**variant | here), make_batch()
    model.add_adapter("second", make_config(**neighbour | here))
    logits = []
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        logits.append(model(**batch).logits)
    with model.disable_adapter():
        base = model(**batch).logits
    assert (logits[0] - base).abs().max() > 1e-3 and (logits[1] - base).abs().max() > 1e-3
    # three float32 additions in another order: a few eps of logits of size 1
    torch.testing.assert_close(logits[2] - base, logits[0] - base + logits[1] - base, rtol=0, atol=2e-6)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "cuma_" in name)


def test_low_cpu_mem_usage_loads_the_same(make_model, make_batch, case, tmp_path) -> None:
    """As the first adapter and as another one's neighbour; nothing is left on the meta device."""
    architecture, fields = case
    model, batch = make_model(architecture, **fields), make_batch(lengths=[6, 3, 4])
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        base = tiny_model(architecture, vocab_size=50)
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True).eval()
        assert torch.equal(loaded(**batch).logits, expected)
        loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=True)
    loaded.set_adapter("second")
    assert torch.equal(loaded(**batch).logits, expected)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())


@pytest.mark.parametrize("name", ["fr-FR", "Grüße 日本", "cuma_experts", "default_2", "0", "base_layer"])
def test_any_name_will_do(make_model, make_batch, name: str, tmp_path) -> None:
    """Saved, loaded under its name beside `default`, trained, deleted."""
    variant = LINEAR | {"demographic_projection": 3, "router_groups": [["q_proj", "k_proj", "v_proj"]]}
    model, batch = make_model(adapter_name=name, **variant), make_batch()
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    other = make_model(**variant)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
    before = other(**batch).logits
    other.load_adapter(tmp_path / name, name, is_trainable=True)
    assert torch.equal(other(**batch).logits, before)
    other.set_adapter(name)
    assert torch.equal(other(**batch).logits, expected)
    other.train()(**batch, labels=batch["input_ids"]).loss.backward()
    trained = {n for n, p in other.named_parameters() if p.grad is not None}
    assert trained and all(f".{name}." in n for n in trained)
    other.eval().set_adapter("default")
    other.delete_adapter(name)
    assert torch.equal(other(**batch).logits, before)


def test_a_lora_and_a_cuma_adapter_do_not_share_a_model(make_model, make_config, make_batch) -> None:
    """PEFT's own error; the way to build on a LoRA is to merge it first. (The other direction: test_model.)"""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    lora, batch = get_peft_model(tiny_model("qwen3", vocab_size=50), config), make_batch()
    profiles = batch.pop("demographic_embeds")
    expected = lora(**batch).logits
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        lora.add_adapter("cuma", make_config())
    assert torch.equal(lora(**batch).logits, expected)

    merged = lora.merge_and_unload()
    expected = merged(**batch).logits
    model = get_peft_model(merged, make_config(init_weights=True))
    assert torch.equal(model(**batch, demographic_embeds=profiles).logits, expected)
