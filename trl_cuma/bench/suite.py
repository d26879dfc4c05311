# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`suite.yaml`: what a benchmark compares, on what, and how it is tuned."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from .arms import Arm, Reference

MARGINAL = "marginal"  # in `compare`: the training marginal instead of an arm


@dataclass(frozen=True)
class Data:
    """
    The survey that a world is drawn from.

    Args:
        source (`str`): `"simulated"` or `"global_opinions"`.
        path (`str`, *optional*): GlobalOpinionQA's file.
        args (`dict`): Arguments of `simulate_survey`, or of `load_global_opinions`.
        cells (`int`): Evaluated cells per split, a uniform sample.
        validation_answers (`int`): Answers of the validation split that settings and steps are chosen on.
    """

    source: str
    path: str | None = None
    args: dict[str, Any] = field(default_factory=dict)
    cells: int = 400
    validation_answers: int = 1000

    def __post_init__(self) -> None:
        if self.source not in ("simulated", "global_opinions"):
            raise ValueError(f"`data.source` is {self.source!r}, expected 'simulated' or 'global_opinions'.")
        if (self.path is None) != (self.source == "simulated"):
            raise ValueError("`data.path` names GlobalOpinionQA's file, and a simulated survey has none.")


@dataclass(frozen=True)
class Base:
    """
    The base model that is pretrained in every world, see `trl_cuma.quickstart.language_model`.

    Args:
        model (`dict`): Arguments of `trl_cuma.testing.tiny_model`.
        steps, batch_size (`int`), learning_rate (`float`): Of its pretraining.
    """

    model: dict[str, Any]
    steps: int = 400
    batch_size: int = 64
    learning_rate: float = 3e-3


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
        data (`Data`), base (`Base`), training (`Training`), tuning (`Tuning`): What every arm shares.
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
    data: Data
    base: Base
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

    def arm(self, key: str) -> Arm:
        """The arm with this key."""
        for arm in self.arms:
            if arm.key == key:
                return arm
        raise ValueError(f"There is no arm {key!r}{_nearest(key, [arm.key for arm in self.arms])}.")


_PARTS = {
    "data": Data,
    "base": Base,
    "training": Training,
    "tuning": Tuning,
    "reference": Reference,
    "dpo": Preferences,
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
            key: _build(_PARTS[key], value, key) if key in _PARTS and value is not None else value
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
