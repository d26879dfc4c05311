# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What both encoders share: a state that cannot change unnoticed, and the error for rows of which nothing is known."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal, get_args

MissingPolicy = Literal["error", "zero"]


def fingerprint_of(state: dict[str, Any]) -> str:
    """The sha256 of the state's canonical JSON, without the fingerprint itself."""
    content = {key: value for key, value in state.items() if key != "fingerprint"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def check_state(state: dict[str, Any], kind: str, keys: set[str]) -> None:
    """
    Raise a `ValueError` unless `state` is the complete, unchanged state of an encoder of type `kind`.

    Args:
        state (`dict[str, Any]`): The state, as an encoder's `state()` returned it.
        kind (`str`): The value that `state["type"]` must have.
        keys (`set[str]`): The keys beside `type` and `fingerprint`.
    """
    if state.get("type") != kind:
        raise ValueError(f"The encoder state has type {state.get('type')!r}, expected {kind!r}.")
    expected = keys | {"type", "fingerprint"}
    if state.keys() != expected:
        raise ValueError(
            f"The encoder state lacks {sorted(expected - state.keys())} and has unknown keys "
            f"{sorted(state.keys() - expected)}: pass exactly what `state()` returned."
        )
    if fingerprint_of(state) != state["fingerprint"]:
        raise ValueError(
            "The encoder state does not match its fingerprint, it was changed after it was saved: restore the saved "
            "state or fit a new encoder."
        )


def check_missing_policy(missing: str) -> None:
    """Raise a `ValueError` unless `missing` is `"error"` or `"zero"`."""
    if missing not in get_args(MissingPolicy):
        raise ValueError(f"`missing` is {missing!r}, expected one of {get_args(MissingPolicy)}.")


def missing_error(rows: Sequence[int]) -> ValueError:
    """The error for rows without any known profile field, naming them."""
    return ValueError(
        f"Nothing is known about the person in {name_rows(rows)}: fill in the profile, drop the rows, or choose "
        '"zero" for missing profiles (the average profile of a text encoder, no known field of a field encoder).'
    )


def name_rows(rows: Sequence[int]) -> str:
    """`rows 1, 5, 7 …`: the first ten of them, then the count."""
    shown = ", ".join(str(row) for row in rows[:10])
    rest = f" and {len(rows) - 10} more" if len(rows) > 10 else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{rest}"
