# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
One profile → a plain LoRA. Under fixed gates the experts of a layer are one low-rank product: exactly what the adapter
does for a person where the profile alone decides the gates, an approximation where the token has a say, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import CuMAConfig
from .fused import experts_a, experts_b
from .layer import CuMALinear
from .router import compute_gates

Factors = tuple[torch.Tensor, torch.Tensor]
"""`A` `(rank, in_features)` and `B` `(out_features, rank)` of a layer; its update `B A` has scale and gates in it."""


def is_exact(config: CuMAConfig) -> bool:
    """Whether a profile's LoRA is the adapter itself: gates that no token moves, and no shift, which a LoRA lacks."""
    return config.film_hidden is None and (config.routing == "demographic" or config.num_experts == 1)


def exported_adapter(model: PeftModel) -> tuple[str, CuMAConfig]:
    """
    Name and configuration of the model's active CuMA adapter, if a LoRA can hold what it is for a profile.

    Raises:
        ValueError: there is none, or several; it reads no profile; or it trains more than its layers.
    """
    active = [name for name in model.active_adapters if isinstance(model.peft_config.get(name), CuMAConfig)]
    if len(active) != 1:
        raise ValueError(f"An export is of one active CuMA adapter, the model has {len(active)}. Set it active alone.")
    config = model.peft_config[active[0]]
    if config.routing == "semantic":
        raise ValueError(
            "With `routing='semantic'` the adapter reads no profile: it answers everybody alike, and there is nothing "
            "to export by profile. Pass an adapter with `routing='joint'` or `'demographic'`."
        )
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, name):
            raise ValueError(
                f"The adapter has `{name}`, and a LoRA that engines serve holds linear layers alone. Write these "
                "weights into the base model, and train an adapter without them."
            )
    return active[0], config


def adapted_layers(model: PeftModel, adapter_name: str) -> dict[str, CuMALinear]:
    """The adapter's layers by their names in the base model, in its order."""
    modules = model.get_base_model().named_modules()
    return {n: m for n, m in modules if isinstance(m, CuMALinear) and adapter_name in m.cuma_experts}


@torch.no_grad()
def collapse(
    model: PeftModel, demographic_embeds: torch.Tensor, gates: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Factors]:
    """
    What the experts of each layer are for one profile, as one product: `B A = s · sum_i g_i B_i diag(1 + γ_i) A_i`, γ
    where there is FiLM. FiLM's shift β is left out.

    Args:
        model (`PeftModel`): with an active CuMA adapter.
        demographic_embeds (`torch.Tensor` of shape `(demographic_dim,)`): the profile's vector.
        gates (`Mapping[str, torch.Tensor]`, *optional*): layer → `(experts,)`, in place of the router's; needed where
            it reads the token, too.

    Returns:
        `dict`: layer → factors, float32, on the layer's device. Experts with gate 0 have no rows.

    Raises:
        ValueError: see [`exported_adapter`]; or the gates depend on the token, and none are given.
    """
    adapter_name, config = exported_adapter(model)
    if gates is None and config.routing != "demographic" and config.num_experts > 1:
        raise ValueError(
            f"With `routing={config.routing!r}` the gates depend on the token. Pass `gates`, as `mean_gates` has them."
        )
    conditioning = model.base_model._condition(demographic_embeds.unsqueeze(0))
    profile = conditioning.profiles[adapter_name]
    found = {}
    for name, layer in adapted_layers(model, adapter_name).items():
        experts, film = layer.cuma_experts[adapter_name], None
        if gates is not None:
            gate = gates[name]
        elif config.num_experts == 1:
            gate = torch.ones(1)
        else:
            gate = compute_gates(layer.shared_router[adapter_name].profile_part(profile)[0], config.gate, config.top_k)
        if adapter_name in layer.cuma_film:
            film = layer.cuma_film[adapter_name](profile)[0]
        gate = gate.to(experts.weight_b.device, torch.float32) * layer.scaling[adapter_name]
        b = experts_b(experts.weight_b, experts.num_experts, torch.float32) * gate[:, None, None]
        if experts.share_a and film is None:
            found[name] = (experts.weight_a.float(), b.sum(0))
            continue
        a = experts_a(experts.weight_a, 1 if experts.share_a else experts.num_experts, torch.float32)
        a = a.expand(experts.num_experts, -1, -1)
        if film is not None:
            gamma = film.float().unflatten(0, (2, experts.num_experts, experts.r))[0]
            a = a * (1 + gamma).unsqueeze(-1)
        used = gate.nonzero().squeeze(1)
        found[name] = (a[used].flatten(0, 1), b[used].transpose(0, 1).flatten(1))
    return found


