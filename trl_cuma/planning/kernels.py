# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Where a GPU needs other memory than a CPU: attention, autocast's layer norms, TRL's head, sorting tokens by expert, and
int8 products. The plan runs a training step on fake CPU tensors, since autocast doesn't exist on the meta device; here
is what is replaced in that run, so that it allocates what a GPU's kernels do. Values don't matter: there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers.utils import is_bitsandbytes_available
from trl.kernels import chunked_logprob

from ..adapter import dispatch


@dataclass
class Operations:
    """Floating-point operations of what is replaced, which torch's counter doesn't see."""

    count: int = 0


@contextmanager
def kernels_of_a_gpu() -> Iterator[Operations]:
    """Allocate, while this is on, what the kernels of an NVIDIA GPU would, from fake tensors on the CPU."""
    operations = Operations()

    def fold(*args: Any, **kwargs: Any) -> None:
        """TRL's Triton kernels turn a tile of logits into statistics, or into its gradient, in place."""

    def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """On a GPU products of 16 bit add to float32 without a copy."""
        operations.count += 2 * a.shape[0] * a.shape[1] * b.shape[1]

    sorts_from = {("cpu", dtype): rank for (device, dtype), rank in dispatch.LEFT_OUT_RANK.items() if device == "cuda"}
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(patch.object(F, "scaled_dot_product_attention", _attention(operations)))
        enter(patch.object(F, "layer_norm", _layer_norm(F.layer_norm)))
        for name, function in (("_forward_tile", fold), ("_backward_tile", fold), ("_addmm_fp32", add_product)):
            enter(patch.object(chunked_logprob, name, function))
        enter(patch.dict(dispatch.LEFT_OUT_RANK, sorts_from, clear=True))
        if is_bitsandbytes_available():
            import bitsandbytes as bnb
            from bitsandbytes.autograd import _functions

            def int8_matmul(x: Any, weight: Any, out: Any = None, state: Any = None, bias: Any = None) -> Any:
                state.threshold = 0.0  # the few columns of outliers depend on values, which there are none of
                return _functions.MatMul8bitLt.apply(x, weight, out, bias, state)

            enter(patch.object(_functions.logger, "warning"))  # of each product: that inputs are cast
            enter(patch.object(bnb, "matmul", int8_matmul))
        yield operations


def _layer_norm(original: Callable) -> Callable:
    """CUDA's autocast computes and returns layer norms in float32; the CPU's leaves them as they are."""

    def layer_norm(
        x: torch.Tensor,
        shape: Any,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            x, weight, bias = (None if tensor is None else tensor.float() for tensor in (x, weight, bias))
        return original(x, shape, weight, bias, eps)

    return layer_norm


def _attention(operations: Operations) -> Callable:
    """
    `scaled_dot_product_attention` as its flash kernel (no mask) or its memory-efficient one (a mask, which torch first
    turns from booleans into numbers of the query's dtype: `(rows, 1, seq, seq)`, kept for the backward). Neither holds
    scores.
    """

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (query, key, value))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, torch.tensor(-torch.inf, dtype=query.dtype))
        return Attention.apply(query, key, value, attn_mask, operations)

    return attention


class Attention(torch.autograd.Function):
    """
    What the fused kernels allocate. `query` is `(rows, heads, seq, dim)`, `key` and `value` have `kv_heads` (fewer
    where they are grouped). Kept: the inputs, the result, and the log-sum-exp of each row of scores in float32. The
    backward sums the query's gradient in float32, and has the gradients of grouped keys and values for each head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        operations: Operations,
    ) -> torch.Tensor:
        # Two products, causal: half of the scores are never computed. The backward has five of their size.
        ctx.operations, ctx.forward_count = operations, query.shape[:3].numel() * key.shape[2] * 2 * query.shape[3]
        operations.count += ctx.forward_count
        # The kernels' layout: seq before heads, so that what follows flattens heads without a copy.
        rows, heads, seq, _ = query.shape
        out = query.new_empty(rows, seq, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(rows, heads, seq, dtype=torch.float32))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, _, _, log_sum_exp = ctx.saved_tensors
        ctx.operations.count += 5 * ctx.forward_count // 2
        heads = query.shape[1]
        sums = torch.empty_like(query, dtype=torch.float32)
        products = torch.empty_like(log_sum_exp)
        d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        if key.shape[1] != heads:
            by_head = [t.new_empty(t.shape[0], heads, *t.shape[2:]) for t in (key, value)]
            del by_head
        del sums, products
        return d_query, d_key, d_value, None, None
