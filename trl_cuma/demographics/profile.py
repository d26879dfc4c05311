# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What is known about the person an answer is for: fields, canonical text, missing values."""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

MISSING_VALUES = frozenset(
    {
        "",
        "<na>",
        "decline to answer",
        "decline to state",
        "declined to answer",
        "do not know",
        "don't know",
        "don't know/unsure",
        "dont know",
        "empty string",
        "missing",
        "n/a",
        "nan",
        "no answer",
        "no answer/refused",
        "no answer;missing",
        "no response",
        "not applicable",
        "not asked",
        "not asked in survey",
        "not asked in this country",
        "not available",
        "not known",
        "not specified",
        "not stated",
        "null",
        "other missing",
        "prefer not to answer",
        "prefer not to disclose",
        "prefer not to say",
        "rather not say",
        "refused",
        "refused to answer",
        "undisclosed",
        "unknown",
        "unspecified",
    }
)
"""Texts that say nothing about a person, compared without case, outer blanks and a final `.` or `;`. Survey codes that
begin with `missing;` or `missing,` count as well. Left out on purpose, because they are real answers somewhere:
`none` (religion: none), `na` (the country code of Namibia), `other`, and `not applicable` with its reason."""


@dataclass(frozen=True, repr=False)
class DemographicProfile:
    """
    A person's profile: named fields, or one plain text. Make one with [`DemographicProfile.from_value`].

    Frozen and hashable. Two profiles are equal when the same things are known, whatever the order of the fields and
    whichever unknown fields were listed. `repr` and `str` show field names only, never a value.

    Attributes:
        text (`str`):
            The canonical text, `""` if nothing is known. From fields: `"age: 30; country: JP"`, sorted by field name.
            From a plain text: that text, stripped.
        names (`frozenset[str]`):
            Every field name that was given, those with an unknown value included; empty for a plain text. Not part of
            equality.
    """

    _items: tuple[tuple[str, str], ...]
    text: str
    names: frozenset[str] = field(default=frozenset(), compare=False)

    @classmethod
    def from_value(cls, value: "DemographicProfile | Mapping[str, Any] | str | None") -> "DemographicProfile":
        """
        Read a profile from a mapping of fields, a plain text, a profile, or a missing value (`None`, NaN).

        Field values may be text, numbers or booleans; `30`, `30.0` and `"30"` are the same value, `True` is `"true"`.
        Unknown values ([`MISSING_VALUES`], `None`, NaN) are dropped, so the `None` with which Arrow fills absent
        fields does no harm.

        Args:
            value (`DemographicProfile`, `Mapping[str, Any]`, `str` or `None`):
                What is known about the person.

        Raises:
            TypeError: `value` is neither of these (a list of numbers is a vector, not a profile), a field name is not
                text, or a field's value is nested.
            ValueError: A field name is empty or occurs twice, or a field's value is infinite.
        """
        if isinstance(value, DemographicProfile):
            return value
        if isinstance(value, str):
            text = value.strip()
            return cls((), "" if _is_missing_text(text) else text)
        if _is_missing_object(value):
            return cls((), "")
        if not isinstance(value, Mapping):
            hint = " A list of numbers is a vector, not a profile." if is_vector(value) else ""
            raise TypeError(
                f"A demographic profile is a mapping of fields, a text or None, got {type(value).__name__}.{hint}"
            )
        fields: dict[str, str | None] = {}
        for name, entry in value.items():
            if not isinstance(name, str):
                raise TypeError(f"A field name of a demographic profile is text, got {type(name).__name__}.")
            name = name.strip()
            if not name or name in fields:
                problem = f"the field {name!r} twice" if name else "a field without a name"
                raise ValueError(f"A demographic profile has {problem} (names are compared without outer blanks).")
            fields[name] = _scalar_text(name, entry)
        items = tuple(sorted((name, text) for name, text in fields.items() if text is not None))
        return cls(items, "; ".join(f"{name}: {text}" for name, text in items), frozenset(fields))

    @property
    def fields(self) -> Mapping[str, str]:
        """The known fields, sorted by name; empty when made from a plain text."""
        return dict(self._items)

    @property
    def is_missing(self) -> bool:
        """Whether nothing is known about the person."""
        return not self.text

    def __repr__(self) -> str:
        if self._items:
            return f"DemographicProfile(fields={[name for name, _ in self._items]})"
        return "DemographicProfile(missing)" if self.is_missing else "DemographicProfile(plain text)"


def is_vector(value: Any) -> bool:
    """Whether a dataset value is meant as an embedding (list, tuple, array or tensor) rather than a profile."""
    return isinstance(value, list | tuple | np.ndarray | torch.Tensor)


def read_profiles(values: Iterable[Any]) -> list[DemographicProfile]:
    """
    [`DemographicProfile.from_value`] over many rows; an error names the row.

    Raises:
        TypeError: `values` is a single profile instead of a sequence of them, or a row is not a profile.
        ValueError: A row has a field that cannot be read.
    """
    check_is_sequence(values)
    profiles = []
    for row, value in enumerate(values):
        try:
            profiles.append(DemographicProfile.from_value(value))
        except (TypeError, ValueError) as error:
            raise type(error)(f"Row {row}: {error}") from None
    return profiles


def check_is_sequence(values: Any) -> None:
    """Raise a `TypeError` where one profile was passed instead of a list: a text would be read letter by letter."""
    if values is None or isinstance(values, str | Mapping | DemographicProfile):
        raise TypeError(f"Expected a sequence of demographic profiles, got {type(values).__name__}: pass [profile].")


def _scalar_text(name: str, value: Any) -> str | None:
    """The text of a field's value, or `None` if it says nothing."""
    if isinstance(value, np.generic):
        value = value.item()
    if _is_missing_object(value):
        return None
    if isinstance(value, str):
        text = value.strip()
        return None if _is_missing_text(text) else text
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if math.isinf(value):
            raise ValueError(f"The field {name!r} of a demographic profile is infinite: pass a finite number or None.")
        # A column of integers with gaps arrives as floats: 30.0 is the 30 of a column without gaps.
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, int):
        return str(value)
    raise TypeError(
        f"The field {name!r} of a demographic profile is a {type(value).__name__}: pass text, a number, a boolean or "
        "None (flatten nested values into fields of their own)."
    )


def _is_missing_object(value: Any) -> bool:
    # pandas marks gaps with NA and NaT; naming the types spares a dependency.
    return (
        value is None
        or (isinstance(value, float | np.floating) and math.isnan(value))
        or type(value).__name__ in ("NAType", "NaTType")
    )


@functools.lru_cache(maxsize=4096)  # a data set has many rows and few values
def _is_missing_text(text: str) -> bool:
    text = re.sub("[\N{RIGHT SINGLE QUOTATION MARK}\N{ACUTE ACCENT}`]", "'", text.casefold())
    text = re.sub(r"\s*([/;,])\s*", r"\1", " ".join(text.split())).rstrip(".;")
    return text in MISSING_VALUES or text.startswith(("missing;", "missing,"))