@contextmanager
def mean_gates(model: PeftModel) -> Iterator[dict[str, torch.Tensor]]:
    """
    Forwards within it add to the mean gates of each layer, over all tokens that their `attention_mask` shows.

    Yields:
        `dict`: layer → `(experts,)`, filled when the context is left.
    """
    adapter_name, _ = exported_adapter(model)
    layers = adapted_layers(model, adapter_name)
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, float] = {}
    mask: torch.Tensor | None = None

    def note_mask(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal mask
        mask = kwargs["attention_mask"].ne(0)

    def note(name: str, layer: CuMALinear, x: torch.Tensor) -> None:
        gates = layer.gates(adapter_name, x)
        gates = gates.expand(*x.shape[:-1], -1).reshape(*mask.shape, -1)
        shown = mask.to(gates.device)
        sums[name] = sums.get(name, 0) + gates[shown].double().sum(0)
        counts[name] = counts.get(name, 0) + int(shown.sum())

    hooks = [model.register_forward_pre_hook(note_mask, with_kwargs=True)]
    for name, layer in layers.items():
        # Within the layer's forward the profile is known; and its own call finds these gates made.
        hooks.append(layer.register_forward_pre_hook(lambda m, args, name=name: note(name, m, args[0])))
    found: dict[str, torch.Tensor] = {}
    try:
        yield found
        found.update({name: (total / counts[name]).float() for name, total in sums.items()})
    finally:
        for hook in hooks:
            hook.remove()


def to_rank(factors: Factors, rank: int) -> Factors:
    """
    The nearest product of another rank: padded with zeros, or cut off after the largest singular values. A product
    that is cut is balanced: both factors have the same singular values.
    """
    a, b = factors
    if len(a) <= rank:
        return F.pad(a, (0, 0, 0, rank - len(a))), F.pad(b, (0, rank - len(a)))
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T)
    root = s[:rank].sqrt()
    return (root[:, None] * (v[:rank] @ q_a.T)).float(), ((q_b @ u[:, :rank]) * root).float()


@contextmanager
def in_place_of_experts(model: PeftModel, factors: Mapping[str, Factors]) -> Iterator[None]:
    """Within it the model computes with these products instead of its experts, and reads no profile."""
    adapter_name, _ = exported_adapter(model)

    def add(layer: nn.Module, args: tuple, output: torch.Tensor, pair: Factors) -> torch.Tensor:
        a, b = (factor.to(output.device) for factor in pair)
        return output + F.linear(F.linear(args[0].to(a.dtype), a), b).to(output.dtype)

    hooks = [
        layer.register_forward_hook(lambda m, args, out, pair=factors[name]: add(m, args, out, pair))
        for name, layer in adapted_layers(model, adapter_name).items()
    ]
    try:
        with model.disable_adapter():
            yield
    finally:
        for hook in hooks:
            hook.remove()


def lora_config(model: PeftModel, rank: int) -> LoraConfig:
    """Of a LoRA with this rank in every layer of the active adapter, and scale 1: what all engines read alike."""
    adapter_name, config = exported_adapter(model)
    layers = adapted_layers(model, adapter_name)
    linears = [name for name, module in model.get_base_model().named_modules() if not name.endswith(".base_layer")]
    ends = {name.rpartition(".")[2] for name in layers}
    # By the last part of their names where that says which they are, as engines like it.
    short = all(name in layers for name in linears if name.rpartition(".")[2] in ends)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=sorted(ends if short else layers),
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        task_type=config.task_type or "CAUSAL_LM",
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def save_lora(folder: Path, factors: Mapping[str, Factors], config: LoraConfig, dtype: torch.dtype) -> None:
    """Write the two files of a PEFT LoRA into a folder."""
    tensors = {}
    for name, (a, b) in factors.items():
        for key, value in (("lora_A", a), ("lora_B", b)):
            tensors[f"base_model.model.{name}.{key}.weight"] = value.detach().to("cpu", dtype).contiguous()
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
