# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Where the routers send each profile's tokens, on prompts that all profiles share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..adapter import CuMAConfig
from ..adapter.router import CuMARouter

Prompt = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class ProfileRouting:
    """
    Means over prompts, of each prompt's mean over its tokens.

    Attributes:
        routers (`list[str]`): `"layer.module"` of each router (the first module of a group that shares one), or the
            modules' full names where these don't tell them apart.
        load (`np.ndarray` of shape `(profiles, routers, experts)`): the share of the assignments that an expert gets;
            sums to 1.
        gate (`np.ndarray` of the same shape): its mean gate, with which its output is weighted.
    """

    routers: list[str]
    load: np.ndarray
    gate: np.ndarray


@torch.no_grad()
def route_profiles(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    embeds: torch.Tensor,
    *,
    batch_size: int = 32,
    show_progress: bool = False,
) -> ProfileRouting:
    """
    Every profile with every prompt, in batches of similar length. With `routing="demographic"` the tokens decide
    nothing, and one prompt stands for all.

    Args:
        model (`PeftModel`): with a CuMA adapter.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompts (`Sequence`): texts, which get the tokenizer's special tokens, or conversations (lists of messages),
            which get its chat template; as TRL's trainers do.
        embeds (`torch.Tensor` of shape `(profiles, demographic_dim)`): one row per profile.
        batch_size (`int`): rows per forward.
        show_progress (`bool`): show a progress bar.

    Raises:
        TypeError: if the model has no active CuMA adapter.
        ValueError: if nothing is routed by profile, or there is no prompt, or an empty one.
    """
    config = routing_config(model)
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    empty = [number for number, tokens in enumerate(encoded) if not tokens]
    if empty or not encoded:
        raise ValueError(f"`prompts` is empty{f' at {empty}' if empty else ''}. Pass prompts to route.")
    if config.routing == "demographic":
        encoded = [min(encoded, key=len)]
    encoded.sort(key=len)
    pairs = [(prompt, profile) for prompt in range(len(encoded)) for profile in range(len(embeds))]
    device = next(model.parameters()).device
    base = model.get_base_model()
    # The answers don't matter: where the model allows it, one token's logits instead of all.
    extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    called: dict[CuMARouter, str] = {}  # in the order of their first calls, which is the statistics'
    names = {module: name for name, module in base.named_modules() if isinstance(module, CuMARouter)}

    def note(router: CuMARouter, *_: Any) -> None:
        called.setdefault(router, names[router])

    hooks = [router.register_forward_hook(note) for router in names]
    totals: list[torch.Tensor] = []
    was_training = model.training
    model.eval()
    try:
        batches = range(0, len(pairs), batch_size)
        for start in tqdm(batches, desc="Routing profiles", unit="batch", disable=not show_progress):
            chosen = pairs[start : start + batch_size]
            rows = [torch.tensor(encoded[prompt]) for prompt, _ in chosen]
            lengths = torch.tensor([[len(row)] for row in rows])
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            profiles = torch.tensor([profile for _, profile in chosen])
            outputs = model(
                input_ids=ids.to(device),
                attention_mask=(torch.arange(ids.shape[1]) < lengths).long().to(device),
                demographic_embeds=embeds[profiles].to(device),
                output_routing_by_profile=True,
                use_cache=False,
                **extra,
            )
            found = [outputs[name].cpu().double() for name in ("router_load", "router_gate")]
            totals = totals or [each.new_zeros(len(embeds), *each.shape[1:]) for each in found]
            for total, each in zip(totals, found, strict=True):
                total.index_add_(0, profiles, each)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    load, gate = (total.numpy() / len(encoded) for total in totals)
    return ProfileRouting(_short_names(list(called.values())), load, gate)


def routing_config(model: PeftModel) -> CuMAConfig:
    """
    The configuration of the model's active CuMA adapter.

    Raises:
        TypeError: if there is none.
        ValueError: if it routes nobody by profile: nothing would be there to map.
    """
    configs = [model.peft_config[name] for name in model.active_adapters] if isinstance(model, PeftModel) else []
    config = next((config for config in configs if isinstance(config, CuMAConfig)), None)
    if config is None:
        raise TypeError(f"The topology is a CuMA adapter's, got a {type(model).__name__} without an active one.")
    if config.routing == "semantic":
        raise ValueError(
            "With `routing='semantic'` the routers read no profile: everybody is routed alike, and there is no "
            "topology to map. Pass an adapter with `routing='joint'` or `'demographic'`."
        )
    if config.num_experts == 1:
        raise ValueError(
            "With `num_experts=1` one expert serves everybody: there is no topology to map. Pass an adapter with more."
        )
    return config


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    asks = bool(prompt) and prompt[-1]["role"] != "assistant"
    return tokenizer.apply_chat_template(list(prompt), add_generation_prompt=asks, return_dict=True)["input_ids"]


def _short_names(names: list[str]) -> list[str]:
    full = [name.partition(".cuma_router.")[0] for name in names]
    parts = [name.split(".") for name in full]
    layers = [next((part for part in each if part.isdigit()), "") for each in parts]
    short = [f"{layer}.{each[-1]}" if layer else each[-1] for layer, each in zip(layers, parts, strict=True)]
    return short if len(set(short)) == len(short) else full
