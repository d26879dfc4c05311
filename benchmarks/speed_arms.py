# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What `speed.py` compares: the frozen base, LoRA, a mixture written as a loop over experts, and CuMA."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from trl_cuma import CuMAConfig, compute_gates
from trl_cuma.adapter.layer import CuMALinear

EXPERTS, TOP_K = 8, 2
ALPHA_OVER_R = 2
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
QUERY_VALUE = ("q_proj", "v_proj")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Adapter:
    """
    One arm's adapter.

    Args:
        label (`str`): its name in the table.
        kind (`str`): `"base"` (none), `"lora"`, `"loop"` or `"cuma"`.
        r (`int`): rank; of each expert in a mixture.
        share_a (`bool`): one A for all experts of a layer.
        grouped (`bool`): one router for q, k, v (those that are targeted) and one for gate and up.
        routing (`str`): as in `CuMAConfig`.
        demographic_dim (`int`), router_hidden (`int`): sizes of the router.
        router_losses (`bool`): the step also computes the balance loss, as a trainer's does.
        gates_given (`bool`): the gates come from outside: what a layer costs beside its group's router.
        goals (`dict[str, float]`): what is to be reached, see `speed_measure.GOALS`.
    """

    label: str
    kind: str
    r: int = 0
    share_a: bool = False
    grouped: bool = False
    routing: str = "joint"
    demographic_dim: int = 1024
    router_hidden: int = 256
    router_losses: bool = False
    gates_given: bool = False
    goals: dict[str, float] = field(default_factory=dict, hash=False)


BASE = Adapter("frozen base", "base")
REFERENCE, LOOP, PUBLISHED = "LoRA k·r", "per-expert loop", "CuMA, router per module"


TIME_GOALS = {  # (model, device) → case → step time over LoRA k·r, and the loop's step over ours
    ("hidden-512", "cpu"): {"q/v": 1.05, "q/v published": 1.15, "all r=8": 1.30, "all r=64": 1.08, "loop": 2.0},
    ("8b-slice", "cuda"): {"q/v": 1.03, "all r=8": 1.10, "loop": 5.0},
}


# ---------------------------------------------------------------------------------------------------- arms
def loras(r: int) -> list[Adapter]:
    return [Adapter("LoRA r", "lora", r), Adapter(REFERENCE, "lora", TOP_K * r)]


def layer_arms(r: int, share_a: bool) -> list[Adapter]:
    mixture = dict(r=r, share_a=share_a)
    return [
        BASE,
        *loras(r),
        Adapter(LOOP, "loop", **mixture),
        Adapter(PUBLISHED, "cuma", **mixture),
        Adapter("CuMA, gates given", "cuma", gates_given=True, **mixture),
        Adapter("CuMA, demographic", "cuma", routing="demographic", **mixture),
    ]


def model_cases(model: str, device: str) -> list[tuple[str, tuple[str, ...], list[Adapter]]]:
    """Whole models: name, targets and arms of each case."""
    bounds = TIME_GOALS.get((model, device), {})

    def goal(name: str, key: str = "time") -> dict[str, float]:
        return {key: bounds[name]} if name in bounds else {}

    saved = {"saved": 1.4, "saved_loop": 1 / 8}
    all8 = goal("all r=8") | goal("loop", "loop") | saved
    all64 = goal("all r=64") | saved
    small = dict(demographic_dim=128, router_hidden=32)
    one_a = ", shared A"

    def arms(mixture: dict[str, Any], grouped: list[Adapter], published: dict[str, float]) -> list[Adapter]:
        return [
            BASE,
            *loras(mixture["r"]),
            Adapter(LOOP, "loop", **mixture),
            Adapter(PUBLISHED, "cuma", **mixture, goals=published),
            *grouped,
            Adapter("CuMA, demographic" + one_a, "cuma", routing="demographic", share_a=True, **mixture),
        ]

    def groups(mixture: dict[str, Any], what: str = "", **fields: Any) -> Adapter:
        return Adapter(f"CuMA, groups{what}", "cuma", grouped=True, **mixture, **fields)

    r8, r64 = dict(r=8), dict(r=64, **small)
    query_value = [
        groups(r8, goals=goal("q/v")),
        groups(r8, one_a, share_a=True, goals=goal("q/v")),
        groups(r8 | small, f"{one_a}, d=128 hid=32", share_a=True, goals=goal("q/v")),
    ]
    all_linear = [
        groups(r8, goals=all8),
        groups(r8, one_a, share_a=True, goals=all8),
        groups(r8, f"{one_a}, balance loss", share_a=True, router_losses=True),
    ]
    rank_64 = [
        groups(r64, goals=all64),
        groups(r64, one_a, share_a=True, goals=all64),
        Adapter("CuMA, demographic", "cuma", routing="demographic", **r64),
    ]
    return [
        ("q/v, r=8", QUERY_VALUE, arms(r8, query_value, goal("q/v published"))),
        ("all-linear, r=8", ALL_LINEAR, arms(r8, all_linear, {})),
        ("all-linear, r=64, d=128 hid=32", ALL_LINEAR, arms(r64, rank_64, {})),
    ]


