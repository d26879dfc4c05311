# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
The arms of a benchmark: ways to adapt one base model, at matched trainable parameters or at matched rank.

Parameters are matched to CuMA's (`Reference`) within 2 %: by the rank, with a rank of at most half of each adapted
module's smaller dimension, and where ranks are too coarse by the width of a router or of a FiLM network.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PromptEncoderConfig, get_peft_model
from transformers import PreTrainedModel

from ..adapter import CuMAConfig
from .fields import check_arguments, check_types

TOLERANCE = 0.02
MAX_FILLER = 512
ENCODERS = ("field", "text", "text_uncentred")
OF_THE_BENCH = ("task_type", "target_modules", "lora_alpha")  # fields of an adapter that the tuning or all arms share


@dataclass(frozen=True)
class Method:
    """
    A way to adapt a model.

    Args:
        label (`str`): Name in tables.
        peft (`str`): `"lora"`, `"cuma"`, `"p_tuning"`, or `"full"` for none.
        config (`dict`): Fields of the PEFT configuration that make the method.
        training (`dict`): Fields of the CuMA trainer's arguments.
        filler (`str`, *optional*): Width that makes up for what a whole rank overshoots.
        shuffled (`bool`): Each person's profile vector is another person's, drawn once.
    """

    label: str
    peft: str
    config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    filler: str | None = None
    shuffled: bool = False

    @property
    def reads_profiles(self) -> bool:
        """Whether profiles come to it as vectors."""
        return self.peft == "cuma" and self.config.get("routing") != "semantic"


_NO_BALANCE = {"cuma_aux_loss_coef": 0.0}
METHODS = {
    "lora": Method("LoRA", "lora"),
    "dora": Method("DoRA", "lora", {"use_dora": True}),
    "rslora": Method("rsLoRA", "lora", {"use_rslora": True}),
    # arXiv 2404.19245: one A, several B, all of them mixed by a softmax over the token; no balance loss.
    "hydralora": Method(
        "HydraLoRA form",
        "cuma",
        {"routing": "semantic", "share_a": True, "gate": "soft"},
        _NO_BALANCE,
        filler="router_hidden",
    ),
    # arXiv 2404.15159: top-2 of several LoRAs by the token, gates renormalised, Switch balance loss of 0.01.
    "mixlora": Method("MixLoRA form", "cuma", {"routing": "semantic"}, filler="router_hidden"),
    "cuma_published": Method(
        "CuMA, authors' gate and loss",
        "cuma",
        {"gate": "double_softmax"},
        {"cuma_aux_loss_type": "published"},
        filler="router_hidden",
    ),
    "film": Method(
        "LoRA + FiLM",
        "cuma",
        {"num_experts": 1, "top_k": 1, "routing": "demographic"},
        _NO_BALANCE,
        filler="film_hidden",
    ),
    "cuma": Method("CuMA", "cuma", filler="router_hidden"),
    "cuma_shuffled": Method("CuMA, shuffled profiles", "cuma", filler="router_hidden", shuffled=True),
    "full": Method("full fine-tuning", "full"),
    "p_tuning": Method("P-tuning", "p_tuning"),
}


