# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What the tests of the experts' paths share: the formula, its rounding, and a count of what a step costs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from trl_cuma.adapter.experts import CuMAExperts
from trl_cuma.adapter.router import compute_gates


@dataclass
class Mixture:
    """Experts and random inputs of theirs. Gradients are taken with respect to the router's logits, too."""

    experts: CuMAExperts
    base: torch.Tensor
    x: torch.Tensor
    logits: torch.Tensor
    gate: str = "topk_softmax"
    top_k: int = 2
    scaling: float = 2.5

    @property
    def used(self) -> int:
        return self.experts.num_experts if self.gate == "soft" else self.top_k

    def gates(self) -> torch.Tensor:
        return compute_gates(self.logits, self.gate, self.top_k)

    def fast(
        self, gates: torch.Tensor, in_place: bool = False, call: Callable[..., torch.Tensor] | None = None
    ) -> torch.Tensor:
        base = self.base.clone() if in_place else self.base  # what is written into is a copy
        call = self.experts if call is None else call
        return call(self.x, gates, base, self.used, self.scaling, in_place)

    def path(self) -> str:
        """Name of the autograd function that mixes these shapes."""
        node = self.fast(self.gates()).grad_fn
        while not node.name().startswith("Mix"):  # views of its result
            node = node.next_functions[0][0]
        return node.name().removesuffix("Backward")

    def formula(self, gates: torch.Tensor) -> torch.Tensor:
        """`base + s · sum_i g_i B_i A_i x`, expert by expert."""
        a, b = self.experts.weight_a, self.experts.weight_b
        r, count = self.experts.r, self.experts.num_experts
        by_expert = [a] * count if self.experts.share_a else a.split(r)
        terms = [gates[..., i : i + 1] * (self.x @ by_expert[i].T @ b[:, i * r : (i + 1) * r].T) for i in range(count)]
        return self.base + self.scaling * sum(terms)

    def results(self, way: Callable[[torch.Tensor], torch.Tensor], absolute: bool = False) -> dict[str, torch.Tensor]:
        """
        The output of `way(gates)`, and the gradients of all that it depends on. Of the gates' gradient only that of
        the chosen ones: the router's depends on no other, and some paths leave the others at zero.
        """
        gates = self.gates()
        y = way(gates)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)  # same in each
        inputs = {
            "base": self.base,
            "x": self.x,
            "a": self.experts.weight_a,
            "b": self.experts.weight_b,
            "gates": gates,
            "logits": self.logits,
        }
        grads = torch.autograd.grad(y, list(inputs.values()), dy.abs() if absolute else dy)
        got = {"y": y.detach()} | dict(zip(inputs, grads, strict=True))
        return got | {"gates": got["gates"] * (gates != 0)}

    def double(self) -> Mixture:
        """The same numbers in float64."""
        tensors = (t.detach().double().requires_grad_() for t in (self.base, self.x, self.logits))
        return Mixture(copy.deepcopy(self.experts).double(), *tensors, self.gate, self.top_k, self.scaling)

    def magnitudes(self) -> dict[str, torch.Tensor]:
        """The sums of the absolute values of all terms that the formula and its gradients add up."""
        other = self.double()
        for tensor in (other.base, other.x, *other.experts.parameters()):
            tensor.data.abs_()
        return other.results(other.formula, absolute=True)


@pytest.fixture
def make_mixture() -> Callable[..., Mixture]:
    """A [`Mixture`] of 7 → 6 features and five experts of rank 3, unless told."""

    def make(
        share_a: bool,
        rows: tuple[int, ...] = (2, 4),
        gate_rows: tuple[int, ...] | None = None,
        *,
        sizes: tuple[int, int, int, int] = (7, 6, 3, 5),
        dtype: torch.dtype = torch.float64,
        **fields: Any,
    ) -> Mixture:
        torch.manual_seed(0)
        n_in, n_out, r, count = sizes
        experts = CuMAExperts(n_in, n_out, r, count, share_a, init_weights=False).to(dtype)
        nn.init.normal_(experts.weight_b)
        logits_dtype = torch.promote_types(dtype, torch.float32)  # as a router gives them
        return Mixture(
            experts,
            torch.randn(*rows, n_out, dtype=dtype).requires_grad_(),
            torch.randn(*rows, n_in, dtype=dtype).requires_grad_(),
            torch.randn(*(gate_rows or rows), count, dtype=logits_dtype).requires_grad_(),
            **fields,
        )

    return make


