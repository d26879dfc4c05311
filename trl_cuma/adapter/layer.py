# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`CuMALinear`: a frozen linear layer, quantized or not, with a mixture of low-rank experts beside it."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from torch.distributed.tensor import DTensor

from .conditioning import Conditioning, ConditioningStack
from .config import CuMAConfig
from .experts import CuMAExperts
from .film import FiLM
from .router import CuMARouter, at_least_float32, compute_gates


class CuMALayer(BaseTunerLayer):
    """What PEFT needs to know of a CuMA layer: where its adapters live."""

    # nn.ModuleDict keyed by adapter name: every parameter's path holds ".<adapter>.", as TRL's reference copy needs.
    adapter_layer_names = ("cuma_experts", "cuma_router", "cuma_film")
    other_param_names = ("r", "scaling", "cuma_dropout", "config", "shared_router")


class CuMALinear(nn.Module, CuMALayer):
    """
    `W0 x + s · sum_i g_i(x, d) · B_i A_i x` around any linear base layer.

    Args:
        base_layer (`nn.Module`): the frozen layer.
        stack (`ConditioningStack`): where the running call's profiles are; shared by all layers of the model.
        quantization_kwargs: what PEFT's resolver wants to know of a quantized base.
    """

    def __init__(self, base_layer: nn.Module, stack: ConditioningStack, **quantization_kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        try:
            self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization_kwargs)
        except ValueError:  # quantized by hand with torchao: PEFT misses only what merging would need
            self.quantization_backend = ForwardOnlyQuantizationBackend("torchao")
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.cuma_experts = nn.ModuleDict()
        self.cuma_router = nn.ModuleDict()
        self.cuma_film = nn.ModuleDict()
        self.cuma_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.config: dict[str, CuMAConfig] = {}
        # A group's router is registered (and saved) once, on its first layer; all of them find it here.
        self.shared_router: dict[str, CuMARouter] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._conditioning = stack

    def update_layer(
        self, adapter_name: str, config: CuMAConfig, r: int, lora_alpha: float, leader: CuMALinear | None
    ) -> None:
        """Add an adapter; `leader` is the layer whose router this one shares."""
        self.config[adapter_name] = config
        self.r[adapter_name] = r
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.cuma_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.cuma_experts[adapter_name] = CuMAExperts(
            self.in_features, self.out_features, r, config.num_experts, config.share_a, config.init_weights
        )
        if config.film_hidden is not None:
            self.cuma_film[adapter_name] = FiLM(
                router_features(config), config.film_hidden, config.num_experts, r, config.init_weights
            )
        if config.has_routers and leader is None:
            self.cuma_router[adapter_name] = CuMARouter(
                in_features=0 if config.routing == "demographic" else self.in_features,
                demographic_features=router_features(config),
                num_experts=config.num_experts,
                hidden=config.router_hidden,
                layers=config.router_layers,
            )
        if config.has_routers:
            self.shared_router[adapter_name] = (leader or self).cuma_router[adapter_name]
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_layer(x, *args, **kwargs)
        active = [name for name in self.active_adapters if name in self.cuma_experts]
        if self.disable_adapters or not active:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        # Its own fresh tensor, unless somebody who watches the base layer may have kept it.
        in_place = not (
            self.base_layer._forward_hooks
            or self.get_base_layer()._forward_hooks
            or nn.modules.module._global_forward_hooks
        )
        conditioning = self._conditioning.current
        prepared = {} if conditioning is None else conditioning.prepared_now
        for name in active:
            experts, dropout, value = self.cuma_experts[name], self.cuma_dropout[name], x
            if isinstance(dropout, nn.Dropout) and dropout.training:  # else the experts cast, and keep no copy
                value = dropout(self._cast_input_dtype(x, experts.weight_a.dtype))
            if experts in prepared:
                conditioning.repeats(len(prepared[experts][1]), len(x))  # or it says what doesn't fit
                result = experts.add_product(value, result, prepared[experts], in_place)
            else:
                top_k, film = self.config[name].experts_per_token, self.film(name, x)
                result = experts(value, self.gates(name, x), result, top_k, self.scaling[name], in_place, film)
        return result

    def gates(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """Gates `(..., experts)` for the layer's input `x` `(..., in_features)`, under the running call's profiles."""
        config, router = self.config[adapter_name], self.shared_router.get(adapter_name)
        if router is None:
            return torch.ones((1,) * x.dim(), dtype=at_least_float32(x.dtype), device=x.device)
        conditioning = self._conditioning.current
        if conditioning is not None and conditioning.last_gates is not None:
            last_router, last_x, gates = conditioning.last_gates
            if last_router is router and last_x is x:
                return gates
        batch_shape = conditioning.batch_shape if conditioning is not None else None
        hidden = _as_batch_seq(x, batch_shape)
        if config.routing == "semantic":
            logits = router(hidden, None)
        else:
            logits = router(
                hidden,
                self._profiles(adapter_name),
                gather=lambda part: conditioning.gather(part, hidden),
                profile_part=conditioning.prepared_now.get(router),
            )
        gates = compute_gates(logits, config.gate, config.top_k)
        if conditioning is not None and conditioning.losses is not None:
            gates = conditioning.losses.observe(router, logits, gates, config.gate, config.top_k)
        gates = _as_input(gates, hidden, x)
        if conditioning is not None:
            conditioning.last_gates = (router, x, gates)
        return gates

    def film(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor | None:
        """γ and β for the layer's input, `(..., 2 · experts · r)`, broadcasting as the gates; `None` without FiLM."""
        if adapter_name not in self.cuma_film:
            return None
        profiles, conditioning, film = self._profiles(adapter_name), self._conditioning.current, self.cuma_film
        part = conditioning.prepared_now.get(film[adapter_name])
        hidden = _as_batch_seq(x, conditioning.batch_shape)
        part = conditioning.gather(film[adapter_name](profiles) if part is None else part, hidden)
        return _as_input(part, hidden, x)

    def _profiles(self, adapter_name: str) -> torch.Tensor:
        conditioning = self._conditioning.current
        if conditioning is None or adapter_name not in conditioning.profiles:
            raise ValueError(
                "CuMA got no demographic profile: `demographic_embeds` is missing. Pass `demographic_embeds=` (one "
                "row per sample) to the model's `forward` or `generate`, train with a CuMA trainer and a "
                "`demographic` column, or set `missing_demographics='zero'` in CuMAConfig to mean the average profile."
            )
        return conditioning.profiles[adapter_name]

    @torch.no_grad()
    def prepare(self, conditioning: Conditioning) -> None:
        """
        Before decoding, compute what the profiles alone decide, once per generation instead of once per token: the
        router's part of them, FiLM, and with `routing="demographic"` the low-rank product that experts without FiLM
        collapse to.
        Weights that change after that are seen by the next generation.
        """
        for name in self.active_adapters:
            if name not in self.cuma_experts or name not in conditioning.profiles:
                continue
            config, router, experts = self.config[name], self.shared_router.get(name), self.cuma_experts[name]
            film = self.cuma_film[name] if name in self.cuma_film else None
            if not all(_is_whole(module) for module in (router, experts, film) if module is not None):
                continue
            if film is not None:
                conditioning.prepared[film] = film(conditioning.profiles[name])
            if router is not None and router not in conditioning.prepared:
                conditioning.prepared[router] = router.profile_part(conditioning.profiles[name])
            if config.routing == "demographic" and film is None:
                gates = compute_gates(conditioning.prepared[router], config.gate, config.top_k)
                product = experts.product(gates, config.experts_per_token, self.scaling[name])
                if product is not None:
                    conditioning.prepared[experts] = product

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        raise_not_mergeable()

    def unmerge(self) -> NoReturn:
        raise_not_mergeable()


def router_features(config: CuMAConfig) -> int:
    """Length of the profile's vector at a router; 0 if the router reads no profile."""
    return 0 if config.routing == "semantic" else config.demographic_projection or config.demographic_dim


def raise_not_mergeable() -> NoReturn:
    raise NotImplementedError(
        "A CuMA adapter cannot be merged into its base: its gates depend on the input and on the person. Keep it as "
        "an adapter, or use `unload()` to get the base model back."
    )


def _is_whole(module: nn.Module) -> bool:
    """Whether all parameters are here: if sharded or offloaded, they are so within their layer's forward only."""
    return all(
        parameter.numel() and not parameter.is_meta and not isinstance(parameter, DTensor)
        for parameter in module.parameters()
    )


def _as_input(values: torch.Tensor, hidden: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What broadcasts with `hidden` `(batch, seq, in_features)`, for the `x` that it was made of."""
    return values if x.dim() == 3 else values.expand(*hidden.shape[:2], -1).reshape(*x.shape[:-1], -1)


def _as_batch_seq(x: torch.Tensor, batch_shape: tuple[int, int] | None) -> torch.Tensor:
    """`(..., in_features)` → `(batch, seq, in_features)`; some models flatten (batch, seq) before a linear layer."""
    if x.dim() == 3:
        return x
    if x.dim() == 2:
        if batch_shape is not None and x.shape[0] == batch_shape[0] * batch_shape[1]:
            return x.unflatten(0, batch_shape)
        return x.unsqueeze(1)
    return x.flatten(1, -2)
