# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`suite.yaml`: what a benchmark compares, on what, and how it is tuned."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from .arms import Arm, Reference
from .sources import Base, Data, GivenBase, PreparedData, base_of, data_of

MARGINAL = "marginal"  # in `compare`: the training marginal instead of an arm


@dataclass(frozen=True)
class Training:
    """
    SFT, the same for every arm: a constant learning rate after the warmup, so that a run of `2 · steps` holds the run
    of `steps`.

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
        object.__setattr__(self, "factors", tuple(self.factors))
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
        for name in ("worlds", "learning_rates", "alphas"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not getattr(self, name):
                raise ValueError(f"`{name}` of a suite's tuning is empty.")


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
        for name in ("arms", "learning_rates"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


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
        object.__setattr__(self, "worlds", tuple(self.worlds))
        keys = [arm.key for arm in self.arms]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise ValueError(f"Two arms are called {twice[0]!r}. Give them a `name`.")
        for key in itertools.chain(*self.compare, self.dpo.arms if self.dpo else ()):
            if key != MARGINAL:
                self.arm(key)
        for arm in self.arms:
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
        raise ValueError(f"There is no arm {key!r}{_nearest(key, [arm.key for arm in self.arms])}.")


_PARTS: dict[str, Callable[[Any], type]] = {
    "data": data_of,
    "base": base_of,
    "training": lambda _: Training,
    "tuning": lambda _: Tuning,
    "reference": lambda _: Reference,
    "dpo": lambda _: Preferences,
}


def read_suite(
    path: str | os.PathLike[str],
    *,
    worlds: Sequence[int] | None = None,
    arms: Sequence[str] | None = None,
    data_path: str | None = None,
) -> Suite:
    """
    Read a suite.

    Args:
        path (`str` or `PathLike`): The YAML file.
        worlds (`Sequence[int]`, *optional*): Instead of the suite's `worlds`.
        arms (`Sequence[str]`, *optional*): Keep only the arms with these keys, and the comparisons between them.
        data_path (`str`, *optional*): Instead of the suite's `data.path`.

    Raises:
        `ValueError`: A key is unknown or missing, or a value out of its range; the message names file and key.
    """
    with open(path, encoding="utf-8") as file:
        content = yaml.safe_load(file)
    try:
        if worlds is not None:
            content = {**_mapping(content, "the suite"), "worlds": worlds}
        if data_path is not None:
            data = _mapping(_mapping(content, "the suite").get("data"), "data")
            content = {**content, "data": {**data, "path": data_path}}
        content = {
            key: _build(_PARTS[key](value), value, key) if key in _PARTS and value is not None else value
            for key, value in _mapping(content, "the suite").items()
        }
        content["arms"] = [_build(Arm, arm, "arms") for entry in content.get("arms", []) for arm in _product(entry)]
        suite = _build(Suite, content, "the suite")
        return suite if arms is None else _only(suite, arms)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _only(suite: Suite, keys: Sequence[str]) -> Suite:
    for key in keys:
        suite.arm(key)
    dpo = None
    if suite.dpo is not None and any(key in keys for key in suite.dpo.arms):
        dpo = dataclasses.replace(suite.dpo, arms=tuple(key for key in suite.dpo.arms if key in keys))
    return dataclasses.replace(
        suite,
        arms=[arm for arm in suite.arms if arm.key in keys],
        compare=[pair for pair in suite.compare if set(pair) <= {*keys, MARGINAL}],
        dpo=dpo,
    )


def _product(entry: dict[str, Any]) -> list[dict[str, Any]]:
    values = [value if isinstance(value, list) else [value] for value in _mapping(entry, "an arm").values()]
    return [dict(zip(entry, chosen, strict=True)) for chosen in itertools.product(*values)]


def _build(kind: type, content: Any, where: str) -> Any:
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for key in _mapping(content, where):
        if key not in fields:
            raise ValueError(f"Unknown key {key!r} in {where}{_nearest(key, fields)}.")
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in content:
            raise ValueError(f"{where} lacks the key {name!r}.")
    return kind(**content)


def _mapping(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a mapping of keys, got {type(content).__name__}.")
    return content


def _nearest(key: str, known: Any) -> str:
    near = difflib.get_close_matches(key, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else f": it has {', '.join(known)}"
