# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Who is sent where: the routers' load by profile, for statistics. No gradient, no loss."""

from __future__ import annotations

import torch
from torch import nn

from .losses import expert_shares


class RoutingByProfile:
    """
    Gathers, in one forward, each router's mean load and entropy over the tokens of each profile. It stands where
    [`RouterLosses`] does.

    Args:
        attention_mask (`torch.Tensor`): `(batch, seq)`, non-zero for real tokens.
        ids (`torch.Tensor`, *optional*): `(batch, seq)`: each token's profile in packed rows; by default its row.
    """

    def __init__(self, attention_mask: torch.Tensor, ids: torch.Tensor | None = None) -> None:
        if ids is None:
            ids = torch.arange(attention_mask.shape[0], device=attention_mask.device).unsqueeze(1)
        self.mask = attention_mask.ne(0)
        self.ids = ids.expand_as(self.mask).clamp(min=0)
        self._calls: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    @torch.compiler.disable
    @torch.no_grad()
    def observe(
        self, router: nn.Module, logits: torch.Tensor, gates: torch.Tensor, gate: str, top_k: int
    ) -> torch.Tensor:
        """Take in one router's logits `(batch or 1, seq or 1, experts)`; returns `gates` as they are."""
        log_probabilities = logits.float().log_softmax(-1)
        shares = expert_shares(logits.float(), gate, top_k)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1, keepdim=True)
        values = torch.cat([shares, entropy], -1).expand(*self.mask.shape, -1)  # (batch, seq, experts + 1)
        weights = self.mask.to(values).flatten()
        profiles = int(self.ids.max()) + 1
        total = values.new_zeros(profiles, values.shape[-1])
        total.index_add_(0, self.ids.flatten(), values.flatten(0, 1) * weights.unsqueeze(1))
        tokens = weights.new_zeros(profiles).index_add_(0, self.ids.flatten(), weights)
        mean = total / tokens.clamp(min=1).unsqueeze(1)
        self._calls.setdefault(router, []).append((mean[:, :-1], mean[:, -1]))
        return gates

    def finish(self) -> dict[str, torch.Tensor]:
        """`router_load` `(profiles, routers, experts)`, and `router_entropy` `(profiles, routers)` in nats."""
        if not self._calls:
            return {}
        names = ("router_load", "router_entropy")
        return {
            name: torch.stack(
                [torch.stack([call[part] for call in calls]).mean(0) for calls in self._calls.values()], 1
            )
            for part, name in enumerate(names)
        }
