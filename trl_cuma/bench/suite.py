# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`suite.yaml`: what a benchmark compares, on what, and how it is tuned."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields

from .arms import Arm, Reference
from .fields import check_least, check_lists, check_positive, check_types, nearest
from .sources import Base, Data, GivenBase, PreparedData

MARGINAL = "marginal"  # in `compare`: the training marginal instead of an arm


@dataclass(frozen=True)
class Training:
    """
    SFT, the same for every arm: a constant learning rate after the warmup, so that a longer run reports every budget,
    from the weights that it had by then. It is not a run of that budget gone on: the trainer shuffles all rows of a
    run, so that after `steps` of `2 · steps` an arm has seen other rows than in a tuning run of `steps`.

    Args:
        steps (`int`): The budget.
        batch_size (`int`): Rows per step.
        select_every (`int`): Steps between two looks at the validation answers; the best look's weights are kept.
        factors (`tuple[int, ...]`): Budgets that are reported, as multiples of `steps`.
        warmup_steps (`int`): Steps until the full learning rate.
    """

    steps: int = 400
    batch_size: int = 64
    select_every: int = 100
    factors: tuple[int, ...] = (1, 2)
    warmup_steps: int = 20

    def __post_init__(self) -> None:
        check_types(self, "training")
        check_least(self, "training", steps=1, batch_size=1, select_every=1, warmup_steps=0)
        check_lists(self, "training", "factors")
        check_positive(self, "training", "factors")
        if self.steps % self.select_every:
            raise ValueError(f"`steps` ({self.steps}) must be a multiple of `select_every` ({self.select_every}).")


@dataclass(frozen=True)
class Tuning:
    """
    Every arm's settings are chosen from the same grid, by the log-loss of validation answers, averaged over worlds.

    Args:
        worlds (`tuple[int, ...]`): Seeds of the worlds.
        learning_rates (`tuple[float, ...]`): The grid.
        alphas (`tuple[float, ...]`): The grid of `lora_alpha / r`; the first one alone where an arm has none.
    """

    worlds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    alphas: tuple[float, ...] = (2.0,)

    def __post_init__(self) -> None:
        check_types(self, "tuning")
        check_lists(self, "tuning", "worlds", "learning_rates", "alphas")
        check_positive(self, "tuning", "learning_rates", "alphas")


@dataclass(frozen=True)
class Preferences:
    """
    DPO from the SFT checkpoint of the first budget: the person's answer over another option, drawn uniformly.

    Args:
        arms (`tuple[str, ...]`): Keys of the arms.
        learning_rates (`tuple[float, ...]`): The grid, chosen by the pair log-loss of validation answers.
        steps, batch_size (`int`), beta (`float`): Of DPO.
    """

    arms: tuple[str, ...]
    learning_rates: tuple[float, ...]
    steps: int = 100
    batch_size: int = 32
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_types(self, "dpo")
        check_lists(self, "dpo", "arms", "learning_rates")
        check_least(self, "dpo", steps=1, batch_size=1)
        check_positive(self, "dpo", "learning_rates", "beta")


