# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import math

import pytest
import torch
from torch import nn

from trl_cuma import compute_gates
from trl_cuma.adapter.router import GATES, CuMARouter


def gates_by_hand(row: list[float], gate: str, top_k: int) -> list[float]:
    """The formulas of the documentation for one token, in plain Python."""
    chosen = sorted(range(len(row)), key=lambda i: -row[i])[:top_k]
    p = [math.exp(z) / sum(math.exp(other) for other in row) for z in row]
    if gate == "soft":
        return p
    if gate == "softmax_topk":
        return [p[i] if i in chosen else 0.0 for i in range(len(row))]
    values = row if gate == "topk_softmax" else p
    total = sum(math.exp(values[i]) for i in chosen)
    return [math.exp(values[i]) / total if i in chosen else 0.0 for i in range(len(row))]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("top_k", [2, 3, 5])
def test_gates_follow_their_formula(gate: str, top_k: int) -> None:
    logits = torch.randn(7, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    by_hand = [[gates_by_hand(row, gate, top_k) for row in sample] for sample in logits.tolist()]
    expected = torch.tensor(by_hand, dtype=torch.float64)
    gates = compute_gates(logits, gate=gate, top_k=top_k)
    torch.testing.assert_close(gates, expected, rtol=0, atol=1e-12)

    sums = gates.sum(-1)
    if gate == "softmax_topk" and top_k < 5:
        assert (sums < 1).all()
    else:
        torch.testing.assert_close(sums, torch.ones_like(sums))
    assert (gates != 0).sum(-1).unique().tolist() == [5 if gate == "soft" else top_k]


@pytest.mark.parametrize("gate", ["topk_softmax", "softmax_topk", "double_softmax"])
def test_ties_keep_exactly_k_experts(gate: str) -> None:
    gates = compute_gates(torch.zeros(4, 6), gate=gate, top_k=2)
    assert (gates != 0).sum(-1).tolist() == [2, 2, 2, 2]
    # equal logits: 1/k, or 1/E each where the gates are not normalised again
    torch.testing.assert_close(gates[gates != 0], torch.full((8,), 1 / 6 if gate == "softmax_topk" else 1 / 2))


def test_double_softmax_flattens_a_certain_router() -> None:
    # p = (1, 0, 0, 0), so the top two gates are e / (e + 1) = 0.731 and 1 / (e + 1) = 0.269
    gates = compute_gates(torch.tensor([80.0, 0.0, -5.0, -5.0]), gate="double_softmax", top_k=2)
    torch.testing.assert_close(gates, torch.tensor([0.7310586, 0.2689414, 0.0, 0.0]))
    certain = compute_gates(torch.tensor([80.0, 0.0, -5.0, -5.0]), gate="topk_softmax", top_k=2)
    torch.testing.assert_close(certain, torch.tensor([1.0, 0.0, 0.0, 0.0]))


@pytest.mark.parametrize("gate", GATES)
def test_half_precision_logits_give_float32_gates(gate: str) -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    gates = compute_gates(logits, gate=gate, top_k=2)
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates, compute_gates(logits.float(), gate=gate, top_k=2), rtol=0, atol=0)


@pytest.mark.parametrize("gate", GATES)
def test_the_router_gets_a_gradient(gate: str) -> None:
    logits = torch.tensor([0.3, -0.2, 0.9, 0.1], requires_grad=True)
    (compute_gates(logits, gate=gate, top_k=2) * torch.arange(4.0)).sum().backward()
    assert logits.grad.abs().max() > 0.01


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="`gate` must be one of .*got 'sigmoid'"):
        compute_gates(torch.zeros(3), gate="sigmoid")
    for top_k in (0, 4):
        with pytest.raises(ValueError, match=f"between 1 and the number of experts 3, got {top_k}"):
            compute_gates(torch.zeros(3), top_k=top_k)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize(("in_features", "demographic_features"), [(5, 3), (5, 0), (0, 3)])
def test_the_split_first_layer_is_an_mlp_on_the_concatenation(
    layers: int, in_features: int, demographic_features: int
) -> None:
    torch.manual_seed(0)
    router = CuMARouter(in_features, demographic_features, num_experts=4, hidden=6, layers=layers).double()
    first = nn.Linear(in_features + demographic_features, 4 if layers == 1 else 6).double()
    parts = [weight for weight in (router.hidden_weight, router.demographic_weight) if weight is not None]
    with torch.no_grad():
        first.weight.copy_(torch.cat(parts, dim=1))
        first.bias.copy_(router.bias)
    mlp = nn.Sequential(first, *router.rest)

    hidden = torch.randn(2, 7, in_features, dtype=torch.float64)
    profile = torch.randn(2, demographic_features, dtype=torch.float64)
    logits = router(
        hidden, profile if demographic_features else None, gather=lambda per_profile: per_profile.unsqueeze(1)
    )
    expected = mlp(torch.cat([hidden, profile.unsqueeze(1).expand(2, 7, -1)], dim=-1))
    torch.testing.assert_close(logits.expand_as(expected), expected, rtol=0, atol=1e-12)
    assert sum(p.numel() for p in router.parameters()) == sum(p.numel() for p in mlp.parameters())


def test_a_short_profile_is_not_drowned_by_a_wide_hidden_state_at_first() -> None:
    """Each half is initialised by its own fan-in, so that unit inputs give both the same variance, 1/3."""
    torch.manual_seed(0)
    router = CuMARouter(2000, 20, num_experts=4, hidden=400, layers=2)
    for weight, fan_in in ((router.hidden_weight, 2000), (router.demographic_weight, 20)):
        assert (weight @ torch.randn(fan_in, 50)).var().item() == pytest.approx(1 / 3, rel=0.2)
