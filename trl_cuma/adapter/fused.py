# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
`y = y0 + s · sum_i g_i B_i A_i x` with backwards of their own, which keep the input, the gates and, where A is shared,
`A x`; all that is as wide as `experts · r` is computed again. What autograd would keep is that width three times per
token.

One function for each shape that gates come in: one gate vector per token, or one per row of tokens (two functions, for
one A and for an A for each expert). The fourth, for tokens sorted by expert, is in `dispatch.py`. All save parameters
as they are and cast inside, so that no copy in another dtype waits for the backward, neither of the input (the layers
that read one tensor keep one) nor of a parameter (which ZeRO-3 and FSDP gather anew).

Their arguments: the frozen layer's result `base` `(..., out)`, the input `x` `(..., in)`, the parameters `a` and `b`
of `CuMAExperts`, the gates, the factor `s`, the dtype to compute in, and whether `base` may be written into.
`torch.func`'s transforms don't go through them: they have no `setup_context`, and are once differentiable.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

Gradients = tuple[torch.Tensor | None, ...]


class _NoContext:
    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        pass


def call(function: type[torch.autograd.Function], *args: Any) -> torch.Tensor:
    """`function.apply`, or its forward alone where nothing is differentiated: its overhead counts in decoding."""
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(_NoContext(), *args)


