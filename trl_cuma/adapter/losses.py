# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Router losses: pure functions of router logits and token weights, and how their gradient reaches the router.

A loss tensor stashed by the layers gets wrong gradients under reentrant checkpointing: there the first forward records
no graph, and the recomputed one isn't the one that was stashed. So the *value* is computed from detached statistics,
and the *gradient* is injected: an identity function on the gates whose backward adds the loss's gradient with respect
to each router's statistics, scaled by whatever factor the trainer put on the value (coefficient, accumulation, fp16
scale). That factor is the gradient that reaches a probe added to the value; it arrives before any layer's backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .router import choose_experts

BALANCE = ("local", "ranks", "published")


def document_weights(
    attention_mask: torch.Tensor, document_starts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Weights under which padding doesn't count and each document weighs the same, however long it is.

    Args:
        attention_mask (`torch.Tensor`): `(batch, seq)`, non-zero for real tokens.
        document_starts (`torch.Tensor`, *optional*): boolean `(batch, seq)`, true at the first token of each document
            of packed rows. By default each row is one document.

    Returns:
        weights `(batch, seq)` that sum to 1 (float32), and the number of documents (a 0-d float32 tensor).
    """
    mask = attention_mask.ne(0).float()
    if document_starts is None:
        lengths = mask.sum(1, keepdim=True)
        per_token, documents = lengths, lengths.gt(0).sum()
    else:
        starts = document_starts.clone()
        starts[:, 0] = True  # a row never continues the row above it
        document = starts.flatten().cumsum(0) - 1
        lengths = mask.new_zeros(mask.numel()).scatter_add(0, document, mask.flatten())
        per_token, documents = lengths[document].view_as(mask), lengths.gt(0).sum()
    documents = documents.float()
    return mask / per_token.clamp(min=1) / documents.clamp(min=1), documents


def load_balancing_loss(load: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """
    `E · sum_i f_i P_i` (Switch Transformer, arXiv 2101.03961, equation 4, for top-k): 1 when the load is even, E (for
    top-1) when one expert takes all. No gradient flows through `load`.

    Args:
        load (`torch.Tensor`): f, `(..., experts)`: share of the assignments that each expert gets; sums to 1.
        importance (`torch.Tensor`): P, `(..., experts)`: mean router probability of each expert; sums to 1.
    """
    return load.shape[-1] * (load.detach() * importance).sum(-1)


@dataclass
class RouterStatistics:
    """Means over tokens of one router's output, under token weights that sum to 1."""

    load: torch.Tensor  # (experts,) f, detached
    importance: torch.Tensor  # (experts,) P, the mean probabilities; the mean gates for the published balance loss
    z_loss: torch.Tensor  # () mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, equation 5)
    entropy: torch.Tensor  # () mean entropy of the router's probabilities, nats, detached


def router_statistics(
    logits: torch.Tensor,
    gate: str,
    top_k: int,
    weights: torch.Tensor | None = None,
    gates: torch.Tensor | None = None,
) -> RouterStatistics:
    """
    Args:
        logits (`torch.Tensor`): `(batch, seq, experts)`; 1 in place of `batch` or `seq` where all rows, or all tokens
            of a row, have the same logits.
        gate (`str`), top_k (`int`): as in `CuMAConfig`.
        weights (`torch.Tensor`, *optional*): `(batch, seq)`, sums to 1; uniform by default.
        gates (`torch.Tensor`, *optional*): as the logits: what the importance is the mean of, in place of the
            router's probabilities.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    batch, seq, _ = logits.shape
    if weights is None:
        weights = logits.new_full((batch, seq), 1 / (batch * seq))
    for dim, size in enumerate((batch, seq)):
        if size == 1:  # the logits are the same for all rows, or along a row, and come once
            weights = weights.sum(dim, keepdim=True)
    if weights.shape != (batch, seq):
        raise ValueError(
            f"Router losses need one hidden state per token of the batch: the attention mask is "
            f"{tuple(weights.shape)}, this router's input {(batch, seq)}."
        )
    weights = weights.to(logits).unsqueeze(-1)
    log_normaliser = logits.logsumexp(-1, keepdim=True)
    probabilities = (logits - log_normaliser).exp()
    with torch.no_grad():
        load = (expert_shares(logits, gate, top_k) * weights).sum((0, 1))
        entropy = -(probabilities * (logits - log_normaliser) * weights).sum()
    importance = ((probabilities if gates is None else gates) * weights).sum((0, 1))
    return RouterStatistics(load, importance, (log_normaliser.square() * weights).sum(), entropy)


def expert_shares(logits: torch.Tensor, gate: str, top_k: int) -> torch.Tensor:
    """
    What each expert gets of a token, `(..., experts)`, sums to 1: 1/k for the k chosen ones. For `"soft"`, which
    chooses all, the probability itself: with 1/E the balance loss would be constant.
    """
    if gate == "soft":
        return logits.softmax(-1)
    return torch.zeros_like(logits).scatter(-1, choose_experts(logits, top_k)[1], 1 / top_k)


class RouterLosses:
    """
    The router losses of one forward: gathers each router's statistics, and injects the gradient.

    The gradient comes with one `backward()` of a sum of the task loss and the router losses. `torch.autograd.grad`
    does not carry it: it skips the probe, a leaf that it isn't asked for.

    Args:
        attention_mask, document_starts: see [`document_weights`]; without a mask all tokens count alike.
        balance (`str`): the balance loss, and whose load it reads: `"local"`, this process's micro-batch, or
            `"ranks"`, that of all processes (one all-reduce, in [`finish`], never inside a checkpointed layer), with
            the mean over routers. `"published"` is what the paper's published code computes, for comparison, on the
            micro-batch: its P_i is the mean *gate*, all real tokens weigh the same, and it is the *sum* over routers.
            (With `gate="soft"` theirs is a constant; don't use it there.)
    """

    def __init__(
        self,
        attention_mask: torch.Tensor | None = None,
        document_starts: torch.Tensor | None = None,
        balance: str = "local",
    ) -> None:
        if balance not in BALANCE:
            raise ValueError(f"The balance loss must be one of {', '.join(map(repr, BALANCE))}, got {balance!r}.")
        self.balance = balance
        self.weights: torch.Tensor | None = None
        self.documents: torch.Tensor | None = None
        if attention_mask is not None:
            self.weights, self.documents = document_weights(attention_mask, document_starts)
            if balance == "published":
                mask = attention_mask.ne(0).float()
                self.weights = mask / mask.sum().clamp(min=1)
        self._records: dict[nn.Module, list[RouterStatistics]] = {}
        self._load: dict[nn.Module, torch.Tensor] = {}
        self._scale: dict[str, torch.Tensor] = {}
        self._collecting = True
        self._injected = False
        self.checkpointed = False  # set where a checkpointed call observes, which is run again

    def observe(
        self, router: nn.Module, logits: torch.Tensor, gates: torch.Tensor, gate: str, top_k: int
    ) -> torch.Tensor:
        """Take in one router's logits; returns `gates` unchanged, with the losses' gradient attached."""
        if torch.compiler.is_compiling() and not self.checkpointed:
            # In one graph with the loss, whose gradient needs no detour.
            self._records.setdefault(router, []).append(self._statistics(logits, gates, gate, top_k))
            return gates
        return self._inject(router, logits, gates, gate, top_k)

    @torch.compiler.disable  # dynamo would trace the backward now, with the scale that only `backward()` brings
    def _inject(
        self, router: nn.Module, logits: torch.Tensor, gates: torch.Tensor, gate: str, top_k: int
    ) -> torch.Tensor:
        self._injected = True
        statistics = self._statistics(logits, gates, gate, top_k)
        if self._collecting:
            detached = (
                statistics.load,
                statistics.importance.detach(),
                statistics.z_loss.detach(),
                statistics.entropy,
            )
            self._records.setdefault(router, []).append(RouterStatistics(*detached))
        return _InjectGradient.apply(gates, statistics.importance, statistics.z_loss, self, router)

    def _statistics(self, logits: torch.Tensor, gates: torch.Tensor, gate: str, top_k: int) -> RouterStatistics:
        read = gates if self.balance == "published" else None
        return router_statistics(logits, gate, top_k, self.weights, read)

    def gradients(self, router: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients of the scaled losses with respect to one call's `importance` and `z_loss`."""
        of_call = 1 / len(self._records[router])
        share = of_call / len(self._records)
        aux, z = self._scale.get("aux_loss"), self._scale.get("z_loss")
        load = self._load[router]
        aux_share = of_call if self.balance == "published" else share
        return (None if aux is None else aux * load.shape[-1] * load * aux_share), (None if z is None else z * share)

    def finish(self) -> dict[str, Any]:
        """
        End the forward.

        Returns:
            `{"aux_loss", "z_loss", "router_load", "router_entropy"}`: two 0-d losses (means over routers; the
            published balance loss is their sum), the load `(routers, experts)` and the mean entropy (nats) of the
            router probabilities. Empty without routers.
        """
        self._collecting = False
        if not self._records:
            return {}

        device = next(iter(self._records.values()))[0].load.device  # layers may be on several (`device_map`)

        def mean(name: str) -> torch.Tensor:  # over the calls of each router: (routers, ...)
            each = ([getattr(call, name).to(device) for call in calls] for calls in self._records.values())
            return torch.stack([torch.stack(calls).mean(0) for calls in each])

        load = mean("load")
        if self.balance == "ranks":
            load = self._mean_over_ranks(load)
        self._load = dict(zip(self._records, load.unbind(), strict=True))
        each = load_balancing_loss(load, mean("importance"))
        values = {
            "aux_loss": each.sum() if self.balance == "published" else each.mean(),
            "z_loss": mean("z_loss").mean(),
        }
        if self._injected and torch.is_grad_enabled():
            values = {name: value + self._probe(name, value) for name, value in values.items()}
        return {**values, "router_load": load, "router_entropy": mean("entropy").mean()}

    def _probe(self, name: str, value: torch.Tensor) -> torch.Tensor:
        probe = torch.zeros_like(value, requires_grad=True)

        def keep(gradient: torch.Tensor | None) -> None:
            if gradient is not None:  # DistributedDataParallel brings None for an output that has no weight
                self._scale[name] = gradient.detach()

        probe.register_hook(keep)
        return probe

    def _mean_over_ranks(self, load: torch.Tensor) -> torch.Tensor:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return load
        documents = load.new_ones(()) if self.documents is None else self.documents.to(load)
        total = torch.cat([(load * documents).flatten(), documents.view(1)])
        torch.distributed.all_reduce(total)
        return (total[:-1] / total[-1].clamp(min=1)).view_as(load)


class _InjectGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gates, importance, z_loss, losses, router):  # noqa: ANN001, ANN205
        ctx.losses, ctx.router = losses, router
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx, gradient):  # noqa: ANN001, ANN205
        statistics = ctx.losses.gradients(ctx.router)
        return gradient, *(None if g is None else g.to(gradient.device) for g in statistics), None, None
