# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Stacked low-rank experts: no loop over experts, no mask, no device synchronisation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


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

    def forward(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """
        `sum_i g_i B_i A_i x`.

        Args:
            x (`torch.Tensor`): `(..., in_features)`.
            gates (`torch.Tensor`): `(..., experts)`, broadcasts with `x` in all but the last dimension.

        Returns:
            `torch.Tensor`: `(..., out_features)`.
        """
        low = F.linear(x, self.weight_a)
        low = low.unsqueeze(-2) if self.share_a else low.unflatten(-1, (self.num_experts, self.r))
        return F.linear((low * gates.to(low.dtype).unsqueeze(-1)).flatten(-2), self.weight_b)
