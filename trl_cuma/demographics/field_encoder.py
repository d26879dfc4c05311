# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Profiles with named fields to multi-hot vectors."""

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from .encoder_state import (
    MissingPolicy,
    check_missing_policy,
    check_state,
    fingerprint_of,
    missing_error,
    name_rows,
)
from .profile import DemographicProfile, read_profiles


class FieldEncoder:
    """
    A multi-hot vector over (field, value) pairs: one dimension per pair that enough people share.

    Deterministic and without weights of its own: the adapter's trainable projection holds the learned vectors. A value
    that is missing, unknown or rarer than `min_count` is zero, so it never meets an untrained weight, and a rare value
    is never stored. A profile whose fields are known but whose values all are not is therefore a row of zeros.

    An entry is 0 or `sqrt(dim / fields)`, so that the vector of a complete profile has a root mean square of 1, as a
    text encoder's has: the router meets both on one scale.

    Args:
        min_count (`int`, defaults to `30`):
            How many people must share a value for it to get a dimension. A field without such a value vanishes.
    """

    def __init__(self, *, min_count: int = 30) -> None:
        check_min_count(min_count)
        self.min_count = min_count
        self._vocabulary: dict[str, list[str]] = {}
        self._columns: dict[tuple[str, str], int] = {}

    @property
    def is_fitted(self) -> bool:
        """Whether the encoder can encode."""
        return bool(self._columns)

    @property
    def dim(self) -> int:
        """The length of a vector: the number of stored (field, value) pairs."""
        self._require_fit()
        return len(self._columns)

    def fit(
        self,
        profiles: Iterable[DemographicProfile | Mapping[str, Any] | None],
        *,
        person_ids: Sequence[Hashable] | None = None,
        show_progress: bool = False,
    ) -> "FieldEncoder":
        """
        Choose the (field, value) pairs that at least `min_count` people share.

        Args:
            profiles (`Iterable`):
                The training profiles; those of which nothing is known count for nothing.
            person_ids (`Sequence[Hashable]`, *optional*):
                Who each row is about: several rows of one person count once. Without it every row is a person.
            show_progress (`bool`, defaults to `False`):
                Show a progress bar over the rows.

        Raises:
            ValueError: A profile is a plain text, `person_ids` has another length, or every value is too rare.
        """
        profiles = read_profiles(profiles)
        self._reject_plain_text(profiles)
        person_ids = range(len(profiles)) if person_ids is None else person_ids
        if len(person_ids) != len(profiles):
            raise ValueError(f"`person_ids` has {len(person_ids)} entries for {len(profiles)} profiles.")
        people: dict[tuple[str, str], set[Hashable]] = defaultdict(set)
        rows = tqdm(profiles, desc="Counting profile values", unit="row", disable=not show_progress)
        for profile, person in zip(rows, person_ids, strict=True):
            for pair in profile.fields.items():
                people[pair].add(person)
        kept = sorted(pair for pair, who in people.items() if len(who) >= self.min_count)
        if not kept:
            names = sorted({name for name, _ in people})
            raise ValueError(
                f"No value of the fields {names} is shared by min_count={self.min_count} people: lower `min_count`, "
                "use coarser values (age groups instead of ages), or use a TextEncoder."
            )
        vocabulary: dict[str, list[str]] = {}
        for name, value in kept:
            vocabulary.setdefault(name, []).append(value)
        self._set_vocabulary(vocabulary)
        return self

    def encode(
        self,
        profiles: Sequence[DemographicProfile | Mapping[str, Any] | None],
        *,
        missing: MissingPolicy = "error",
        show_progress: bool = False,
    ) -> torch.Tensor:
        """
        The vectors of `profiles`, `(len(profiles), dim)`, float32 on the CPU.

        Args:
            profiles (`Sequence`): Mappings of fields, or `None`.
            missing (`"error"` or `"zero"`): What becomes of a row of which nothing is known.
            show_progress (`bool`, defaults to `False`): Show a progress bar over the rows.

        Raises:
            RuntimeError: The encoder is not fitted.
            ValueError: A profile is a plain text, has none of the encoder's fields, or is missing.
        """
        profiles = read_profiles(profiles)
        self.check(profiles, missing)
        vectors = torch.zeros(len(profiles), self.dim)
        hot = math.sqrt(self.dim / len(self._vocabulary))
        for row, profile in enumerate(tqdm(profiles, "Encoding profiles", unit="profile", disable=not show_progress)):
            columns = [self._columns[pair] for pair in profile.fields.items() if pair in self._columns]
            vectors[row, columns] = hot
        return vectors

    def check(self, profiles: Sequence[DemographicProfile], missing: MissingPolicy) -> None:
        """Raise the error that `encode` would raise for these rows."""
        self._require_fit()
        check_missing_policy(missing)
        self._reject_plain_text(profiles)
        # A listed field with an unknown value shows that the column is right, so only its absence is an error here.
        wrong = [i for i, p in enumerate(profiles) if not p.is_missing and self._vocabulary.keys().isdisjoint(p.names)]
        if wrong:
            raise ValueError(
                f"The profile in {name_rows(wrong)} has none of the encoder's fields {sorted(self._vocabulary)}, it "
                f"has {sorted(profiles[wrong[0]].names)}: is it the right column?"
            )
        unknown = [i for i, p in enumerate(profiles) if self._vocabulary.keys().isdisjoint(p.fields)]
        if unknown and missing == "error":
            raise missing_error(unknown)

    def count_unknown(self, profiles: Sequence[DemographicProfile | Mapping[str, Any] | None]) -> dict[str, int]:
        """
        Of each of the encoder's fields, how many profiles have a value there that it doesn't know (unseen in training,
        or rarer than `min_count`) and encodes like a missing one. Fields without such profiles are left out.
        """
        self._require_fit()
        found: Counter[str] = Counter()
        for profile in read_profiles(profiles):
            found.update(n for n, v in profile.fields.items() if n in self._vocabulary and (n, v) not in self._columns)
        return dict(sorted(found.items()))

    @property
    def fingerprint(self) -> str:
        """The sha256 of the state."""
        return self.state()["fingerprint"]

    def state(self) -> dict[str, Any]:
        """Everything inference needs, JSON-serialisable: `vocabulary` ({field: [values]}) and `min_count`."""
        self._require_fit()
        vocabulary = {name: list(values) for name, values in self._vocabulary.items()}
        state = {"type": "field", "min_count": self.min_count, "vocabulary": vocabulary}
        return state | {"fingerprint": fingerprint_of(state)}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "FieldEncoder":
        """
        The fitted encoder that `state()` described.

        Raises:
            ValueError: The state is of another type, incomplete, or was changed.
        """
        check_state(state, "field", {"min_count", "vocabulary"})
        encoder = cls(min_count=state["min_count"])
        encoder._set_vocabulary(state["vocabulary"])
        return encoder

    def _set_vocabulary(self, vocabulary: Mapping[str, Sequence[str]]) -> None:
        # Sorted here too: a state may have passed through a file that keeps another order of its keys.
        self._vocabulary = {name: sorted(vocabulary[name]) for name in sorted(vocabulary)}
        pairs = [(name, value) for name, values in self._vocabulary.items() for value in values]
        self._columns = {pair: column for column, pair in enumerate(pairs)}

    def _require_fit(self) -> None:
        if not self.is_fitted:
            raise RuntimeError("The FieldEncoder is not fitted: call fit(training profiles) or use from_state(state).")

    @staticmethod
    def _reject_plain_text(profiles: Sequence[DemographicProfile]) -> None:
        rows = [row for row, profile in enumerate(profiles) if profile.text and not profile.fields]
        if rows:
            raise ValueError(
                f"The profile in {name_rows(rows)} is a plain text: the FieldEncoder needs a mapping of fields "
                '({"country": …, "age": …}). Use a TextEncoder for plain texts.'
            )


def check_min_count(min_count: int) -> None:
    """Raise a `ValueError` unless it is a positive integer."""
    if isinstance(min_count, bool) or not isinstance(min_count, int) or min_count < 1:
        raise ValueError(f"`min_count` is {min_count!r}, expected an integer of at least 1.")
