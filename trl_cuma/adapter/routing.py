# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Who is sent where: the routers' load by profile, for statistics. No gradient, no loss."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Set
from typing import Any

import torch
from torch import nn

from .losses import expert_shares

ROUTING_BY_PROFILE = ("router_load", "router_gate", "router_entropy")
"""What [`RoutingByProfile`] puts into a model's output."""


class RoutingByProfile:
    """
    Gathers, in one forward, each router's mean load, gates and entropy over the tokens of each profile. It stands
    where [`RouterLosses`] does.

    Args:
        attention_mask (`torch.Tensor`): `(batch, seq)`, non-zero for real tokens.
        ids (`torch.Tensor`, *optional*): `(batch, seq)`: each token's profile in packed rows; by default its row.
    """

    def __init__(self, attention_mask: torch.Tensor, ids: torch.Tensor | None = None) -> None:
        if ids is None:
            ids = torch.arange(attention_mask.shape[0], device=attention_mask.device).unsqueeze(1)
        self.mask = attention_mask.ne(0)
        self.ids = ids.expand_as(self.mask).clamp(min=0)
        self._calls: dict[nn.Module, list[tuple[torch.Tensor, ...]]] = {}

    @torch.compiler.disable
    @torch.no_grad()
    def observe(
        self, router: nn.Module, logits: torch.Tensor, gates: torch.Tensor, gate: str, top_k: int
    ) -> torch.Tensor:
        """Take in one router's logits `(batch or 1, seq or 1, experts)`; returns `gates` as they are."""
        log_probabilities = logits.float().log_softmax(-1)
        shares = expert_shares(logits.float(), gate, top_k)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1, keepdim=True)
        values = torch.cat([shares, gates.to(shares), entropy], -1).expand(*self.mask.shape, -1)
        weights = self.mask.to(values).flatten()
        profiles = int(self.ids.max()) + 1
        total = values.new_zeros(profiles, values.shape[-1])
        ids = self.ids.flatten().to(values.device)  # layers may be on several (`device_map`)
        total.index_add_(0, ids, values.flatten(0, 1) * weights.unsqueeze(1))
        tokens = weights.new_zeros(profiles).index_add_(0, ids, weights)
        mean = (total / tokens.clamp(min=1).unsqueeze(1)).to(self.ids.device)
        experts = shares.shape[-1]
        self._calls.setdefault(router, []).append((mean[:, :experts], mean[:, experts:-1], mean[:, -1]))
        return gates

    def finish(self) -> dict[str, torch.Tensor]:
        """
        Returns:
            `router_load` and `router_gate`, `(profiles, routers, experts)`: the share of the assignments that each
            expert gets, and its mean gate; `router_entropy` `(profiles, routers)` in nats. Routers are in the order of
            their first calls. Empty without routers.
        """
        if not self._calls:
            return {}
        return {
            name: torch.stack(
                [torch.stack([call[part] for call in calls]).mean(0) for calls in self._calls.values()], 1
            )
            for part, name in enumerate(ROUTING_BY_PROFILE)
        }


def reportable_groups(members: Mapping[Any, Set[Hashable]], everybody: Set[Hashable], min_size: int) -> list[Any]:
    """
    The groups that may be shown: none has fewer people than `min_size`, and none such can be had by subtracting the
    shown ones from everybody. Where the people in no shown group would be fewer than that, the smallest shown group is
    left out with them.

    Args:
        members (`Mapping`): group → its people.
        everybody (`Set`): all people, those in no group included.
        min_size (`int`): people.
    """
    sizes = sorted((len(people), name) for name, people in members.items())
    names = [name for size, name in sizes if size >= min_size]
    while names and 0 < len(everybody.difference(*(members[name] for name in names))) < min_size:
        names.pop(0)  # the smallest
    return sorted(names)


def mutual_information(loads: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """
    `I(expert; group) = H(expert) - H(expert | group)` of each router, `(routers,)`, in nats: 0 where all groups are
    routed alike.

    Args:
        loads (`torch.Tensor`): `(groups, routers, experts)`: sums to 1 over the experts.
        counts (`torch.Tensor`): `(groups,)`: how much each group weighs.
    """
    shares = (counts / counts.sum()).view(-1, 1, 1)
    within = (torch.special.entr(loads) * shares).sum((0, 2))
    return torch.special.entr((loads * shares).sum(0)).sum(-1) - within