@dataclass(frozen=True)
class Suite:
    """
    A benchmark.

    Args:
        name (`str`): Its name, in the tables' titles.
        data (`Data` or `PreparedData`), base (`Base` or `GivenBase`), training (`Training`), tuning (`Tuning`): What
            every arm shares.
        reference (`Reference`): CuMA's adapter, whose size is the budget.
        worlds (`tuple[int, ...]`): Seeds of the worlds that are reported.
        arms (`list[Arm]`): In the YAML, a value that is a list stands for one arm per item.
        compare (`list[list[str]]`): Pairs of arm keys; the first is measured against the second, paired by world.
            The second may be `"marginal"`: the training marginal.
        dpo (`Preferences`, *optional*): Also train and measure by DPO.
        text_encoder (`str`, *optional*): Path or id of the sentence encoder of arms that have one; `"minilm"` for the
            one that the `test` extra installs.
    """

    name: str
    data: Data | PreparedData
    base: Base | GivenBase
    training: Training
    tuning: Tuning
    reference: Reference
    worlds: tuple[int, ...]
    arms: list[Arm]
    compare: list[list[str]] = field(default_factory=list)
    dpo: Preferences | None = None
    text_encoder: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_lists(self, "", "worlds")
        if not self.arms:
            raise ValueError("`arms` is empty.")
        keys = [arm.key for arm in self.arms]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"Two arms are called {twice[0]!r}. Give them a `name`.")
        for pair in self.compare:
            if len(pair) != 2 or pair[0] == pair[1]:
                raise ValueError(f"`compare` holds {pair}, expected the keys of two different arms.")
        for key in itertools.chain(*self.compare):
            if key != MARGINAL:
                self.arm(key)
        if self.dpo is not None:
            self._check_dpo(self.dpo)
        for arm in self.arms:
            self.reference.check(arm)
            if arm.encoder != "field" and self.text_encoder is None:
                raise ValueError(f"Arm {arm.key!r} has `encoder: {arm.encoder}`, and the suite no `text_encoder`.")
        if isinstance(self.base, GivenBase):
            self._check_base(self.base)
        if isinstance(self.data, PreparedData):
            self._check_prepared(self.data)
        elif isinstance(self.base, GivenBase):
            raise ValueError(
                f"`base.path` names a base model, and `data.source: {self.data.source}` pretrains a tiny one in each "
                "world. Give `base.model`."
            )

    def _check_dpo(self, dpo: Preferences) -> None:
        from ..trainers.config import CuMADPOConfig

        known = {item.name for item in fields(CuMADPOConfig)}
        for key in dpo.arms:
            arm = self.arm(key)
            if arm.of.peft not in ("lora", "cuma"):
                raise ValueError(
                    f"`dpo.arms` names {key!r}, and DPO goes on from a LoRA's or CuMA's checkpoint, which "
                    f"`method: {arm.method}` has not. Leave it out there."
                )
            for name in arm.training:
                if name not in known:
                    raise ValueError(
                        f"`dpo.arms` names {key!r}, whose `training` has {name!r}, which DPO doesn't know. Leave it "
                        "out there."
                    )
        if self.training.factors[0] != 1:
            raise ValueError(
                f"`training.factors` is {list(self.training.factors)}: with `dpo`, which goes on from the first "
                "budget's checkpoint, and is tuned from runs of 1, the first must be 1."
            )

    def _check_base(self, base: GivenBase) -> None:
        if base.micro_batch_size is not None and (
            base.micro_batch_size < 1 or self.training.batch_size % base.micro_batch_size
        ):
            raise ValueError(
                f"`base.micro_batch_size` is {base.micro_batch_size}, expected a divisor of `training.batch_size` "
                f"({self.training.batch_size})."
            )
        for arm in self.arms:
            if arm.of.peft == "full" and base.load_in_4bit:
                raise ValueError(f"Arm {arm.key!r} trains the base, which `load_in_4bit` quantizes. Leave one out.")

    def _check_prepared(self, data: PreparedData) -> None:
        if not isinstance(self.base, GivenBase):
            raise ValueError("`data.source: prepared` needs a base model that can read it: give `base.path`.")
        if self.dpo is not None:
            raise ValueError(
                "`dpo` is measured on the exact option distributions of the simulated survey and of GlobalOpinionQA, "
                "which `data.source: prepared` doesn't have. Leave `dpo` out."
            )
        for arm in self.arms:
            if arm.prompt_profile and data.prompt_path is None:
                raise ValueError(
                    f"Arm {arm.key!r} has `prompt_profile: true`, and `data` no `prompt_path`. Name the folder of the "
                    "same rows with the profile in the prompt (`trl-cuma prepare … --demographics system`)."
                )

    def arm(self, key: str) -> Arm:
        """The arm with this key."""
        for arm in self.arms:
            if arm.key == key:
                return arm
        raise ValueError(f"There is no arm {key!r}{nearest(key, [arm.key for arm in self.arms])}.")
