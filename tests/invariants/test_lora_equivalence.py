# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""One expert with top-1 is a plain LoRA, as documented: the two trained side by side stay the same."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_cuma.adapter.layer import CuMALinear
from trl_cuma.testing import tiny_model

STEPS = 5


@pytest.mark.parametrize(
    "architecture, fields",
    [
        ("qwen3", {"demographic_projection": 3, "use_rslora": True}),
        ("llama", {"router_groups": [["q_proj", "k_proj", "v_proj"]], "rank_pattern": {"v_proj": 2}}),
        ("gpt2", {"routing": "demographic", "gate": "soft"}),
        ("bloom", {"routing": "semantic", "gate": "softmax_topk", "share_a": True}),
        ("opt", {"gate": "double_softmax"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_expert_trains_as_a_lora(make_model, make_batch, architecture: str, fields: dict) -> None:
    """
    With one expert each gate formula gives exp(z) / exp(z) = 1, and the router no gradient. Adam divides by the
    gradient's own size and by its eps = 1e-8, so it can enlarge a rounding of float64 (1e-16) a hundred million times:
    weights and losses within 1e-7.
    """
    base = {"dtype": torch.float64}
    common = {"target_modules": "all-linear", "lora_dropout": 0.1}
    cuma = make_model(
        architecture,
        num_experts=1,
        top_k=1,
        init_weights=True,
        base=base,
        autocast_adapter_dtype=False,
        **common,
        **fields,
    ).train()
    shared = {name: fields[name] for name in ("use_rslora", "rank_pattern") if name in fields}
    config = LoraConfig(r=4, lora_alpha=32, task_type="CAUSAL_LM", **common, **shared)
    lora = get_peft_model(
        tiny_model(architecture, vocab_size=50, **base), config, autocast_adapter_dtype=False
    ).train()

    def pairs():
        for name, module in cuma.named_modules():
            if isinstance(module, CuMALinear):
                experts, layer = module.cuma_experts["default"], lora.get_submodule(name)
                yield name, experts.weight_a, layer.lora_A["default"].weight
                yield name, experts.weight_b, layer.lora_B["default"].weight

    for _, ours, theirs in pairs():
        assert ours.shape == theirs.shape
        ours.data.copy_(theirs)
    start = {name: p.detach().clone() for name, p in cuma.named_parameters() if p.requires_grad}

    losses: list[list[float]] = []
    for model in (cuma, lora):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
        losses.append([])
        for step in range(STEPS):
            batch = make_batch(lengths=[6, 4, 3], seed=step % 2)
            if model is lora:
                del batch["demographic_embeds"]
            torch.manual_seed(step)  # the same dropout
            loss = model(**batch, labels=batch["input_ids"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-7)
    assert losses[0][-1] < losses[0][0] - 1e-2  # they do learn
    for name, ours, theirs in pairs():
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")
    for name, parameter in cuma.named_parameters():
        if name in start and "cuma_experts" not in name:
            assert torch.equal(parameter, start[name]), name  # routers and projection
        elif name in start:
            assert (parameter - start[name]).abs().max() > 1e-3, name

    batch = make_batch(lengths=[6, 4, 3])
    profiles = batch.pop("demographic_embeds")
    torch.testing.assert_close(
        cuma.eval()(**batch, demographic_embeds=profiles).logits, lora.eval()(**batch).logits, rtol=0, atol=1e-6
    )
