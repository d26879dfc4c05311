# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""(hidden state, demographic profile) → gates."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

GATES = ("topk_softmax", "softmax_topk", "soft", "double_softmax")


def check_gate(gate: str, top_k: int, num_experts: int) -> None:
    """Raise `ValueError` where the combination cannot work or cannot train its router."""
    if gate not in GATES:
        raise ValueError(f"`gate` must be one of {', '.join(map(repr, GATES))}, got {gate!r}.")
    if gate == "soft":
        return
    if top_k > num_experts:
        raise ValueError(f"`top_k={top_k}` is more than `num_experts={num_experts}`. Lower `top_k`, or add experts.")
    if top_k == 1 and num_experts > 1 and gate in ("topk_softmax", "double_softmax"):
        raise ValueError(
            f"`top_k=1` with `gate={gate!r}` gives a constant gate of 1, so the router gets no gradient. Use "
            "`top_k=2`, or `gate='softmax_topk'`."
        )


def top_k_assignments(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Boolean mask `(..., experts)` of each token's `top_k` largest logits; exactly `top_k` are set, ties included."""
    return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(top_k, dim=-1).indices, True)


def compute_gates(logits: torch.Tensor, gate: str = "topk_softmax", top_k: int = 2) -> torch.Tensor:
    """
    Turn router logits into gates. With `T` the set of the `top_k` largest logits `z` and `p = softmax(z)`:

    | gate | formula for i in T (0 elsewhere) | sum |
    |---|---|---|
    | `"topk_softmax"` | `exp(z_i) / sum_{j in T} exp(z_j)` | 1 |
    | `"softmax_topk"` | `p_i` (un-normalised) | at most 1 |
    | `"soft"` | `p_i` for all experts | 1 |
    | `"double_softmax"` | `exp(p_i) / sum_{j in T} exp(p_j)` | 1 |

    `"double_softmax"` is what the paper's published code computes and is here for comparison: a fully certain top-2
    router gets gates 0.731 and 0.269 from it.

    Args:
        logits (`torch.Tensor`): `(..., experts)`; the arithmetic is done in float32 at least.
        gate (`str`): one of the names above.
        top_k (`int`): experts kept for a token.

    Returns:
        `torch.Tensor`: gates `(..., experts)`, float32 (float64 for float64 logits).

    Raises:
        ValueError: for an unknown gate, or `top_k` outside `1 … experts`.
    """
    if gate not in GATES:
        raise ValueError(f"`gate` must be one of {', '.join(map(repr, GATES))}, got {gate!r}.")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if gate == "soft":
        return logits.softmax(-1)
    if not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(f"`top_k` must be between 1 and the number of experts {logits.shape[-1]}, got {top_k}.")
    chosen = top_k_assignments(logits, top_k)
    if gate == "topk_softmax":
        return logits.masked_fill(~chosen, -torch.inf).softmax(-1)
    probabilities = logits.softmax(-1)
    if gate == "softmax_topk":
        return probabilities.masked_fill(~chosen, 0.0)
    return probabilities.masked_fill(~chosen, -torch.inf).softmax(-1)


class CuMARouter(nn.Module):
    """
    An MLP over `concat(hidden, demographic)` (paper, section 3: the topology router) that gives one logit per expert.

    The first layer is kept as two matrices, `W_h h + W_d d + b`: the same function and the same parameters as one
    matrix on the concatenation, but the profile's part is computed once per profile instead of once per token.

    Args:
        in_features (`int`): size of the hidden state; 0 for a router that doesn't read it.
        demographic_features (`int`): size of the (projected) demographic embedding; 0 for a router that doesn't
            read it.
        num_experts (`int`): number of logits.
        hidden (`int`): width of the hidden layers.
        layers (`int`): number of linear layers, ReLU between them.
    """

    def __init__(
        self, in_features: int, demographic_features: int, num_experts: int, hidden: int, layers: int
    ) -> None:
        super().__init__()
        width = num_experts if layers == 1 else hidden
        self.hidden_weight = nn.Parameter(torch.empty(width, in_features)) if in_features else None
        self.demographic_weight = (
            nn.Parameter(torch.empty(width, demographic_features)) if demographic_features else None
        )
        self.bias = nn.Parameter(torch.empty(width))
        sizes = [hidden] * (layers - 1) + [num_experts]
        self.rest = nn.Sequential(
            *(module for i in range(layers - 1) for module in (nn.ReLU(), nn.Linear(hidden, sizes[i + 1])))
        )
        self._reset_first_layer()

    def reset(self, demographic_features: int) -> None:
        """Draw all weights anew, for a demographic embedding of this size."""
        if self.demographic_weight is not None:
            old = self.demographic_weight
            new = old.new_empty(old.shape[0], demographic_features)
            self.demographic_weight = nn.Parameter(new, requires_grad=old.requires_grad)
        for module in self.rest:
            if isinstance(module, nn.Linear):
                module.reset_parameters()
        self._reset_first_layer()

    def _reset_first_layer(self) -> None:
        # As nn.Linear, but each half with its own fan-in: with one for the concatenation, a short profile vector is
        # drowned by a wide hidden state, and the router is slow to learn who is asking. Not zeros: a zero output
        # layer never breaks the experts' symmetry.
        weights = [weight for weight in (self.hidden_weight, self.demographic_weight) if weight is not None]
        for weight in weights:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        bound = 1 / math.sqrt(sum(weight.shape[1] for weight in weights))
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, hidden: torch.Tensor, demographic: torch.Tensor | None, gather: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """
        Args:
            hidden (`torch.Tensor`): `(batch, seq, in_features)`.
            demographic (`torch.Tensor`, *optional*): `(profiles, demographic_features)`; `None` for a router that
                reads no profile.
            gather (`Callable`): turns `(profiles, n)` into a tensor that broadcasts with `(batch, seq, n)`.

        Returns:
            `torch.Tensor`: logits `(batch, seq, experts)`; `(batch, 1, experts)` where they are equal along a row.
        """
        dtype = self.bias.dtype
        if self.demographic_weight is None:
            return self.rest(F.linear(hidden.to(dtype), self.hidden_weight, self.bias))
        profile_part = F.linear(demographic.to(self.bias), self.demographic_weight, self.bias)
        if self.hidden_weight is None:
            return gather(self.rest(profile_part))
        return self.rest(F.linear(hidden.to(dtype), self.hidden_weight) + gather(profile_part))
