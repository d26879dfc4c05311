# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Profiles that people type: read, and held against what an adapter knows. No text here repeats a person's values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..demographics import DemographicProfile, DemographicTable, FieldEncoder

AS_JSON = """Where a value contains a comma, write JSON: '{"country": "Korea, South", "age": "25-34"}'."""


def parse_profile(text: str, what: str = "The profile") -> Any:
    """
    A profile as it is typed: `country=Kenya,age=25-34`, or JSON: an object of fields, or a string for an adapter that
    was trained on plain texts. Blanks around names and values don't count; nothing at all is a missing profile.

    Args:
        text (`str`): What was typed.
        what (`str`): What errors call it.

    Raises:
        ValueError: It is neither; the message repeats no value.
    """
    text = text.strip()
    if not text:
        return None
    if text[0] in '{["':
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{what} is no JSON: {error.msg} at character {error.pos + 1}.") from None
        try:
            DemographicProfile.from_value(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{what}: {error}") from None
        return value
    profile: dict[str, str] = {}
    for number, part in enumerate(text.split(","), start=1):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name:
            raise ValueError(f"{what}: part {number}, between commas, is no `field=value`. {AS_JSON}")
        if name in profile:
            raise ValueError(f"{what} has the field {name!r} twice. Give each field once.")
        profile[name] = value
    return profile


def known_values(table: DemographicTable | None) -> Mapping[str, list[str]] | None:
    """Of each field that a field encoder knows, its values; `None` where any text can be read, or none is."""
    encoder = None if table is None else table.encoder
    return encoder.state()["vocabulary"] if isinstance(encoder, FieldEncoder) else None


def unknown_fields(table: DemographicTable | None, value: Any) -> list[str]:
    """The fields of a profile that a field encoder doesn't know; other encoders know them all."""
    known = known_values(table)
    return [] if known is None else sorted(DemographicProfile.from_value(value).names - known.keys())


def check_profile(table: DemographicTable | None, value: Any, what: str = "The profile") -> list[str]:
    """
    Hold a profile against what the adapter knows of people.

    Args:
        table ([`DemographicTable`], *optional*): Of the model, see [`demographic_table`]; `None` if it reads none.
        value (`Any`): The profile.
        what (`str`): What the messages call it.

    Returns:
        `list[str]`: Warnings: fields that the adapter doesn't know, and fields whose value it doesn't know, with what
        it does know. Such a value counts as not given.

    Raises:
        TypeError: It is no profile.
        ValueError: It can't be used: none is needed, or one is and it is missing, or it has no field that the adapter
            knows. The message names the fields that it knows.
    """
    profile = DemographicProfile.from_value(value)
    if table is None:
        if profile.is_missing:
            return []
        raise ValueError(f"{what} can't be used: the model reads no profile. Leave it out.")
    known = known_values(table)
    if known is None:  # a text encoder, which reads any text
        if profile.is_missing and table.missing == "error":
            raise ValueError(f"{what} is missing, and the adapter needs one.")
        return []
    fields = f"It knows the fields {', '.join(known)}."
    if not profile.is_missing and not profile.fields:
        raise ValueError(f"{what} is a plain text, and the adapter reads fields. {fields}")
    if known.keys().isdisjoint(profile.names) and profile.names:
        raise ValueError(f"{what} has no field that the adapter knows. {fields}")
    if known.keys().isdisjoint(profile.fields) and table.missing == "error":
        raise ValueError(f"{what} is missing or says nothing, and the adapter needs one. {fields}")
    warnings = []
    unknown = unknown_fields(table, profile)
    if unknown:
        warnings.append(f"{what} has {_fields(unknown)}, which the adapter doesn't know and leaves out. {fields}")
    strange = list(table.encoder.count_unknown([profile]))
    for name in strange:
        warnings.append(
            f"{what} has a value of the field {name} that the adapter doesn't know; it counts as not given. It knows "
            f"{'; '.join(known[name])}."
        )
    if strange and len(strange) == len(known.keys() & profile.fields.keys()):
        warnings.append(f"{what} has no value that the adapter knows: the answer is for nobody in particular.")
    return warnings


def _fields(names: list[str]) -> str:
    return f"the field{'s' if len(names) > 1 else ''} {', '.join(names)}"
