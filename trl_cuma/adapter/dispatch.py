# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Sparse dispatch: tokens sorted by expert, one grouped product for all experts, and only the k chosen of each token are
computed. It is worth its gathers where experts are many or wide. No padding, no capacity, nothing waits for the
device: the groups' ends stay a tensor (`torch.nn.functional.grouped_mm`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .fused import Gradients, add_delta, as_tokens, experts_a, experts_b, like_b, through_a

# The rank of the experts that sorting leaves out, `(experts - top_k) · r`, from which it wins. Measured in float32 on
# a CPU, in a model of hidden size 512: it lost 4 % at 96 and won 5 to 13 % at 192. A GPU was not measured: beside its
# matrix units the memory traffic that is added weighs more than what is saved, so there it has to be more. In other
# dtypes torch has no grouped product, or on a GPU a loop that waits for it.
LEFT_OUT_RANK = {("cpu", torch.float32): 144, ("cpu", torch.bfloat16): 144, ("cuda", torch.bfloat16): 384}
TOKENS_PER_EXPERT = 32


def can_sort(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, experts: int, top_k: int, dtype: torch.dtype) -> bool:
    """
    Whether `MixSorted` serves an input `(..., in)` (grouped products want rows of whole 16 bytes, and tensors that
    begin at such) and wins over computing all experts.
    """
    r, out = b.shape[1] // experts, b.shape[0]
    if (experts - top_k) * r < LEFT_OUT_RANK.get((x.device.type, dtype), math.inf):
        return False
    if torch.compiler.is_compiling():
        if dtype != torch.bfloat16:  # as above, also on CPU
            return False
    elif any(weight.data_ptr() % 16 for weight in (a, b)):  # a part of an optimizer's flat buffer
        return False
    if any(size * dtype.itemsize % 16 for size in (x.shape[-1], out, r)):
        return False
    return x.shape[:-1].numel() * top_k >= TOKENS_PER_EXPERT * experts


class MixSorted(torch.autograd.Function):
    """
    One gate vector per token, of which k are not zero. With the tokens' k choices sorted by expert, for each of them
    `z = A_i x` and `u = s g_i z`:

        y = y0 + sum over choices of B_i u        dB_i = dy uᵀ        du = B_iᵀ dy        dg_i = s du · z
        dz = s g_i du        dA_i = dz xᵀ        dx = sum over choices of A_iᵀ dz

    Arguments as in `fused.py`. It keeps the input and what is `top_k` wide per token; `z` too, which is as wide as
    what a LoRA of rank `top_k · r` keeps.
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
        experts = gates.shape[-1]
        weights, chosen = as_tokens(gates).topk(top_k)
        expert = chosen.flatten()
        order = expert.argsort(stable=True)  # positions in (tokens · k), by expert
        ends = torch.zeros(experts, dtype=torch.int32, device=x.device)
        ends = ends.index_add_(0, expert, torch.ones_like(expert, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
        # Where each of a token's choices went: a sum over them needs no atomic additions, so it is deterministic.
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device)).view_as(chosen)
        w = _in_order(weights, order, scaling, dtype)
        x_tokens = as_tokens(x).to(dtype)
        if a.shape[0] * experts == b.shape[1]:  # one A
            z = x_tokens @ a.to(dtype).t()
            sorted_z = z.index_select(0, order // top_k)
        else:
            z = sorted_z = F.grouped_mm(
                x_tokens.index_select(0, order // top_k), experts_a(a, experts, dtype).transpose(1, 2), offs=ends
            )
        y = F.grouped_mm(sorted_z * w, experts_b(b, experts, dtype).transpose(1, 2), offs=ends)
        ctx.save_for_backward(x, a, b, weights, chosen, order, place, ends, z)
        ctx.scaling, ctx.dtype, ctx.gates_shape = scaling, dtype, gates.shape
        return add_delta(base, _sum_choices(y, place).view(base.shape), in_place)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> Gradients:
        x, a, b, weights, chosen, order, place, ends, z = ctx.saved_tensors
        needs_x, needs_a, needs_b, needs_gates = ctx.needs_input_grad[1:5]
        experts, k, dtype = ctx.gates_shape[-1], chosen.shape[1], ctx.dtype
        one_a = a.shape[0] * experts == b.shape[1]
        token = order // k
        w = _in_order(weights, order, ctx.scaling, dtype)
        sorted_z = z.index_select(0, token) if one_a else z
        sorted_dy = as_tokens(dy).to(dtype).index_select(0, token)
        dx = da = db = dgates = None
        if needs_b:
            db = like_b(F.grouped_mm(sorted_dy.t(), sorted_z * w, offs=ends), b)
        if needs_x or needs_a or needs_gates:
            du = F.grouped_mm(sorted_dy, experts_b(b, experts, dtype), offs=ends)
        if needs_gates:
            dw = (du * sorted_z).sum(1, dtype=weights.dtype).mul_(ctx.scaling)[place]
            dgates = weights.new_zeros(len(chosen), experts).scatter_(1, chosen, dw).view(ctx.gates_shape)
        if needs_x or needs_a:
            dz = du.mul_(w)
            if one_a:
                dx, da = through_a(_sum_choices(dz, place), x, a, needs_x, needs_a)
            else:
                if needs_x:
                    dx = F.grouped_mm(dz, experts_a(a, experts, dtype), offs=ends)
                    dx = _sum_choices(dx, place).to(x.dtype).view(x.shape)
                if needs_a:
                    da = F.grouped_mm(dz.t(), as_tokens(x).to(dtype).index_select(0, token), offs=ends)
                    da = da.view(a.shape).to(a.dtype)
        return dy, dx, da, db, dgates, None, None, None, None


def _in_order(weights: torch.Tensor, order: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """`s g` of each choice, `(tokens · k, 1)`, sorted."""
    return (weights.flatten()[order] * scaling).to(dtype).unsqueeze(1)


def _sum_choices(values: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Sorted `(tokens · k, n)` → `(tokens, n)`, the sum over each token's k choices."""
    return F.embedding_bag(place, values, mode="sum")