def decoding_arms() -> list[Adapter]:
    joint, fixed = {"rate": 0.9}, {"rate": 0.98}
    return [
        BASE,
        loras(8)[1],
        Adapter(LOOP, "loop", 8),
        Adapter(PUBLISHED, "cuma", 8, goals=joint),
        Adapter("CuMA, groups", "cuma", 8, grouped=True, goals=joint),
        Adapter("CuMA, groups, shared A", "cuma", 8, grouped=True, share_a=True, goals=joint),
        Adapter("CuMA, demographic", "cuma", 8, routing="demographic", goals=fixed),
        Adapter("CuMA, demographic, shared A", "cuma", 8, share_a=True, routing="demographic", goals=fixed),
    ]


# ---------------------------------------------------------------------------------------------------- building
class LoopMixture(nn.Module):
    """
    The mixture as one writes it first, and as the published code is shaped: each layer's router reads the hidden state
    and the profile, repeated for every token and concatenated to it; a Python loop picks each expert's tokens with a
    boolean mask. The same function as CuMA's `routing="joint"`, `gate="topk_softmax"`.

    Args:
        base (`nn.Module`): the frozen linear layer.
        cuma (`CuMALinear`): a layer with a router of its own, whose weights are copied.
        profiles (`torch.Tensor`): `(batch, demographic_dim)`.
    """

    def __init__(self, base: nn.Module, cuma: CuMALinear, profiles: torch.Tensor) -> None:
        super().__init__()
        self.base = base
        self.profiles = profiles
        experts, router = cuma.cuma_experts["default"], cuma.cuma_router["default"]
        b = experts.weight_b.detach().split(cuma.r["default"], dim=1)
        a = [experts.weight_a.detach()] if experts.share_a else experts.weight_a.detach().split(cuma.r["default"])
        self.a = nn.ParameterList([nn.Parameter(weight.clone()) for weight in a])
        self.b = nn.ParameterList([nn.Parameter(weight.clone()) for weight in b])
        self.scaling = cuma.scaling["default"]
        first = torch.cat([router.hidden_weight, router.demographic_weight], dim=1).detach()
        self.first = nn.Parameter(first)
        self.first_bias = nn.Parameter(router.bias.detach().clone())
        self.rest = copy.deepcopy(router.rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.first.dtype
        hidden = x.to(dtype)
        profiles = self.profiles.to(dtype).unsqueeze(1).expand(-1, x.shape[1], -1)
        logits = self.rest(nn.functional.linear(torch.cat([hidden, profiles], -1), self.first, self.first_bias))
        values, chosen = logits.float().topk(TOP_K, dim=-1)
        weights, chosen = values.softmax(-1).flatten(0, 1), chosen.flatten(0, 1)  # (tokens, k)
        tokens = hidden.flatten(0, 1)
        shared = nn.functional.linear(tokens, self.a[0]) if len(self.a) == 1 else None
        mixed = tokens.new_zeros(tokens.shape[0], self.b[0].shape[0])
        for expert, b in enumerate(self.b):
            picked = chosen == expert
            rows = picked.any(-1)
            if not rows.any():
                continue
            z = nn.functional.linear(tokens[rows], self.a[expert]) if shared is None else shared[rows]
            weight = (weights * picked).sum(-1)[rows].unsqueeze(1)
            mixed[rows] += (weight * nn.functional.linear(z, b)).to(mixed.dtype)
        result = self.base(x)
        return result + (self.scaling * mixed).to(result.dtype).view(result.shape)


def share_parameters(model: nn.Module) -> nn.Module:
    """A copy of the modules around the very same parameters: the arms' base weights are in memory once."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def add_adapter(
    base: nn.Module,
    adapter: Adapter,
    targets: Iterable[str],
    profiles: torch.Tensor,
    task_type: str | None,
    adapters_in_float32: bool,
) -> nn.Module:
    """
    `base`, frozen, with the arm's adapter on the layers named in `targets`. B is drawn at random, not zero.

    Args:
        profiles (`torch.Tensor`): `(batch, demographic_dim)`; a loop's are fixed when it is built.
        adapters_in_float32 (`bool`): PEFT's `autocast_adapter_dtype`, for LoRA and CuMA alike.
    """
    model = share_parameters(base).requires_grad_(False)
    if adapter.kind == "base":
        return model
    if adapter.kind == "loop":
        like = replace(adapter, kind="cuma")
        source = add_adapter(base, like, targets, profiles, task_type, adapters_in_float32).get_base_model()
        for name, layer in source.named_modules():
            if isinstance(layer, CuMALinear):
                model.set_submodule(name, LoopMixture(model.get_submodule(name), layer, profiles))
        return model
    common = {"r": adapter.r, "lora_alpha": ALPHA_OVER_R * adapter.r, "target_modules": list(targets)}
    if adapter.kind == "lora":
        config = LoraConfig(**common, init_lora_weights=False, task_type=task_type)
    else:
        groups = [[name for name in group if name in targets] for group in GROUPS] if adapter.grouped else []
        config = CuMAConfig(
            **common,
            init_weights=False,
            task_type=task_type,
            num_experts=EXPERTS,
            top_k=TOP_K,
            share_a=adapter.share_a,
            routing=adapter.routing,
            demographic_dim=adapter.demographic_dim,
            router_hidden=adapter.router_hidden,
            router_groups=[group for group in groups if group] or None,
        )
    torch.manual_seed(1)  # arms of one kind and size get the same weights, a loop those of its CuMA
    return get_peft_model(model, config, autocast_adapter_dtype=adapters_in_float32)


def give_gates(model: nn.Module, batch: int, seq: int, device: torch.device) -> torch.Tensor:
    """Make a model's one CuMA layer take these gates `(batch, seq, experts)`, which require a gradient."""
    logits = torch.randn(batch, seq, EXPERTS, device=device)
    gates = compute_gates(logits, "topk_softmax", TOP_K).requires_grad_()
    (layer,) = (module for module in model.modules() if isinstance(module, CuMALinear))
    layer.gates = lambda *args, **kwargs: gates
    return gates


@torch.no_grad()
def check_same(
    loop: Callable[[], torch.Tensor],
    cuma: Callable[[], torch.Tensor],
    base: Callable[[], torch.Tensor],
    dtype: torch.dtype,
) -> None:
    """
    Compare the loop's output with that of the CuMA whose weights it has, in units of what the adapter adds to the
    base. Experts in a wrong order give about 1.4; rounding gives little, and now and then swaps two experts of almost
    equal logits, in bfloat16 for one token in a hundred.

    Raises:
        AssertionError: if they compute different functions.
    """
    expected = cuma().float()
    error = ((loop().float() - expected).norm() / (expected - base().float()).norm()).item()
    bound = 1e-3 if dtype == torch.float32 else 0.5
    assert error < bound, f"The loop is not the function that CuMA computes: relative error {error:.2g}."


# ---------------------------------------------------------------------------------------------------- the floor
def least_flops(adapter: Adapter, targets: Iterable[tuple[str, int, int]], tokens: int, rows: int) -> int:
    """
    The fewest floating-point operations in matrix products that an adapter's forward and backward need, by any
    implementation that computes each token's chosen experts only. With N tokens, P profiles (rows), a layer in → out:

    | | operations |
    |---|---|
    | a product that is trained (forward, gradient of the weight, of the input), n → m | `6 N n m` |
    | LoRA of rank R | `6 N R (in + out)` |
    | k experts of rank r per token, each with its A | `6 N k r (in + out)` |
    | the same, one A | `6 N r (in + k out)` |
    | one gate vector per row, each expert with its A | as LoRA of rank `k r` |
    | the same, one A | as LoRA of rank r; and mixing each row's B and its backward: `6 P k r out` |
    | router on token and profile | `6 N H (in + E)`; and the profile, which needs no gradient: `4 P d H` |
    | router on the profile | `4 P d H + 6 P H E` |

    A router that a group shares counts once, with gates given not at all. Elementwise work (gates, ReLU, top-k) is not
    counted, as in `FlopCounterMode`.

    Args:
        targets (`Iterable[tuple[str, int, int]]`): name, in and out of each adapted layer.
        tokens (`int`), rows (`int`): N and P.
    """
    total, routed = 0, set()
    k, r, hidden = TOP_K, adapter.r, adapter.router_hidden
    for name, n_in, n_out in targets:
        if adapter.kind == "lora":
            total += 6 * tokens * r * (n_in + n_out)
        if adapter.kind in ("base", "lora"):
            continue
        by_row = adapter.routing == "demographic"
        if not adapter.share_a:
            total += 6 * tokens * k * r * (n_in + n_out)
        elif by_row:
            total += 6 * tokens * r * (n_in + n_out) + 6 * rows * k * r * n_out
        else:
            total += 6 * tokens * r * (n_in + k * n_out)
        router = _router_of(name, adapter.grouped)
        if not adapter.gates_given and router not in routed:
            routed.add(router)
            total += 4 * rows * adapter.demographic_dim * hidden
            total += 6 * (rows * hidden * EXPERTS if by_row else tokens * hidden * (n_in + EXPERTS))
    return total


def _router_of(name: str, grouped: bool) -> str | tuple[str, int]:
    parent, _, last = name.rpartition(".")
    for index, group in enumerate(GROUPS):
        if grouped and last in group:
            return parent, index
    return name


def weights_read(adapter: Adapter, model: nn.Module) -> int:
    """
    The numbers that decoding one token has to read once: all weights but those of the embedding, and of the routers'
    profile halves, which are used once per generation. 0 where it depends on the profiles (collapsed experts) or on
    the tokens' choices (a loop).
    """
    if adapter.kind == "loop" or adapter.routing == "demographic":
        return 0
    unread = ("embed_tokens", "demographic_weight")
    return sum(p.numel() for name, p in model.named_parameters() if not any(part in name for part in unread))