@dataclass(frozen=True)
class Arm:
    """
    One arm of a suite.

    Args:
        method (`str`): A key of `METHODS`.
        matched (`str`): `"parameters"`, `"rank"` or `"none"` (full fine-tuning, P-tuning).
        prompt_profile (`bool`): Whether the prompt states the profile.
        name (`str`, *optional*): Name of its own, where two arms differ in `config` or `training` only.
        config (`dict`): Fields of the PEFT configuration on top of the method's.
        training (`dict`): Fields of the CuMA trainer's arguments on top of the method's.
        encoder (`str`): `"field"`; `"text"` for the suite's sentence encoder; `"text_uncentred"` for the same with
            the mean left in, as in the authors' code.
    """

    method: str
    matched: str = "parameters"
    prompt_profile: bool = False
    name: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    encoder: str = "field"

    def __post_init__(self) -> None:
        check_types(self, "arms")
        if self.method not in METHODS:
            raise ValueError(f"An arm's `method` is {self.method!r}, expected one of {', '.join(METHODS)}.")
        matchings = ("none",) if self.of.peft in ("full", "p_tuning") else ("parameters", "rank")
        if self.matched not in matchings:
            raise ValueError(f"Arm {self.method!r} has `matched` {self.matched!r}, expected one of {matchings}.")
        if self.encoder not in ENCODERS:
            raise ValueError(f"Arm {self.method!r} has `encoder` {self.encoder!r}, expected one of {ENCODERS}.")
        for key in ("config", "training"):
            if getattr(self, key) and self.of.peft != "cuma":
                raise ValueError(f"Arm {self.method!r} has `{key}`, which belongs to the CuMA adapter.")
        given = (*OF_THE_BENCH, "r", self.of.filler)  # the last two by what the arm is matched to
        config = _adapter_fields(self.config, f"arms.{self.key}.config", given)
        object.__setattr__(self, "config", config)
        if self.training:
            from trl import SFTConfig

            from ..trainers.config import CuMASFTConfig

            # What TRL has is the same for every arm.
            own = {item.name for item in fields(CuMASFTConfig)} - {item.name for item in fields(SFTConfig)}
            training = check_arguments(self.training, CuMASFTConfig, f"arms.{self.key}.training", known=sorted(own))
            object.__setattr__(self, "training", training)

    @property
    def of(self) -> Method:
        """Its method."""
        return METHODS[self.method]

    @property
    def key(self) -> str:
        """What tells arms apart, in file names and in `compare`."""
        parts = [self.name or self.method, {"parameters": "", "rank": "rank", "none": ""}[self.matched]]
        return "-".join([part for part in parts if part] + (["prompt"] if self.prompt_profile else []))

    @property
    def label(self) -> str:
        """Its name in tables."""
        own = f" ({self.name.replace('_', ' ')})" if self.name else ""
        return f"{self.of.label}{own}{', profile in prompt' if self.prompt_profile else ''}"

    @cached_property
    def adapter_fields(self) -> dict[str, Any]:
        """What makes its adapter, over the reference's fields."""
        return {**self.of.config, **self.config}


def _adapter_fields(config: dict[str, Any], where: str, given: Container[str | None]) -> dict[str, Any]:
    """Checked fields of `CuMAConfig`, but for those that are given to it otherwise."""
    for name in config:
        if name in given:
            raise ValueError(f"`{where}` has {name!r}, which the benchmark sets. Leave it out.")
    return check_arguments(config, CuMAConfig, where, known=[item.name for item in fields(CuMAConfig)])


