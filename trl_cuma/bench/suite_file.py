# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Reading a suite's YAML file, strictly: what is wrong with it is said before anything runs."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from .arms import Arm, Reference
from .fields import check_keys
from .sources import base_of, data_of
from .suite import MARGINAL, Preferences, Suite, Training, Tuning

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
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file)
        if worlds is not None:
            content = {**_mapping(content, "the suite"), "worlds": list(worlds)}
        if data_path is not None:
            data = _mapping(_mapping(content, "the suite").get("data"), "data")
            content = {**content, "data": {**data, "path": data_path}}
        content = {
            key: _build(_PARTS[key](value), value, key) if key in _PARTS and (key, value) != ("dpo", None) else value
            for key, value in _mapping(content, "the suite").items()
        }
        if not isinstance(content.get("arms"), list):
            raise ValueError(f"`arms` is {content.get('arms')!r}, expected a list.")
        content["arms"] = [_build(Arm, arm, "arms") for entry in content["arms"] for arm in _product(entry)]
        suite = _build(Suite, content, "the suite")
        return suite if arms is None else _only(suite, arms)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
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
    values = []
    for key, value in _mapping(entry, "an arm").items():
        if value == []:
            raise ValueError(f"An arm's `{key}` is an empty list, which stands for no arm.")
        values.append(value if isinstance(value, list) else [value])
    return [dict(zip(entry, chosen, strict=True)) for chosen in itertools.product(*values)]


def _build(kind: type, content: Any, where: str) -> Any:
    fields = {item.name: item for item in dataclasses.fields(kind)}
    check_keys(_mapping(content, where), fields, where)
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in content:
            raise ValueError(f"{where} lacks the key {name!r}.")
    return kind(**content)


def _mapping(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a mapping of keys, got {type(content).__name__}.")
    return content
