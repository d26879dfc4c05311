# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Routers compute in float32 from hidden states in bfloat16, which they take as they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trl_cuma.adapter import layer as layer_module
from trl_cuma.adapter.router import CuMARouter

BFLOAT16_BASE = {"base": {"dtype": torch.bfloat16}}  # PEFT's default for it: float32 adapters


def routers_of(model: nn.Module) -> list[CuMARouter]:
    return [module for module in model.modules() if isinstance(module, CuMARouter)]


# ---------------------------------------------------------------------------------------------- with checkpointing


class RouterCalls:
    """What the routers of a model were given and returned, and the gates that came of it."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[CuMARouter, tuple, dict, torch.Tensor]] = []
        self.gates: list[torch.Tensor] = []
        for router in routers_of(model):
            router.register_forward_hook(lambda *call: self.calls.append(call), with_kwargs=True)
        compute_gates = layer_module.compute_gates

        def recorded(*args: Any) -> torch.Tensor:
            self.gates.append(compute_gates(*args))
            return self.gates[-1]

        monkeypatch.setattr(layer_module, "compute_gates", recorded)


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=["float32-adapter", "bfloat16-adapter"])
def test_routers_compute_in_float32_from_bfloat16_hidden_states(
    make_model, make_batch, monkeypatch, adapter: torch.dtype, autocast: bool
) -> None:
    """
    Against the same routers in float64, on the same hidden states. Where a product has bfloat16 operands, the weights
    of the first layer are rounded to it, each by u = 2^-8 of itself at most, and on a CPU so is the product's result:

        |δ first| <= u (|W_h| |h| + |W_h h|)        |δ logits| <= |V| |δ first|

    because ReLU moves nothing apart, and what follows is in float32. Otherwise there is float32's rounding alone: half
    an eps for each term of a sum, of which no sum here has more than 256.
    """
    fields = BFLOAT16_BASE | {"autocast_adapter_dtype": adapter == torch.float32}
    model = make_model(target_modules="all-linear", router_hidden=32, **fields)
    for router in routers_of(model):
        for weight in router.parameters():  # they came from the base's bfloat16, and would not be rounded to it again
            weight.data += 0.01 * weight.data.abs().mean() * torch.randn_like(weight)
    calls = RouterCalls(model, monkeypatch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(**make_batch(rows=8, length=8))
    assert len(calls.calls) == len(calls.gates) == 14
    assert {gates.dtype for gates in calls.gates} == {torch.float32}

    low = autocast or adapter == torch.bfloat16
    squares, squares_in_bfloat16 = [], []
    for router, (hidden, profiles), kwargs, logits in calls.calls:
        assert hidden.dtype == torch.bfloat16 and logits.dtype == torch.float32
        gather, h, d = kwargs["gather"], hidden.double(), profiles.double()
        weights = (router.hidden_weight, router.demographic_weight, router.bias, *router.rest[1].parameters())
        w, w_profile, b, v, c = (weight.detach().double() for weight in weights)
        profile_part = gather(F.linear(d, w_profile, b))
        exact = F.linear((F.linear(h, w) + profile_part).relu(), v, c)
        size = F.linear(h.abs(), w.abs())
        first = 2**-8 * low * (size + F.linear(h, w).abs())
        size = size + gather(F.linear(d.abs(), w_profile.abs(), b.abs()))
        bound = F.linear(first, v.abs()) + 256 * 2**-24 * F.linear(size, v.abs(), c.abs())
        error = (logits - exact).abs()
        assert (error <= bound).all()
        squares.append(error.square().mean())
        squares_in_bfloat16.append((_in_bfloat16(weights, hidden, profiles, gather) - exact).square().mean())
    ours, theirs = (torch.stack(each).mean().sqrt().item() for each in (squares, squares_in_bfloat16))
    assert ours < theirs * (0.5 if low else 1e-3)


def _in_bfloat16(weights: tuple, hidden: torch.Tensor, profiles: torch.Tensor, gather: Callable) -> torch.Tensor:
    """A router of these weights as it would be if all of it computed in bfloat16."""
    w, w_profile, b, v, c = (weight.detach().bfloat16() for weight in weights)
    first = F.linear(hidden, w) + gather(F.linear(profiles.bfloat16(), w_profile, b))
    return F.linear(first.relu(), v, c).double()
