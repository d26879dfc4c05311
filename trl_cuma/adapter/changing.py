# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Changing a trained adapter in place: more experts, or routers that start anew."""

from __future__ import annotations

import copy
import math

import torch
from peft import PeftModel
from torch import nn

from .config import CuMAConfig, check_positive
from .experts import CuMAExperts
from .film import FiLM
from .layer import CuMALinear, router_features
from .model import demographic_projection
from .router import CuMARouter


def grow_experts(
    model: PeftModel, num_experts: int, *, adapter_name: str = "default", perturbation: float = 0.1
) -> None:
    """
    Give a trained adapter m times its experts, as m copies of each, and m times its `top_k`. The copies' B differ by
    perturbations that sum to zero, and their gates are equal, so that at first the model computes what it did (up to
    the rounding of the adapter's dtype); the perturbations make the copies learn apart (sparse upcycling, arXiv
    2212.05055, for LoRA experts).

    Do it before a trainer or an optimiser is made: the parameters are new.

    Args:
        model (`PeftModel`): the model with the adapter; changed in place, its configuration with it.
        num_experts (`int`): the new number of experts, a multiple of the present one.
        adapter_name (`str`): the adapter.
        perturbation (`float`): standard deviation of the perturbations, relative to the root mean square of the
            layer's B.

    Raises:
        ValueError: if `num_experts` is not a multiple (2 or more) of the present number, if the gate is
            `"double_softmax"`, whose gates are not m equal parts, if `perturbation` is not positive, if the adapter is
            untrained, or if it has no routers (one expert, with FiLM).
    """
    config, layers = _adapter(model, adapter_name)
    check_positive("num_experts", num_experts)
    factor, rest = divmod(num_experts, config.num_experts)
    if rest or factor < 2:
        raise ValueError(
            f"`num_experts={num_experts}` must be 2, 3, … times the adapter's {config.num_experts}: each expert gets "
            "the same number of copies."
        )
    if not config.has_routers:
        raise ValueError(
            f"An adapter with `num_experts=1` and `film_hidden={config.film_hidden}` has no router, so it can't grow. "
            f"Make a new one with `num_experts={num_experts}`."
        )
    if config.gate == "double_softmax":
        raise ValueError(
            "An adapter with `gate='double_softmax'` can't grow: its gates for m copies are not m equal parts of the "
            "expert's gate, so that the model would change. Train one with `gate='topk_softmax'`."
        )
    if not 0 < perturbation < math.inf:
        raise ValueError(f"`perturbation` must be positive, or the copies stay equal, and finite; got {perturbation}.")
    experts = [layer.cuma_experts[adapter_name] for layer in layers]
    if not any(each.weight_b.any() for each in experts):
        raise ValueError(
            f"Adapter {adapter_name!r} is untrained (every B is zero), so that there is nothing to copy. Make a new "
            f"one with `num_experts={num_experts}`."
        )
    config = _own_config(model, adapter_name, layers)
    for each in experts:
        _grow(each, factor, perturbation)
    for film in _films(layers, adapter_name):
        by_expert = (2, film.num_experts, film.r)
        for name, parameter in list(film.last.named_parameters()):
            copies = parameter.data.unflatten(0, by_expert).repeat_interleave(factor, 1)
            _replace(film.last, name, copies.flatten(0, 2))
        film.num_experts *= factor
        film.last.out_features *= factor
    for router in _routers(layers, adapter_name):
        owner = router.rest[-1] if router.rest else router  # a linear router has but its first layer
        for name, parameter in list(owner.named_parameters(recurse=False)):
            _replace(owner, name, parameter.data.repeat_interleave(factor, 0))
    config.num_experts, config.top_k = num_experts, config.top_k * factor


def reset_router(model: PeftModel, *, adapter_name: str = "default", demographic_dim: int | None = None) -> None:
    """
    Start an adapter's routers (and its demographic projection and FiLM) anew, and keep its experts: the way to another
    demographic encoder, whose vectors the trained routers can't read. The configuration forgets the old encoder.

    Do it before a trainer or an optimiser is made: the parameters are new.

    Args:
        model (`PeftModel`): the model with the adapter; changed in place.
        adapter_name (`str`): the adapter.
        demographic_dim (`int`, *optional*): length of the new encoder's vectors; as it was by default.
    """
    config, layers = _adapter(model, adapter_name)
    if demographic_dim is not None:
        check_positive("demographic_dim", demographic_dim)
    config = _own_config(model, adapter_name, layers)
    if demographic_dim is not None and config.routing != "semantic":
        config.demographic_dim = demographic_dim
    config.demographic_encoder = None
    for router in _routers(layers, adapter_name):
        router.reset(router_features(config))
    for film in _films(layers, adapter_name):
        film.reset(router_features(config))
    old = model.base_model.cuma_demographic[adapter_name] if config.demographic_projection else None
    if old is not None:
        new = demographic_projection(config).to(old.weight)
        new.weight.requires_grad_(old.weight.requires_grad)
        model.base_model.cuma_demographic[adapter_name] = new


def _adapter(model: PeftModel, adapter_name: str) -> tuple[CuMAConfig, list[CuMALinear]]:
    config = model.peft_config.get(adapter_name) if isinstance(model, PeftModel) else None
    if not isinstance(config, CuMAConfig):
        raise ValueError(f"The model has no CuMA adapter {adapter_name!r}. Pass a PeftModel, and the adapter's name.")
    layers = [m for m in model.modules() if isinstance(m, CuMALinear) and adapter_name in m.cuma_experts]
    return config, layers


def _own_config(model: PeftModel, adapter_name: str, layers: list[CuMALinear]) -> CuMAConfig:
    """A copy of the configuration in its place: another model may have been made of the same one."""
    config = model.peft_config[adapter_name] = copy.deepcopy(model.peft_config[adapter_name])
    for layer in layers:
        layer.config[adapter_name] = config
    return config


def _routers(layers: list[CuMALinear], adapter_name: str) -> list[CuMARouter]:
    """Each router once, also where a group of layers shares it, in the layers' order."""
    return list(
        dict.fromkeys(layer.shared_router[adapter_name] for layer in layers if adapter_name in layer.shared_router)
    )


def _films(layers: list[CuMALinear], adapter_name: str) -> list[FiLM]:
    return [layer.cuma_film[adapter_name] for layer in layers if adapter_name in layer.cuma_film]


def _grow(experts: CuMAExperts, factor: int, perturbation: float) -> None:
    by_expert = (experts.num_experts, experts.r)
    if not experts.share_a:
        copies = experts.weight_a.data.unflatten(0, by_expert).repeat_interleave(factor, 0)
        _replace(experts, "weight_a", copies.flatten(0, 1))
    dtype = torch.promote_types(experts.weight_b.dtype, torch.float32)
    b = experts.weight_b.data.unflatten(1, by_expert).to(dtype)  # (out, experts, r)
    noise = torch.randn(factor, *b.shape, dtype=dtype, device=b.device)
    # Relative to the layer's B, not to the expert's: the copies of one that was never used, zero, must part, too.
    noise = (noise - noise.mean(0)) * (perturbation * b.square().mean().sqrt())
    copies = (b + noise).movedim(0, 2)  # (out, experts, copies, r)
    _replace(experts, "weight_b", copies.flatten(1).to(experts.weight_b.dtype))
    experts.num_experts *= factor


def _replace(module: nn.Module, name: str, value: torch.Tensor) -> None:
    setattr(module, name, nn.Parameter(value.contiguous(), requires_grad=getattr(module, name).requires_grad))
