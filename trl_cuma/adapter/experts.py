# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Stacked low-rank experts: no loop over experts, no mask, no device synchronisation."""

from __future__ import annotations

import math

import torch
from torch import nn

from .dispatch import MixSorted, can_sort
from .fused import (
    MixByRow,
    MixByToken,
    MixChosenByRow,
    add_delta,
    add_product,
    call,
    chosen_factors,
    compute_dtype,
    mixed_b,
)
from .router import ProjectHidden

# By `share_a`: the tokens of a row from which a low-rank product of its own is cheaper than all experts. Its factors
# have to be made first, and with separate A be copied. Measured on a CPU, at widths of 512.
TOKENS_PER_ROW = {True: 32, False: 96}


class CuMAExperts(nn.Module):
    """
    E low-rank experts of one layer in two parameters: one gather per layer under ZeRO-3, and every expert gets a
    gradient (zeros included), which DDP needs.

    Args:
        in_features (`int`), out_features (`int`): sizes of the layer.
        r (`int`): rank of each expert.
        num_experts (`int`): number of experts E.
        share_a (`bool`): one A for all experts.
        init_weights (`bool`): B starts at zero; else at random.
    """

    def __init__(
        self, in_features: int, out_features: int, r: int, num_experts: int, share_a: bool, init_weights: bool = True
    ) -> None:
        super().__init__()
        self.r, self.num_experts, self.share_a = r, num_experts, share_a
        self.weight_a = nn.Parameter(torch.empty(r if share_a else num_experts * r, in_features))
        self.weight_b = nn.Parameter(torch.zeros(out_features, num_experts * r))
        # fan_in is `in_features` for each expert's A, so that one call initialises all as LoRA does.
        nn.init.kaiming_uniform_(self.weight_a, a=math.sqrt(5))
        if not init_weights:
            nn.init.normal_(self.weight_b, std=0.02)

    def forward(
        self,
        x: torch.Tensor,
        gates: torch.Tensor,
        base: torch.Tensor,
        top_k: int,
        scaling: float = 1.0,
        in_place: bool = False,
        film: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        `base + scaling · sum_i g_i B_i A_i x`, by the cheapest way for these shapes. The arithmetic is done in the
        parameters' dtype, or autocast's.

        Args:
            x (`torch.Tensor`): `(..., in_features)`.
            gates (`torch.Tensor`): `(..., experts)`, broadcasts with `x` in all but the last dimension.
            base (`torch.Tensor`): `(..., out_features)`, the frozen layer's result.
            top_k (`int`): how many of a token's gates are not zero, at most.
            scaling (`float`): a factor on the experts' part.
            in_place (`bool`): whether the result may be written into `base`.
            film (`torch.Tensor`, *optional*): `(..., 2 · experts · r)`, broadcasts as the gates do: γ and β, by expert
                and rank; then `(1 + γ_i) ⊙ A_i x + β_i` stands in place of `A_i x`.

        Returns:
            `torch.Tensor`: `(..., out_features)`, in base's dtype.
        """
        a, b = self.weight_a, self.weight_b
        dtype = compute_dtype(x, a)
        if film is not None:
            return self._modulated(x, gates, base, scaling, in_place, film)
        if x.dim() == gates.dim() == 3 and gates.shape[1] == 1:
            one = len(gates) != len(x)  # one gate vector for all rows: they are one long row
            tokens = x.shape[0] * x.shape[1] if one else x.shape[1]
            if tokens >= TOKENS_PER_ROW[self.share_a] and (self.share_a or top_k < self.num_experts):
                rows, base_rows = (t.flatten(0, 1).unsqueeze(0) if one else t for t in (x, base))
                arguments = (base_rows, rows, a, b, gates.squeeze(1))
                if self.share_a:
                    return call(MixByRow, *arguments, scaling, dtype, in_place).view_as(base)
                return call(MixChosenByRow, *arguments, top_k, scaling, dtype, in_place).view_as(base)
        if gates.shape[:-1] != x.shape[:-1]:
            gates = gates.expand(*x.shape[:-1], -1)
        if can_sort(x, a, b, self.num_experts, top_k, dtype):
            return call(MixSorted, base, x, a, b, gates, top_k, scaling, dtype, in_place)
        return call(MixByToken, base, x, a, b, gates, scaling, dtype, in_place)

    def _modulated(
        self,
        x: torch.Tensor,
        gates: torch.Tensor,
        base: torch.Tensor,
        scaling: float,
        in_place: bool,
        film: torch.Tensor,
    ) -> torch.Tensor:
        """All experts of each token, with FiLM; left to autograd."""
        dtype = compute_dtype(x, self.weight_a)
        gamma, beta = film.unflatten(-1, (2, self.num_experts, self.r)).unbind(-3)
        z = call(ProjectHidden, x, self.weight_a, dtype).to(dtype).unflatten(-1, (-1, self.r))
        z = z * (1 + gamma).to(dtype) + beta.to(dtype)
        u = z * (gates * scaling).to(dtype).unsqueeze(-1)
        delta = u.flatten(-2) @ self.weight_b.to(dtype).t()
        # In place it would go past base's graph.
        return add_delta(base, delta, in_place and not torch.is_grad_enabled())

    def product(self, gates: torch.Tensor, top_k: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor] | None:
        """
        The low-rank product that the experts collapse to under fixed gates, one for each row of `gates`
        `(profiles, experts)`: `A` `(r, in_features)`, or `(profiles, top_k · r, in_features)` with separate A, and `B`
        `(profiles, out_features, ·)`. `None` where these are larger than the experts: then reading them costs more.
        """
        dtype = compute_dtype(gates, self.weight_a)
        if len(gates) * (1 if self.share_a else top_k) > self.num_experts:
            return None
        if self.share_a:
            return self.weight_a.to(dtype), mixed_b(self.weight_b, gates * scaling, dtype)
        return chosen_factors(self.weight_a, self.weight_b, gates, top_k, scaling, dtype)

    def add_product(
        self, x: torch.Tensor, base: torch.Tensor, product: tuple[torch.Tensor, torch.Tensor], in_place: bool
    ) -> torch.Tensor:
        """`base + B A x` for an `x` `(profiles · n, ..., in_features)` whose profiles' rows follow one another."""
        dtype = compute_dtype(x, product[0])
        a, b = (factor.to(dtype) for factor in product)
        rows, base_rows = (t.reshape(len(b), -1, t.shape[-1]) for t in (x, base))
        low = rows.to(dtype) @ a.transpose(-1, -2)
        return add_product(base_rows, low, b.transpose(1, 2), in_place).view_as(base)
