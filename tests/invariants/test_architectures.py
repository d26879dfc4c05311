# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Each architecture, with its default targets and with all linear layers: train, generate, save, load."""

import pytest
import torch
from peft import PeftModel

from trl_cuma.adapter.layer import CuMALinear
from trl_cuma.testing import tiny_model

ATTENTION = {"q_proj", "v_proj"}
DEFAULT_TARGETS = {
    "llama": ATTENTION,
    "qwen3": ATTENTION,
    "mistral": ATTENTION,
    "gemma": ATTENTION,
    "phi": ATTENTION,
    "gpt2": {"c_attn"},
    "opt": ATTENTION,
    "bloom": {"query_key_value"},
}
LINEAR_LAYERS = {"llama": 7, "qwen3": 7, "mistral": 7, "gemma": 7, "phi": 6, "gpt2": 4, "opt": 6, "bloom": 4}


@pytest.mark.parametrize("targets", [None, "all-linear"], ids=["default", "all-linear"])
@pytest.mark.parametrize(
    "case", ["qwen3-joint", "llama", "mistral", "gemma", "phi", "gpt2", "opt", "bloom"], indirect=True
)
def test_trains_generates_and_loads(make_model, make_batch, case, targets, alone, left_padded, tmp_path) -> None:
    architecture, fields = case
    fields |= {"target_modules": targets, "init_weights": True, "lora_alpha": 32}
    if targets is None and "router_groups" in fields:
        fields["router_groups"] = [["q_proj", "v_proj"]]  # a group names what is targeted
    model = make_model(architecture, **fields).train()
    adapted = {name for name, module in model.named_modules() if isinstance(module, CuMALinear)}
    if targets is None:
        assert {name.rpartition(".")[2] for name in adapted} == DEFAULT_TARGETS[architecture]
        assert len(adapted) == 2 * len(DEFAULT_TARGETS[architecture])
    else:
        assert len(adapted) == 2 * LINEAR_LAYERS[architecture]

    batch = make_batch(lengths=[6, 3, 5])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        outputs = model(**batch, labels=labels, output_router_losses="local")
        optimizer.zero_grad()
        (outputs.loss + 0.01 * outputs["aux_loss"]).backward()
        optimizer.step()
        losses.append(outputs.loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) != ("cuma_" in name), name  # all of the adapter, nothing else

    model.eval()
    prompts = left_padded(make_batch(lengths=[5, 2, 4], seed=1))
    searches = [{"do_sample": False}, {"num_beams": 3, "num_return_sequences": 2}]
    steps = {"max_new_tokens": 4, "min_new_tokens": 4}
    generated = [model.generate(**prompts, **steps, **search) for search in searches]
    for search, together in zip(searches, generated, strict=True):
        copies = search.get("num_return_sequences", 1)
        for row in range(3):
            single = model.generate(**alone(prompts, row), **steps, **search)
            assert torch.equal(single[:, -4:], together[row * copies : (row + 1) * copies, -4:])

    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(architecture, vocab_size=50), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, expected)
    for search, together in zip(searches, generated, strict=True):
        assert torch.equal(loaded.generate(**prompts, **steps, **search), together)
