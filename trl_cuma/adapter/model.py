# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`CuMAModel`: puts CuMA layers into a model, and brings the profile to them."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import field, make_dataclass
from typing import Any, NoReturn

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs, register_peft_method
from peft.utils.integrations import init_empty_weights
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.utils import ModelOutput

from .conditioning import Conditioning, ConditioningStack, carry_conditioning_through_checkpoints
from .config import DEFAULT_DEMOGRAPHIC_DIM, CuMAConfig
from .hub import carry_card_to_hub
from .layer import CuMALayer, CuMALinear, raise_not_mergeable
from .loading import base_model_type, check_saved_adapter, check_tensors
from .losses import RouterLosses
from .peft_type import CUMA
from .routing import RoutingByProfile
from .targets import DEFAULT_TARGET_MODULES, check_target_modules, instead, is_linear


class CuMAModel(BaseTuner):
    """
    A model with CuMA layers. Made by `get_peft_model(model, CuMAConfig(...))`; `generate` for a person needs
    `task_type="CAUSAL_LM"` (or another with generation) there, since a plain `PeftModel` goes past this class.

    Its `forward` and `generate` take, beside the base model's arguments:

    Args:
        demographic_embeds (`torch.Tensor`): `(batch, demographic_dim)`, one row per sample (in `generate`: per
            prompt); with `demographic_ids`, `(profiles, demographic_dim)`.
        demographic_ids (`torch.Tensor`, *optional*, `forward` only): `(rows, seq)` for packed rows: each token's row
            of `demographic_embeds`; negative for padding.
        output_router_losses (`str`, *optional*, `forward` only): `"local"`, `"ranks"` or `"published"`, see
            [`~trl_cuma.adapter.losses.RouterLosses`]: puts `aux_loss`, `z_loss`, `router_load` and `router_entropy`
            into the output, as keys (none without routers). Add the first two, times a coefficient, to the loss; their
            gradients reach the routers under every checkpointing mode.
        output_routing_by_profile (`bool`, *optional*, `forward` only): puts into the output, instead, `router_load`
            and `router_gate` `(profiles, routers, experts)` and `router_entropy` `(profiles, routers)`: means over the
            tokens of each row of `demographic_embeds`. For evaluation: they have no gradient.

    Raises:
        ValueError: if a profile is missing (unless `missing_demographics="zero"`) or the wrong number of rows, or a
            vector of the wrong length, is passed.
    """

    prefix = "cuma_"
    tuner_layer_cls = CuMALayer
    target_module_mapping = DEFAULT_TARGET_MODULES
    uses_shared_state = True

    # ------------------------------------------------------------------ injection
    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        config = self.peft_config[adapter_name]
        if any(other is config for name, other in self.peft_config.items() if name != adapter_name):
            # TRL makes its reference of the adapter's own: what is written into one must not reach the other.
            config = self.peft_config[adapter_name] = copy.deepcopy(config)
        check_saved_adapter(model, config)
        check_target_modules(model, config)
        first = "cuma_demographic" not in self._modules  # called from BaseTuner.__init__
        if first:
            if any(isinstance(module, CuMALinear) for module in model.modules()):
                raise ValueError(
                    "This model already has CuMA layers. Add an adapter with `add_adapter`, or call `unload()` first "
                    "and wrap the model that it returns."
                )
            self.cuma_demographic = nn.ModuleDict()
            self._conditioning = ConditioningStack()
            self._hooks = [
                model.register_forward_pre_hook(self._begin_forward, with_kwargs=True),
                model.register_forward_hook(self._end_forward, with_kwargs=True, always_call=True),
            ]
        config.base_model_type = base_model_type(model)
        if config.demographic_dim is None:
            config.demographic_dim = DEFAULT_DEMOGRAPHIC_DIM
        if config.demographic_projection is not None:
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self.cuma_demographic[adapter_name] = demographic_projection(config)
        # As for the layers' parameters, PEFT's "an adapter that is added leaves the others as trainable as they were".
        trainable = {name: module.weight.requires_grad for name, module in self.cuma_demographic.items()}
        self._leaders: dict[tuple, CuMALinear] = {}
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            _check_router_groups(model, config, adapter_name)
        except Exception:
            if first:  # the caller has only the base model: give it back whole, for another try
                self.unload()
            else:
                self.delete_adapter(adapter_name)
            raise
        finally:
            del self._leaders
        for name, requires_grad in trainable.items():
            if name != adapter_name:
                self.cuma_demographic[name].requires_grad_(requires_grad)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _create_and_replace(
        self,
        config: CuMAConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, CuMALinear):
            layer = target
        else:
            layer = self._new_layer(target, parent, current_key)
        r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), current_key), config.r)
        alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), current_key), config.lora_alpha)
        group = _router_group(config, current_key)
        leader = None
        if group is not None:
            leader = self._leaders.setdefault((*group, layer.in_features), layer)
        layer.update_layer(adapter_name, config, r, alpha, leader=None if leader is layer else leader)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _new_layer(self, target: nn.Module, parent: nn.Module, key: str) -> CuMALinear:
        quantization_kwargs = get_quantization_kwargs(self)
        if isinstance(parent, nn.MultiheadAttention):
            raise ValueError(
                f"CuMA cannot target `{key}`: nn.MultiheadAttention reads its weight without calling it, so the "
                "adapter would be ignored. Target other linear layers."
            )
        if not is_linear(target, quantization_kwargs):
            raise ValueError(
                f"CuMA cannot target `{key}` of type {type(target).__name__}: it adapts linear layers (nn.Linear, "
                f"Conv1D, and quantized ones that PEFT knows). {instead(self.model)}"
            )
        layer = CuMALinear(target, self._conditioning, **quantization_kwargs)
        layer._active_adapter = self.active_adapters
        return layer

    # ------------------------------------------------------------------ the profile's way in
    def _begin_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Take CuMA's arguments out of the base model's call. Hooks on the base serve every PeftModel class alike."""
        if "_is_replica" in model.__dict__:
            raise RuntimeError(
                "CuMA does not run under torch.nn.DataParallel, whose threads would mix up their people. Start one "
                "process per GPU with `accelerate launch`, or make one GPU visible (CUDA_VISIBLE_DEVICES=0)."
            )
        embeds = kwargs.pop("demographic_embeds", None)
        ids = kwargs.pop("demographic_ids", None)
        balance = kwargs.pop("output_router_losses", None)
        by_profile = kwargs.pop("output_routing_by_profile", False)
        inherited = self._conditioning.current
        if inherited is not None and not inherited.expand:
            # Forwards don't nest: it was left by one that a KeyboardInterrupt ended, which skips `_end_forward`.
            self._conditioning.clear()
            inherited = None
        self._conditioning.push(inherited)  # `_end_forward` pops, also if what follows raises
        if inherited is not None and embeds is None:
            return args, kwargs  # a decoding step inside `generate`
        if ids is not None and embeds is None:
            raise ValueError(
                "`demographic_ids` was passed without `demographic_embeds`. Pass (profiles, dim) embeddings."
            )
        tokens = _first_tensor(*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        batch_shape = tuple(tokens.shape[:2]) if tokens is not None and tokens.dim() >= 2 else None
        mask = kwargs.get("attention_mask")
        if mask is None and ids is not None:
            mask = ids.ge(0)
        elif mask is None and batch_shape is not None:
            mask = tokens.new_ones(batch_shape)
        losses = None
        if balance is not None:
            starts = None if ids is None else _document_starts(ids, kwargs.get("position_ids"))
            losses = RouterLosses(mask, starts, balance)
        elif by_profile:
            losses = RoutingByProfile(mask, ids)
        conditioning = self._condition(embeds, ids=ids, batch_shape=batch_shape, losses=losses)
        self._conditioning.pop()
        self._conditioning.push(conditioning)
        if model.training and torch.is_grad_enabled():
            carry_conditioning_through_checkpoints(model, self._conditioning)
        return args, kwargs

    def _end_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        conditioning = self._conditioning.pop()
        if conditioning is not None:
            conditioning.last_gates = None  # a checkpointed layer's graph holds the conditioning: no cycle through it
        if output is None or conditioning is None or conditioning.losses is None:
            return output
        if not isinstance(output, dict):
            raise TypeError(
                f"`output_router_losses` needs a model that returns a dict-like output, got {type(output).__name__}. "
                "Call the model with `return_dict=True`."
            )
        if output.get("aux_loss") is not None:
            raise ValueError(
                "The base model's output has an `aux_loss` of its own, of its routers, where CuMA's would go. Call it "
                "with `output_router_logits=False`: the base's routers are frozen."
            )
        losses = conditioning.losses.finish()  # travels as keys: accelerate's conversion to float32 loses attributes
        if isinstance(output, ModelOutput):
            # DistributedDataParallel rebuilds an output from its keys, which must be fields of its class.
            return _with_fields(type(output), tuple(losses))(**{**output, **losses})
        output.update(losses)
        return output

    def generate(self, *args: Any, demographic_embeds: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """The base model's `generate`, for the people of `demographic_embeds` `(prompts, demographic_dim)`."""
        names = ("input_ids", "inputs", "inputs_embeds")
        prompts = _first_tensor(*args[:1], *(kwargs.get(name) for name in names))
        given = prompts is not None and demographic_embeds is not None
        if given and prompts.shape[0] != demographic_embeds.shape[0]:
            raise ValueError(
                f"`demographic_embeds` has {demographic_embeds.shape[0]} rows but there are {prompts.shape[0]} "
                "prompts. Pass one row per prompt; beams and `num_return_sequences` are taken care of."
            )
        if given and torch.equal(demographic_embeds, demographic_embeds[:1].expand_as(demographic_embeds)):
            demographic_embeds = demographic_embeds[:1]  # one person: with demographic routing, one product for all
        # Also without profiles: an encoder is called by itself, where no hook could say what their lack means.
        conditioning = self._condition(demographic_embeds, expand=True)
        for module in self.model.modules():
            if isinstance(module, CuMALinear):
                module.prepare(conditioning)
        with self._conditioning.use(conditioning):
            return self.model.generate(*args, **kwargs)

    def _condition(self, embeds: torch.Tensor | None, **kwargs: Any) -> Conditioning:
        profiles: dict[str, torch.Tensor] = {}
        for name, config in self.peft_config.items():  # not the active ones alone: a single layer may have its own
            if config.routing == "semantic":
                continue
            if embeds is None:
                if config.missing_demographics == "zero":
                    size = config.demographic_projection or config.demographic_dim
                    device = next(self.model.parameters()).device
                    profiles[name] = torch.zeros(1, size, device=device)
                continue
            if embeds.dim() != 2 or embeds.shape[1] != config.demographic_dim:
                if name not in self.active_adapters:
                    continue
                raise ValueError(
                    f"`demographic_embeds` must have shape (rows, {config.demographic_dim}) for adapter {name!r}, got "
                    f"{tuple(embeds.shape)}. `demographic_dim={config.demographic_dim}` in CuMAConfig must be the "
                    "encoder's."
                )
            projection = self.cuma_demographic[name] if name in self.cuma_demographic else None
            profiles[name] = embeds if projection is None else projection(embeds.to(projection.weight))
        return Conditioning(profiles, broadcast=embeds is None, **kwargs)

    # ------------------------------------------------------------------ PEFT's life cycle, for the shared projection
    # BaseTuner looks after tuner *layers*; these do the same for what belongs to the whole adapter.
    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_name, inference_mode)
        for name, module in self.cuma_demographic.items():
            module.requires_grad_(name in _as_list(adapter_name) and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        for name, module in self.cuma_demographic.items():
            if name in _as_list(adapter_names):
                module.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if adapter_name in self.cuma_demographic:
            del self.cuma_demographic[adapter_name]

    def unload(self) -> nn.Module:
        model = super().unload()
        for hook in self._hooks:
            hook.remove()
        return model

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype and adapter_name in self.cuma_demographic:
            self.cuma_demographic[adapter_name].float()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name not in self.cuma_demographic:
            return
        layers = (m for m in self.model.modules() if isinstance(m, CuMALinear) and adapter_name in m.cuma_experts)
        like = next(layers).cuma_experts[adapter_name].weight_a
        projection = self.cuma_demographic[adapter_name]
        if not like.is_meta and not projection.weight.is_meta:
            projection.to(device=device or like.device, dtype=like.dtype)  # one dtype: ZeRO-3 needs it

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT takes the name out where it is next to the last; in a router's deeper modules it is further ahead.
        short, found = re.subn(rf"(^|\.)(cuma_[a-z]+)\.{re.escape(adapter_name)}\.", r"\1\2.", key, count=1)
        return short if found else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: CuMAConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # The one method of the tuner that PEFT calls between reading an adapter's file and copying its tensors.
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_tensors(model, config, adapter_name, state_dict)
        return state_dict

    def _check_merge_allowed(self) -> NoReturn:
        raise_not_mergeable()


def demographic_projection(config: CuMAConfig) -> nn.Linear:
    """The adapter's shared map of a profile's vector, at its start."""
    projection = nn.Linear(config.demographic_dim, config.demographic_projection, bias=False)
    nn.init.normal_(projection.weight, std=config.demographic_dim**-0.5)  # keeps the vector's RMS
    return projection


@torch.compiler.assume_constant_result  # a compiler cannot make a class
def _with_fields(output_class: type[ModelOutput], names: tuple[str, ...]) -> type[ModelOutput]:
    return _make_with_fields(output_class, names)


@functools.cache
def _make_with_fields(output_class: type[ModelOutput], names: tuple[str, ...]) -> type[ModelOutput]:
    """`output_class` with more optional fields."""
    new = [(name, Any, field(default=None)) for name in names if name not in output_class.__dataclass_fields__]
    namespace = {"__module__": __name__}
    return make_dataclass(f"{output_class.__name__}WithRouterLosses", new, bases=(output_class,), namespace=namespace)


def _as_list(names: str | Sequence[str]) -> Sequence[str]:
    return [names] if isinstance(names, str) else names


def _first_tensor(*candidates: Any) -> torch.Tensor | None:
    return next((value for value in candidates if isinstance(value, torch.Tensor)), None)


def _check_router_groups(model: nn.Module, config: CuMAConfig, adapter_name: str) -> None:
    layers = ((key, m) for key, m in model.named_modules() if isinstance(m, CuMALinear))
    targeted = {key.rpartition(".")[2] for key, layer in layers if adapter_name in layer.cuma_experts}
    unknown = sorted({name for group in config.router_groups or [] for name in group} - targeted)
    if unknown:
        raise ValueError(
            f"`router_groups` names {', '.join(map(repr, unknown))}, which `target_modules` does not find; it finds "
            f"{', '.join(sorted(targeted))}. Group modules that are targeted."
        )


def _router_group(config: CuMAConfig, key: str) -> tuple[str, int] | None:
    parent, _, name = key.rpartition(".")
    for index, names in enumerate(config.router_groups or []):
        if name in names:
            return parent, index
    return None


def _document_starts(ids: torch.Tensor, position_ids: torch.Tensor | None) -> torch.Tensor:
    """`(rows, seq)`: where packed documents begin: where the profile changes, or the positions start anew."""
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return starts if position_ids is None else starts | position_ids.eq(0)


if CUMA not in PEFT_TYPE_TO_TUNER_MAPPING:  # registering twice (a reload in a notebook) would raise
    register_peft_method(name="cuma", config_cls=CuMAConfig, model_cls=CuMAModel)
carry_card_to_hub()