@pytest.fixture
def assert_is_formula() -> Callable[..., None]:
    def check(mixture: Mixture, got: dict[str, torch.Tensor], dtype: torch.dtype = torch.float64) -> None:
        """
        In float64 to 1e-10. In other dtypes to the error bound of a sum of products: each number on the way is rounded
        by half an eps, at most 12 times between an input and a result (5 casts of operands, 7 results: in a row's dA
        `s g`, `s g B`, `dz`, `dA` and up to 3 additions of rows), and sums are added up in float32, in at most as many
        steps as all summed dimensions are long together; of the sum of the terms' absolute values.
        """
        exact = mixture.double()
        expected = exact.results(exact.formula)
        bounds = {name: torch.full_like(each, 1e-10) for name, each in expected.items()}
        if dtype != torch.float64:
            lengths = sum(mixture.experts.weight_a.shape + mixture.experts.weight_b.shape)
            lengths += mixture.x.shape[:-1].numel()
            unit = (12 * torch.finfo(dtype).eps + lengths * torch.finfo(torch.float32).eps) / 2
            bounds = {name: unit * each for name, each in mixture.magnitudes().items()}
            # The logits' gradient is the gates' times a softmax's Jacobian, whose rows' absolute sums are at most
            # 2 p (1 - p) <= 1/2; that of two softmaxes one after the other is smaller still.
            bounds["logits"] = bounds["gates"].amax(-1, keepdim=True)
        for name, mine in got.items():
            error = (mine.double() - expected[name]).abs()
            assert (error <= bounds[name]).all(), (name, (error / bounds[name]).max().item())

    return check


class Operations(TorchDispatchMode):
    """Names of the operations that compute something: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        views = (torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default)  # which autograd doesn't track
        if not func.is_view and func not in views:
            self.names.append(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@dataclass
class Cost:
    """
    Of one forward and backward.

    Attributes:
        operations (`list[str]`): names of aten operations.
        kept (`int`): bytes that are kept for the backward.
    """

    operations: list[str]
    kept: int


@pytest.fixture
def measure() -> Callable[..., Cost]:
    def measure(forward: Callable[[], torch.Tensor], *known: torch.Tensor) -> Cost:
        """What `forward` and its backward cost; what shares memory with `known` is not counted as kept."""
        ours = {t.untyped_storage().data_ptr() for t in known}
        kept: dict[int, torch.UntypedStorage] = {}  # by address: a storage that is saved twice is kept once

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in ours:
                kept[storage.data_ptr()] = storage
            return tensor

        with Operations() as mode, saved_tensors_hooks(pack, lambda tensor: tensor):
            y = forward()
            y.backward(torch.ones_like(y))
        mode.names.remove("ones_like")
        return Cost(mode.names, sum(storage.nbytes() for storage in kept.values()))

    return measure


@pytest.fixture
def assert_only_one_gets_a_gradient() -> Callable[[Mixture, int], None]:
    """Of base, x, A, B and gates only the one with this number requires a gradient: it is the one it gets with all."""

    def check(mixture: Mixture, alone: int) -> None:
        gates = mixture.gates().detach()
        inputs = [mixture.base, mixture.x, *mixture.experts.parameters(), gates]
        expected = torch.autograd.grad(mixture.fast(gates.requires_grad_()).square().sum(), inputs)
        for i, each in enumerate(inputs):
            each.requires_grad_(i == alone)
        mixture.fast(gates).square().sum().backward()
        for i, each in enumerate(inputs):
            if i == alone:
                torch.testing.assert_close(each.grad, expected[i], rtol=0, atol=1e-12)
            else:
                assert each.grad is None

    return check
