# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""FiLM (arXiv 1709.07871) inside the experts: the profile scales and shifts their low-rank activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .router import Float32Linear, at_least_float32, without_autocast


class FiLM(nn.Module):
    """
    An MLP on the profile that gives each rank of each expert a factor and a shift: `A_i x` becomes
    `(1 + γ_i(d)) ⊙ A_i x + β_i(d)`. At its start γ and β are zero, and the experts are plain ones.

    Args:
        demographic_features (`int`): size of the (projected) demographic embedding.
        hidden (`int`): width of the one hidden layer.
        num_experts (`int`), r (`int`): of the experts that it modulates.
        init_weights (`bool`): γ and β start at zero; else at random, for tests.
    """

    def __init__(
        self, demographic_features: int, hidden: int, num_experts: int, r: int, init_weights: bool = True
    ) -> None:
        super().__init__()
        self.num_experts, self.r = num_experts, r
        self.first = Float32Linear(demographic_features, hidden)
        self.last = Float32Linear(hidden, 2 * num_experts * r)
        if init_weights:
            self._start_at_zero()

    def reset(self, demographic_features: int) -> None:
        """Start anew, for a demographic embedding of this size."""
        old = self.first.weight
        self.first.weight = nn.Parameter(
            old.new_empty(old.shape[0], demographic_features), requires_grad=old.requires_grad
        )
        self.first.in_features = demographic_features
        self.first.reset_parameters()
        self._start_at_zero()

    def _start_at_zero(self) -> None:
        # The last layer alone: with the first at zero, too, neither would ever get a gradient.
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, demographic: torch.Tensor) -> torch.Tensor:
        """Profiles `(profiles, demographic_features)` → γ and β, `(profiles, 2 · experts · r)`, float32 at least."""
        weight = self.first.weight
        demographic = demographic.to(weight.device, at_least_float32(weight.dtype))
        with without_autocast(demographic):
            return self.last(F.relu(self.first(demographic)))
