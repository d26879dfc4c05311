# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from trl_cuma.adapter.experts import CuMAExperts


@pytest.mark.parametrize("share_a", [False, True])
def test_stacked_experts_equal_a_loop(share_a: bool) -> None:
    torch.manual_seed(0)
    experts, r = 5, 3
    module = CuMAExperts(7, 6, r, experts, share_a, init_weights=False).double()
    x = torch.randn(2, 4, 7, dtype=torch.float64)
    gates = torch.randn(2, 4, experts, dtype=torch.float64).softmax(-1)

    zeros = torch.zeros(2, 4, 6, dtype=torch.float64)
    expected = zeros.clone()
    for i in range(experts):
        a = module.weight_a if share_a else module.weight_a[i * r : (i + 1) * r]
        b = module.weight_b[:, i * r : (i + 1) * r]
        expected += gates[..., i : i + 1] * (x @ a.T @ b.T)
    torch.testing.assert_close(module(x, gates, zeros, experts), expected, rtol=0, atol=1e-10)
    assert module.weight_a.shape == (r if share_a else experts * r, 7)


@pytest.mark.parametrize("share_a", [False, True])
def test_gates_of_a_row_broadcast_along_it(share_a: bool) -> None:
    module = CuMAExperts(7, 6, 3, 5, share_a, init_weights=False)
    x, gates = torch.randn(2, 4, 7), torch.randn(2, 1, 5)
    base = torch.randn(2, 4, 6)
    torch.testing.assert_close(module(x, gates, base, 5), module(x, gates.expand(2, 4, 5), base, 5))


def test_it_starts_as_lora_does() -> None:
    module = CuMAExperts(400, 6, 3, 5, share_a=False)
    base = torch.randn(2, 6)
    assert torch.equal(module(torch.randn(2, 400), torch.randn(2, 5), base, 5), base)  # B is zero
    bound = 1 / 400**0.5  # kaiming_uniform with a = sqrt(5), fan_in = 400
    assert 0.9 * bound < module.weight_a.abs().max() <= bound


def test_every_expert_gets_a_gradient_also_where_its_gate_is_zero() -> None:
    module = CuMAExperts(7, 6, 3, 5, share_a=False, init_weights=False)
    module(torch.randn(2, 7), torch.tensor([[1.0, 0, 0, 0, 0]] * 2), torch.zeros(2, 6), 1).sum().backward()
    assert module.weight_a.grad[:3].abs().max() > 0
    assert module.weight_a.grad[3:].abs().max() == 0