@dataclass(frozen=True)
class Reference:
    """
    CuMA's adapter, whose trainable parameters and rank are the other arms' budget.

    Args:
        config (`dict`): Fields of `CuMAConfig`: `r`, `num_experts`, `top_k`, `router_hidden`, …
        target_modules (`list[str]`): Layers that every arm adapts.
    """

    config: dict[str, Any]
    target_modules: list[str]

    def __post_init__(self) -> None:
        check_types(self, "reference")
        config = _adapter_fields(self.config, "reference.config", OF_THE_BENCH)
        object.__setattr__(self, "config", config)
        if "r" not in config:
            raise ValueError("`reference.config` lacks the key 'r', the rank of CuMA's experts.")
        if not self.target_modules:
            raise ValueError("`reference.target_modules` is empty.")

    def check(self, arm: Arm) -> None:
        """Raise `ValueError` if an arm's fields and these don't go together, whatever the base model is."""
        if arm.of.peft in ("lora", "cuma"):
            try:
                self._maker(arm, 1.0)(self.config["r"], self.config.get("router_hidden", 1))  # some width
            except ValueError as error:
                raise ValueError(f"Arm {arm.key!r}: {error}") from None

    def adapter(
        self, arm: Arm, model: PreTrainedModel, dims: Mapping[str, int], alpha_ratio: float
    ) -> tuple[PeftConfig | None, int]:
        """
        An arm's PEFT configuration, and how many parameters it trains.

        Args:
            arm (`Arm`): The arm.
            model (`PreTrainedModel`): The base model; only its shapes are read.
            dims (`Mapping[str, int]`): Length of a profile's vector, by encoder; `"field"` is the budget's.
            alpha_ratio (`float`): `lora_alpha / r`.

        Raises:
            `ValueError`: The reference's rank is more than half of some module's smaller dimension, or no rank up to
                that comes within 2 % of the budget.
        """
        dim = dims[arm.encoder]
        with torch.device("meta"):
            model = type(model)(model.config)  # a quantized base's own weights are packed
        if arm.of.peft == "full":
            return None, model.num_parameters()
        if arm.of.peft == "p_tuning":
            config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=16, encoder_hidden_size=64)
            return config, self._count(model, config, dim)
        most = self._most(model)
        if self.config["r"] > most:
            raise ValueError(
                f"`reference.config.r` is {self.config['r']}, and a rank may be at most {most}, half of the smallest "
                "adapted dimension. Choose a lower one."
            )
        reference = self._maker(Arm("cuma"), 1.0)(self.config["r"], None)
        wanted = reference.router_hidden  # given or not
        make = self._maker(arm, alpha_ratio)
        plain = make(self.config["r"], wanted)
        is_reference = arm.method in ("cuma", "cuma_shuffled") and not arm.adapter_fields and arm.encoder == "field"
        if arm.matched == "rank" or is_reference:
            return plain, self._count(model, plain, dim)
        goal = self._count(model, reference, dims["field"])
        close = [
            (count, r, width)
            for count, r, width in self._sizes(model, dim, make, arm.of.filler, goal)
            if abs(count / goal - 1) <= TOLERANCE
        ]
        if not close:
            raise ValueError(
                f"Arm {arm.key!r} can't have CuMA's {goal:,} parameters within {TOLERANCE:.0%} with a rank of at most "
                f"{most}, half of the smallest adapted dimension. Change the reference's `r`, "
                "`num_experts` or `router_hidden`."
            )
        # What is left to choose: routers and FiLM networks as wide as CuMA's, as nearly as may be.
        _, r, width = min(close, key=lambda one: (abs(math.log((one[2] or wanted) / wanted)), abs(one[0] - goal)))
        config = make(r, width)
        return config, self._count(model, config, dim)

    def _maker(self, arm: Arm, alpha_ratio: float) -> Any:
        """(rank, width of the filler) → configuration."""

        def make(r: int, filler: int | None) -> PeftConfig:
            common = {
                "task_type": "CAUSAL_LM",
                "target_modules": list(self.target_modules),
                "r": r,
                "lora_alpha": alpha_ratio * r,
            }
            if arm.of.peft == "lora":
                return LoraConfig(**common, **arm.adapter_fields)
            # A held-out person of whom the training people's encoder knows nothing is answered like the average one.
            fields = {"missing_demographics": "zero", **self.config, **arm.adapter_fields, **common}
            if fields.get("routing") == "semantic":
                fields.pop("demographic_projection", None)
            if filler is not None and arm.of.filler:
                fields[arm.of.filler] = filler
            return CuMAConfig(**fields)

        return make

    def _sizes(
        self, model: PreTrainedModel, dim: int, make: Any, filler: str | None, goal: int
    ) -> list[tuple[int, int, int | None]]:
        """
        Count, rank and the filler's width for every rank, with the width that comes nearest to the goal. A count is
        affine in the rank and in the width, so that four counts tell all of them.
        """

        def count(r: int, width: int | None) -> int:
            return self._count(model, make(r, width), dim)

        ranks = range(1, self._most(model) + 1)
        if filler is None:
            one, two = count(1, None), count(2, None)
            return [(one + (r - 1) * (two - one), r, None) for r in ranks]
        corners = {(r, width): count(r, width) for r in (1, 2) for width in (1, 2)}
        sizes = []
        for r in ranks:
            one, two = (corners[1, w] + (r - 1) * (corners[2, w] - corners[1, w]) for w in (1, 2))
            width = min(max(1, round(1 + (goal - one) / (two - one))), MAX_FILLER)
            sizes.append((one + (width - 1) * (two - one), r, width))
        return sizes

    def _most(self, model: PreTrainedModel) -> int:
        shapes = [
            min(module.weight.shape)
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in self.target_modules
        ]
        if not shapes:
            raise ValueError(f"The base model has no module named as in `target_modules`: {self.target_modules}.")
        return math.floor(min(shapes) / 2)

    @staticmethod
    def _count(model: PreTrainedModel, config: PeftConfig, demographic_dim: int) -> int:
        with torch.device("meta"):
            like = type(model)(model.config)
            fields = config.to_dict() | {"inference_mode": False}
            if isinstance(config, CuMAConfig):
                fields["demographic_dim"] = demographic_dim
            return get_peft_model(like, type(config)(**fields)).get_nb_trainable_parameters()[0]
