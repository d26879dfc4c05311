# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Values of a suite's keys: of the type that a field, or a function's argument, is annotated with, and in range."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_types(part: Any, section: str = "") -> None:
    """
    Bring the values of a frozen dataclass to its fields' types.

    Args:
        part: The dataclass's instance; its values are replaced.
        section (`str`): The suite's key that holds it, for messages; none for the suite itself.

    Raises:
        `ValueError`: A value is of another type; the message names its key.
    """
    hints = get_type_hints(type(part))
    for item in dataclasses.fields(part):
        value = typed(getattr(part, item.name), hints[item.name], f"{section}.{item.name}".lstrip("."))
        object.__setattr__(part, item.name, value)


def check_arguments(
    arguments: Mapping[str, Any], of: Any, section: str, *, known: Collection[str] | None = None
) -> dict[str, Any]:
    """
    Arguments of a function or a class, each of the type that it is annotated with.

    Args:
        arguments (`Mapping`): Name → value.
        of: The function or class.
        section (`str`): Where they are in the suite, for messages.
        known (`Collection[str]`, *optional*): Names that may be given; by default all that are annotated.

    Raises:
        `ValueError`: A name is unknown, or a value of another type; the message names it.
    """
    hints = get_type_hints(of)
    check_keys(arguments, hints if known is None else known, section)
    return {name: typed(value, hints[name], f"{section}.{name}") for name, value in arguments.items()}


def check_keys(content: Iterable[str], known: Collection[str], where: str) -> None:
    """Raise `ValueError`, with what was probably meant, if a key is not among the known ones."""
    for key in content:
        if key not in known:
            raise ValueError(f"Unknown key {key!r} in {where}{nearest(str(key), known)}.")


def nearest(key: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the one that was probably meant, or all."""
    known = list(known)
    near = difflib.get_close_matches(key, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f": it has {', '.join(known)}"


def check_least(part: Any, section: str, **least: int) -> None:
    """Raise `ValueError` if a number of `part` is less than given here, by field."""
    for name, bound in least.items():
        value = getattr(part, name)
        if value < bound:
            raise ValueError(f"`{section}.{name}` is {value}, expected {bound} or more.")


def check_positive(part: Any, section: str, *names: str) -> None:
    """Raise `ValueError` if one of these fields' numbers is not above 0; of a list, any of its numbers."""
    for name in names:
        value = getattr(part, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number <= 0:
                raise ValueError(f"`{section}.{name}` has {number}, expected more than 0.")


def check_lists(part: Any, section: str, *names: str) -> None:
    """Raise `ValueError` if one of these fields' lists is empty, or holds a value twice, as folders' names show it."""
    for name in names:
        values = [f"{value:g}" if isinstance(value, float) else str(value) for value in getattr(part, name)]
        label = f"{section}.{name}".lstrip(".")
        if not values:
            raise ValueError(f"`{label}` is empty.")
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise ValueError(f"`{label}` holds {twice[0]} twice.")


def typed(value: Any, kind: Any, name: str) -> Any:
    """
    A value as an annotation says.

    Text that reads as a number is one where a number is expected: YAML takes `1e-4`, without a dot, for text.

    Args:
        value: What the suite says.
        kind: The annotation; of kinds that a suite doesn't have, any value is taken.
        name (`str`): The key, for the message.

    Raises:
        `ValueError`: It is of another type.
    """
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _one_of(value, kind, name)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"`{name}` is {value!r}, expected one of {', '.join(map(repr, args))}.")
    elif kind in (int, float):
        return _number(value, kind, name)
    elif origin in (list, tuple):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ValueError(f"`{name}` is {value!r}, expected a list.")
        return origin(typed(each, args[0], name) for each in value)
    elif origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"`{name}` is {value!r}, expected a mapping of keys.")
        return {key: typed(each, args[1], f"{name}.{key}") for key, each in value.items()}
    elif kind in (str, bool):
        if not isinstance(value, kind):
            raise ValueError(f"`{name}` is {value!r}, expected {'text' if kind is str else 'true or false'}.")
    return value


def _one_of(value: Any, kind: Any, name: str) -> Any:
    kinds = [each for each in get_args(kind) if each is not NoneType]
    if value is None and len(kinds) < len(get_args(kind)):
        return None
    if len(kinds) == 1:
        return typed(value, kinds[0], name)
    for each in kinds:
        try:
            return typed(value, each, name)
        except ValueError:
            continue
    raise ValueError(f"`{name}` is {value!r}, expected {kind}.")


def _number(value: Any, kind: type, name: str) -> int | float:
    expected = f"`{name}` is {value!r}, expected {'a whole number' if kind is int else 'a number'}."
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            raise ValueError(expected) from None
    if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
        raise ValueError(expected)
    if kind is int or isinstance(number, Integral):
        if number != int(number):
            raise ValueError(expected)
        return int(number)
    return float(number)
