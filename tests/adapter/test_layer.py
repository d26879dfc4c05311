# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from trl_cuma import CuMAConfig
from trl_cuma.adapter.layer import CuMALinear
from trl_cuma.testing import tiny_model


class Wrapped(nn.Module):
    """One linear layer as a model, that can hand its input on flattened as some architectures do."""

    def __init__(self, flatten: bool = False) -> None:
        super().__init__()
        self.lin = nn.Linear(5, 7)
        self.flatten = flatten

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if self.flatten else self.lin(x)


def wrap(flatten: bool = False, **fields) -> nn.Module:
    torch.manual_seed(0)
    config = dict(target_modules=["lin"], demographic_dim=3, num_experts=4, r=2, router_hidden=6, init_weights=False)
    return get_peft_model(Wrapped(flatten), CuMAConfig(**(config | fields)))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("share_a", [False, True])
def test_one_expert_is_a_lora(make_model, make_batch, rslora: bool, share_a: bool) -> None:
    """`num_experts=1, top_k=1`: the gate is exp(z)/exp(z) = 1 whatever the router says."""
    cuma = make_model(num_experts=1, top_k=1, use_rslora=rslora, share_a=share_a, target_modules="all-linear")
    lora_config = LoraConfig(r=4, lora_alpha=32, use_rslora=rslora, target_modules="all-linear", task_type="CAUSAL_LM")
    lora = get_peft_model(tiny_model("qwen3", vocab_size=50), lora_config).eval()
    names = [name for name, module in cuma.named_modules() if isinstance(module, CuMALinear)]
    assert len(names) == 14
    for name in names:
        source, target = cuma.get_submodule(name).cuma_experts["default"], lora.get_submodule(name)
        target.lora_A["default"].weight.data.copy_(source.weight_a)
        target.lora_B["default"].weight.data.copy_(source.weight_b)

    batch = make_batch(lengths=[6, 4, 3])
    ours = cuma(**batch, labels=batch["input_ids"])
    del batch["demographic_embeds"]
    theirs = lora(**batch, labels=batch["input_ids"])
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-6)
    ours.loss.backward()
    theirs.loss.backward()
    for name in names:
        experts, layer = cuma.get_submodule(name).cuma_experts["default"], lora.get_submodule(name)
        torch.testing.assert_close(experts.weight_a.grad, layer.lora_A["default"].weight.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(experts.weight_b.grad, layer.lora_B["default"].weight.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("routing", ["joint", "demographic", "semantic"])
def test_it_computes_the_formula_of_the_paper(routing: str) -> None:
    """y = W0 x + alpha/r * sum_i g_i B_i A_i x, the gates from an MLP over [x; d], expert by expert."""
    model = wrap(routing=routing, lora_alpha=5, gate="softmax_topk").double()
    layer = model.base_model.model.lin
    experts, router = layer.cuma_experts["default"], layer.cuma_router["default"]
    x, d = torch.randn(2, 4, 5).double(), torch.randn(2, 3).double()
    got = model(x, demographic_embeds=d)
    for b in range(2):
        for t in range(4):
            first = router.bias.clone()
            if routing != "demographic":
                first += router.hidden_weight @ x[b, t]
            if routing != "semantic":
                first += router.demographic_weight @ d[b]
            logits = router.rest[1].weight @ first.relu() + router.rest[1].bias
            p = [math.exp(z) / sum(math.exp(other) for other in logits.tolist()) for z in logits.tolist()]
            expected = layer.base_layer(x[b, t])
            for i in sorted(range(4), key=lambda i: -p[i])[:2]:
                a, up = experts.weight_a[2 * i : 2 * i + 2], experts.weight_b[:, 2 * i : 2 * i + 2]
                expected = expected + 5 / 2 * p[i] * (up @ (a @ x[b, t]))
            torch.testing.assert_close(got[b, t], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("routing", ["joint", "demographic", "semantic"])
def test_a_model_that_flattens_batch_and_sequence_gives_the_same(routing: str) -> None:
    x, d = torch.randn(3, 4, 5), torch.randn(3, 3)
    straight, flat = (
        wrap(routing=routing)(x, demographic_embeds=d),
        wrap(True, routing=routing)(x, demographic_embeds=d),
    )
    torch.testing.assert_close(flat, straight)
    # inputs without a sequence, (batch, features), and with two of them
    torch.testing.assert_close(wrap(routing=routing)(x[:, 0], demographic_embeds=d), straight[:, 0])
    torch.testing.assert_close(
        wrap(routing=routing)(x.unflatten(1, (2, 2)), demographic_embeds=d), straight.unflatten(1, (2, 2))
    )


def test_dropout_leaves_the_router_alone() -> None:
    model = wrap(lora_dropout=0.5).train()
    layer = model.base_model.model.lin
    seen = []
    layer.cuma_router["default"].register_forward_hook(lambda module, args, logits: seen.append(logits))
    x, d = torch.randn(3, 4, 5), torch.randn(3, 3)
    outputs = [model(x, demographic_embeds=d) for _ in range(2)]
    assert (outputs[0] - outputs[1]).abs().max() > 0  # the experts' input is dropped
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)


def test_gpt2_conv1d_is_a_linear_layer(make_model, make_batch) -> None:
    model, batch = make_model("gpt2", target_modules=["c_attn", "c_proj"]), make_batch()
    logits = model(**batch).logits
    with model.disable_adapter():
        assert (model(**batch).logits - logits).abs().max() > 1e-3
    experts = model.base_model.model.transformer.h[0].attn.c_attn.cuma_experts["default"]
    assert (experts.weight_a.shape, experts.weight_b.shape) == ((4 * 4, 64), (3 * 64, 4 * 4))


@pytest.mark.parametrize("autocast", [True, False])
def test_a_bfloat16_base_trains_with_float32_and_bfloat16_adapters(make_model, make_batch, autocast: bool) -> None:
    model = make_model(
        base={"dtype": torch.bfloat16}, autocast_adapter_dtype=autocast, demographic_projection=3, r=8
    ).train()
    expected = torch.float32 if autocast else torch.bfloat16
    assert {p.dtype for name, p in model.named_parameters() if "cuma_" in name} == {expected}
    batch = make_batch()
    outputs = model(**batch, labels=batch["input_ids"], output_router_losses="local")
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs["aux_loss"].dtype == torch.float32
    (outputs.loss + outputs["aux_loss"]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_layer_in_multihead_attention_is_refused() -> None:
    """nn.MultiheadAttention uses its out_proj's weight without calling it: an adapter there would do nothing."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

    with pytest.raises(ValueError, match="`attention.out_proj`: nn.MultiheadAttention"):
        get_peft_model(Attention(), CuMAConfig(target_modules=["out_proj"]))