class MixByToken(torch.autograd.Function):
    """
    One gate vector per token, all experts computed. With `z_i = A_i x` and `u_i = s g_i z_i`, stacked over experts:

        y = y0 + B u        dB = dy uᵀ        du = Bᵀ dy        dg_i = s du_i · z_i
        dz_i = s g_i du_i (summed over i where A is shared)        dA = dz xᵀ        dx = Aᵀ dz

    `x` is `(..., in)`, `a` `(r or experts · r, in)`, `b` `(out, experts · r)`, `gates` `(..., experts)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        gates: torch.Tensor,
        scaling: float,
        dtype: torch.dtype,
        in_place: bool,
    ) -> torch.Tensor:
        r = b.shape[1] // gates.shape[-1]
        z = as_tokens(x).to(dtype) @ a.to(dtype).t()
        ctx.save_for_backward(x, a, b, gates, *([z] if a.shape[0] == r else []))
        ctx.scaling, ctx.dtype = scaling, dtype
        u = z.view(-1, z.shape[1] // r, r) * _scaled(gates, scaling, dtype)  # (tokens, experts, r)
        return add_product(base, u.flatten(1), b.to(dtype).t(), in_place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Gradients:
        x, a, b, gates, *kept = ctx.saved_tensors
        needs_x, needs_a, needs_b, needs_gates = ctx.needs_input_grad[1:5]
        experts = gates.shape[-1]
        r = b.shape[1] // experts
        dy_tokens = as_tokens(dy).to(ctx.dtype)
        z = (kept[0] if kept else as_tokens(x).to(ctx.dtype) @ a.to(ctx.dtype).t()).unflatten(1, (-1, r))
        scaled = _scaled(gates, ctx.scaling, ctx.dtype)
        dx = da = db = dgates = None
        if needs_b:
            db = (dy_tokens.t() @ (z * scaled).flatten(1)).to(b.dtype)
        if needs_x or needs_a or needs_gates:
            du = (dy_tokens @ b.to(ctx.dtype)).unflatten(1, (experts, r))
        if needs_gates:
            products = du * z if kept else z.mul_(du)  # computed anew, and not needed again
            dgates = products.sum(2, dtype=gates.dtype).mul_(ctx.scaling).view(gates.shape)
        if needs_x or needs_a:
            dz = du.mul_(scaled)
            dz = dz.sum(1) if kept else dz.flatten(1)
            dx, da = through_a(dz, x, a, needs_x, needs_a)
        return dy, dx, da, db, dgates, None, None, None


class MixByRow(torch.autograd.Function):
    """
    One gate vector per row of tokens, and one A: a row's experts are one low-rank product, of rank r instead of
    `experts · r`. With `z = A x` and `M = s sum_i g_i B_i` of each row:

        y = y0 + M z        dM = dy zᵀ (over the row's tokens)        dB_i = s sum_rows g_i dM
        dg_i = s <B_i, dM>        dz = Mᵀ dy        dA = dz xᵀ        dx = Aᵀ dz

    `x` is `(rows, seq, in)`, `a` `(r, in)`, `b` `(out, experts · r)`, `gates` `(rows, experts)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        gates: torch.Tensor,
        scaling: float,
        dtype: torch.dtype,
        in_place: bool,
    ) -> torch.Tensor:
        z = x.to(dtype) @ a.to(dtype).t()
        ctx.save_for_backward(x, a, b, gates, z)
        ctx.scaling, ctx.dtype = scaling, dtype
        return add_product(base, z, mixed_b(b, gates * scaling, dtype).transpose(1, 2), in_place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Gradients:
        x, a, b, gates, z = ctx.saved_tensors
        needs_x, needs_a, needs_b, needs_gates = ctx.needs_input_grad[1:5]
        dy_rows, scaled = dy.to(ctx.dtype), gates * ctx.scaling
        dx = da = db = dgates = None
        if needs_b or needs_gates:
            dm = (dy_rows.transpose(1, 2) @ z).flatten(1)  # (rows, out · r)
        if needs_b:
            db = scaled.to(ctx.dtype).t() @ dm
            db = like_b(db.unflatten(1, (b.shape[0], -1)), b)
        if needs_gates:
            dgates = (dm @ _by_expert(b, gates.shape[1], ctx.dtype).t()).to(gates.dtype).mul_(ctx.scaling)
        if needs_x or needs_a:
            dz = dy_rows @ mixed_b(b, scaled, ctx.dtype)
            dx, da = through_a(dz.flatten(0, 1), x, a, needs_x, needs_a)
        return dy, dx, da, db, dgates, None, None, None


class MixChosenByRow(torch.autograd.Function):
    """
    One gate vector per row of tokens, and an A for each expert: the k experts that a row chooses are one low-rank
    product, of rank `top_k · r`. With `A` and `B` those of the chosen ones, stacked, `z = A x` and `M_i = s g_i B_i`:

        y = y0 + M z        dM = dy zᵀ (over the row's tokens)        dB_i = s g_i dM_i        dg_i = s <B_i, dM_i>
        dz = Mᵀ dy        dA = dz xᵀ        dx = Aᵀ dz

    `x` is `(rows, seq, in)`, `a` `(experts · r, in)`, `b` `(out, experts · r)`, `gates` `(rows, experts)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        gates: torch.Tensor,
        top_k: int,
        scaling: float,
        dtype: torch.dtype,
        in_place: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, a, b, gates)
        ctx.top_k, ctx.scaling, ctx.dtype = top_k, scaling, dtype
        row_a, row_b = chosen_factors(a, b, gates, top_k, scaling, dtype)
        return add_product(base, x.to(dtype) @ row_a.transpose(1, 2), row_b.transpose(1, 2), in_place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Gradients:
        x, a, b, gates = ctx.saved_tensors
        needs_x, needs_a, needs_b, needs_gates = ctx.needs_input_grad[1:5]
        experts, k, out = gates.shape[1], ctx.top_k, b.shape[0]
        weights, chosen = gates.topk(k)
        row_a, row_b = chosen_factors(a, b, gates, k, ctx.scaling, ctx.dtype)
        x_rows, dy_rows = x.to(ctx.dtype), dy.to(ctx.dtype)
        dx = da = db = dgates = None
        if needs_b or needs_gates:
            z = x_rows @ row_a.transpose(1, 2)
            dm = (dy_rows.transpose(1, 2) @ z).unflatten(2, (k, -1)) * ctx.scaling  # (rows, out, k, r)
        if needs_gates:
            of_chosen = (dm * _chosen_b(b, chosen, experts, ctx.dtype)).sum((1, 3), dtype=gates.dtype)
            dgates = torch.zeros_like(gates).scatter_(1, chosen, of_chosen)
        if needs_b:
            dm = (dm * weights.to(ctx.dtype)[:, None, :, None]).transpose(1, 2).flatten(2).flatten(0, 1)
            db = like_b(_sum_by_expert(dm, chosen, experts).unflatten(1, (out, -1)), b)
        if needs_x or needs_a:
            dz = dy_rows @ row_b
        if needs_a:
            da = (dz.transpose(1, 2) @ x_rows).unflatten(1, (k, -1)).flatten(2).flatten(0, 1)  # (rows · k, r · in)
            da = _sum_by_expert(da, chosen, experts).view(a.shape).to(a.dtype)
        if needs_x:
            dx = (dz @ row_a).to(x.dtype)
        return dy, dx, da, db, dgates, None, None, None, None


def compute_dtype(x: torch.Tensor, parameter: torch.Tensor) -> torch.dtype:
    """The dtype in which a product of the two is computed: autocast's where it is on, else the parameter's."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast_on(x) else parameter.dtype


def is_autocast_on(x: torch.Tensor) -> bool:
    """Whether autocast is on where the tensor is."""
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # "meta" has none


def mixed_b(b: torch.Tensor, gates: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`sum_i g_i B_i` for each row of `gates` `(rows, experts)`: `(rows, out, r)`."""
    mixed = gates.to(dtype) @ _by_expert(b, gates.shape[1], dtype)
    return mixed.unflatten(1, (b.shape[0], -1))


def chosen_factors(
    a: torch.Tensor, b: torch.Tensor, gates: torch.Tensor, top_k: int, scaling: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's chosen A_i, stacked, `(rows, k · r, in)`, and its `s g_i B_i`, `(rows, out, k · r)`."""
    weights, chosen = gates.topk(top_k)
    row_a = experts_a(a, gates.shape[1], dtype)[chosen].flatten(1, 2)
    row_b = _chosen_b(b, chosen, gates.shape[1], dtype) * (weights * scaling).to(dtype)[:, None, :, None]
    return row_a, row_b.flatten(2)


def experts_a(a: torch.Tensor, experts: int, dtype: torch.dtype) -> torch.Tensor:
    """`(experts · r, in)` → `(experts, r, in)`."""
    return a.to(dtype).unflatten(0, (experts, -1))


def experts_b(b: torch.Tensor, experts: int, dtype: torch.dtype) -> torch.Tensor:
    """`(out, experts · r)` → `(experts, out, r)`."""
    return b.to(dtype).unflatten(1, (experts, -1)).transpose(0, 1)


def like_b(by_expert: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`(experts, out, r)` → `(out, experts · r)`, in b's dtype."""
    return by_expert.transpose(0, 1).reshape(b.shape).to(b.dtype)


def as_tokens(x: torch.Tensor) -> torch.Tensor:
    """`(..., n)` → `(tokens, n)`."""
    return x.reshape(-1, x.shape[-1])


def add_product(base: torch.Tensor, u: torch.Tensor, b: torch.Tensor, in_place: bool) -> torch.Tensor:
    """
    `base + u b`, in base's dtype: `u` is `(tokens, n)` with `b` `(n, out)` and `base` `(..., out)`, or
    `(rows, seq, n)` with `(rows, n, out)` and `(rows, seq, out)`.

    In place it writes through a detached alias, which shares base's version counter: if some operation before has
    saved `base` for its backward, that backward says so, instead of being wrong. Compiled it is not: a compiler takes
    the alias for the input itself, without a gradient.
    """
    if base.dtype != u.dtype:  # adapters in float32 over a base in bfloat16: one rounding, as of a sum in float32
        return add_delta(base, (u @ b).view_as(base), in_place)
    if in_place and base.is_contiguous() and not torch.compiler.is_compiling():
        result = base.detach()
        result.view(-1, b.shape[-1]).addmm_(u, b) if u.dim() == 2 else result.baddbmm_(u, b)
        return result
    return torch.addmm(as_tokens(base), u, b).view_as(base) if u.dim() == 2 else torch.baddbmm(base, u, b)


def add_delta(base: torch.Tensor, delta: torch.Tensor, in_place: bool) -> torch.Tensor:
    """`base + delta`, in base's dtype; in place as [`add_product`]."""
    if in_place and not torch.compiler.is_compiling():
        return base.detach().add_(delta)
    return (base + delta).to(base.dtype)


def through_a(
    dz: torch.Tensor, x: torch.Tensor, a: torch.Tensor, needs_x: bool, needs_a: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of `x` and `a`, from that of `z = A x` `(tokens, ·)`."""
    dx = (dz @ a.to(dz.dtype)).to(x.dtype).view(x.shape) if needs_x else None
    da = (dz.t() @ as_tokens(x).to(dz.dtype)).to(a.dtype) if needs_a else None
    return dx, da


def _scaled(gates: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """`s g`, `(tokens, experts, 1)`: the layer's factor costs least here, where a token is narrowest."""
    return (as_tokens(gates) * scaling).to(dtype).unsqueeze(-1)


def _by_expert(b: torch.Tensor, experts: int, dtype: torch.dtype) -> torch.Tensor:
    """`(out, experts · r)` → `(experts, out · r)`, so that a row's mixture is a product with its gates."""
    return experts_b(b, experts, dtype).flatten(1)


def _sum_by_expert(values: torch.Tensor, chosen: torch.Tensor, experts: int) -> torch.Tensor:
    """
    `(rows · k, n)` → `(experts, n)`, the sums over the rows that chose each expert. A product, which adds up in
    float32 and always in the same order, where `index_add_` would do neither.
    """
    members = chosen.flatten() == torch.arange(experts, device=chosen.device).unsqueeze(1)
    return members.to(values.dtype) @ values


def _chosen_b(b: torch.Tensor, chosen: torch.Tensor, experts: int, dtype: torch.dtype) -> torch.Tensor:
    """The B_i of `chosen` `(rows, k)`: `(rows, out, k, r)`."""
    return experts_b(b, experts, dtype)[chosen].transpose(1, 2)
