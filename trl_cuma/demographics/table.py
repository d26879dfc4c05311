# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The vectors of unique profiles, computed once."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .encoder_state import MissingPolicy, check_missing_policy, missing_error
from .encoders import DemographicEncoder, TextEncoder
from .profile import DemographicProfile, check_is_sequence, is_vector, read_profiles
from .table_cache import TableCache


class DemographicTable:
    """
    One row per unique profile, and the way from a dataset's values to those rows.

    A value is a profile (mapping, text, [`DemographicProfile`], `None`), which the encoder encodes, or a ready vector
    (list, tuple, array or tensor of numbers), which is passed through. A table holds one kind or the other.

    Profile texts are not kept: rows are found by the sha256 of the text, salted with the encoder's fingerprint. That
    keeps texts out of logs and files, but it is not anonymisation: who has the cache *and* the encoder can hash every
    plausible profile ("age: 30; country: JP") and compare. Protect the cache as you protect the data.

    Copies (data loader workers) grow apart once they meet unseen profiles: ids mean something only to the table they
    came from, while `table(values)` is right in each. Rows are never dropped, memory grows with the unique values.

    Args:
        encoder (`TextEncoder`, `FieldEncoder` or `None`):
            A fitted encoder; `None` suffices for vectors.
        missing (`"error"` or `"zero"`, defaults to `"error"`):
            What becomes of a row of which nothing is known: an error that names it, or a row of zeros.
        cache_dir (`str` or `os.PathLike`, *optional*):
            Where `add` keeps a text encoder's vectors between runs; no cache without it. A field encoder is cheaper
            than a disk and is never cached.
    """

    def __init__(
        self,
        encoder: DemographicEncoder | None,
        *,
        missing: MissingPolicy = "error",
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        check_missing_policy(missing)
        self.encoder = encoder
        self.missing = missing
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._fingerprint: str | None = None
        self._holds_vectors: bool | None = None  # None until the first value that is not missing
        self._ids: dict[bytes, int] = {}
        self._storage = torch.empty(0, 0)  # (capacity, dim); the first len(self._ids) rows are filled

    @property
    def dim(self) -> int:
        """
        The length of a row.

        Raises:
            RuntimeError: There is no encoder and no vector yet, or the encoder is not fitted.
        """
        if self._ids:
            return self._storage.shape[1]
        if self.encoder is None:
            raise RuntimeError("The table has no encoder and no vectors yet: add vectors first.")
        return self.encoder.dim

    @property
    def embeds(self) -> torch.Tensor:
        """The rows, `(profiles, dim)`, float32 on the CPU."""
        return self._storage[: len(self._ids)]

    def add(self, values: Sequence[Any], *, show_progress: bool = True) -> None:
        """
        Encode the unique unseen values once, or read them from the cache, and cache what was encoded.

        Args:
            values (`Sequence`): A dataset's column of profiles or vectors.
            show_progress (`bool`, defaults to `True`): Show a progress bar over the profiles to encode.

        Raises:
            TypeError: A value is neither a profile nor a vector.
            ValueError: Profiles without an encoder, profiles and vectors mixed, a vector of another length or with
                values that are not finite, or a missing profile where `missing="error"`.
        """
        self._ids_of(values, show_progress=show_progress, use_cache=True)

    def lookup(self, values: Sequence[Any]) -> torch.Tensor:
        """
        The row numbers of `values`, `(len(values),)`, int64.

        Unseen values are added to the table but not to the disk cache, which is written as a whole: `add` a dataset
        first.

        Raises:
            TypeError, ValueError: As `add`.
        """
        return torch.tensor(self._ids_of(values, show_progress=False, use_cache=False), dtype=torch.int64)

    def __call__(self, values: Sequence[Any]) -> torch.Tensor:
        """The vectors of `values`, `(len(values), dim)`, float32; unseen values are added as in `lookup`."""
        ids = self.lookup(values)
        return self.embeds[ids]

    def _ids_of(self, values: Sequence[Any], **options: bool) -> list[int]:
        check_is_sequence(values)
        values = list(values)
        distinct, positions = _distinct(values)
        try:
            ids = self._ids_of_each(distinct, **options)
        except (TypeError, ValueError):
            ids = None  # read all, for an error that names their rows
        if ids is None:
            return self._ids_of_each(values, **options)
        return [ids[position] for position in positions]

    def _ids_of_each(self, values: list[Any], *, show_progress: bool, use_cache: bool) -> list[int]:
        vector_rows = [row for row, value in enumerate(values) if is_vector(value)]
        profiles = read_profiles(None if is_vector(value) else value for value in values)
        profile_rows = [row for row, profile in enumerate(profiles) if not profile.is_missing]
        self._check_kind(vector_rows, profile_rows)
        if vector_rows or self._holds_vectors:
            return self._vector_ids(values, profiles)
        return self._profile_ids(profiles, show_progress=show_progress, use_cache=use_cache)

    def _check_kind(self, vector_rows: list[int], profile_rows: list[int]) -> None:
        if vector_rows and profile_rows:
            raise ValueError(
                f"Row {vector_rows[0]} holds a vector and row {profile_rows[0]} a profile: use one kind in a column."
            )
        if self._holds_vectors is not None and (profile_rows if self._holds_vectors else vector_rows):
            held, row = ("vectors", profile_rows[0]) if self._holds_vectors else ("profiles", vector_rows[0])
            raise ValueError(f"The table holds {held} and row {row} is of the other kind: use one kind in a column.")

    def _vector_ids(self, values: list[Any], profiles: list[DemographicProfile]) -> list[int]:
        vectors = {row: _read_vector(row, value) for row, value in enumerate(values) if is_vector(value)}
        knows_dim = self._ids or (self.encoder is not None and self.encoder.is_fitted)
        dim = self.dim if knows_dim else len(next(iter(vectors.values())))
        for row, vector in vectors.items():
            if len(vector) != dim:
                raise ValueError(f"The vector in row {row} has {len(vector)} dimensions, expected {dim}.")
        unknown = [row for row in range(len(values)) if row not in vectors]
        if unknown and self.missing == "error":
            raise missing_error(unknown)
        rows = [vectors.get(row, torch.zeros(dim)) for row in range(len(values))]
        keys = [hashlib.sha256(row.numpy().tobytes()).digest() for row in rows]
        unseen = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._ids}
        self._holds_vectors = True
        self._insert(list(unseen), list(unseen.values()))
        return [self._ids[key] for key in keys]

    def _profile_ids(self, profiles: list[DemographicProfile], *, show_progress: bool, use_cache: bool) -> list[int]:
        if not profiles:
            return []
        if self.encoder is None:
            if self.missing == "error" and all(profile.is_missing for profile in profiles):
                raise missing_error(range(len(profiles)))
            raise ValueError(
                "The values are profiles and the table has no encoder: pass a fitted `demographic_encoder` "
                "(TextEncoder or FieldEncoder), or vectors instead of profiles."
            )
        self.encoder.check(profiles, self.missing)
        if self._fingerprint is None:
            self._fingerprint = self.encoder.fingerprint
        keys = [self._key(profile) for profile in profiles]
        unseen = {key: profile for key, profile in zip(keys, profiles, strict=True) if key not in self._ids}
        if unseen:
            if self._fingerprint != self.encoder.fingerprint:
                raise RuntimeError("The encoder was fitted again after the table was begun: make a new table.")
            cache = self._cache() if use_cache else None
            found = cache.read(unseen.keys()) if cache else {}
            rest = {key: profile for key, profile in unseen.items() if key not in found}
            if rest:
                encoded = self.encoder.encode(list(rest.values()), missing=self.missing, show_progress=show_progress)
                fresh = dict(zip(rest, encoded, strict=True))
                if cache:
                    cache.write(fresh)
                found |= fresh
            self._insert(list(unseen), [found[key] for key in unseen])
        if any(not profile.is_missing for profile in profiles):
            self._holds_vectors = False
        return [self._ids[key] for key in keys]

    def _key(self, profile: DemographicProfile) -> bytes:
        # With the fields: two different mappings may read the same once they are text.
        content = json.dumps([self._fingerprint, profile.text, dict(profile.fields)])
        return hashlib.sha256(content.encode()).digest()

    def _cache(self) -> TableCache | None:
        if self.cache_dir is None or not isinstance(self.encoder, TextEncoder):
            return None
        assert self._fingerprint is not None  # the encoder's
        return TableCache(self.cache_dir, self._fingerprint, self.encoder.dim)

    def _insert(self, keys: list[bytes], rows: list[torch.Tensor]) -> None:
        if not keys:
            return
        start, end = len(self._ids), len(self._ids) + len(keys)
        if end > len(self._storage):
            # Doubling keeps a stream of unseen values linear in time.
            storage = torch.zeros(max(end, 2 * start), len(rows[0]))
            if start:
                storage[:start] = self.embeds
            self._storage = storage
        self._storage[start:end] = torch.stack(rows)
        self._ids.update(zip(keys, range(start, end), strict=True))


def _distinct(values: list[Any]) -> tuple[list[Any], list[int]]:
    """The values, without those that surely read as one before them does, and where each of `values` is in these."""
    distinct: list[Any] = []
    seen: dict[Any, int] = {}
    positions = []
    for row, value in enumerate(values):
        key: Any = row  # unlike any other
        if value is None or isinstance(value, str):
            key = value
        elif isinstance(value, dict):
            key = (*value.items(), *map(type, value.values()))  # 1 and True are equal and read differently
        try:
            position = seen.setdefault(key, len(distinct))
        except TypeError:  # a nested value, which is an error
            position = len(distinct)
        if position == len(distinct):
            distinct.append(value)
        positions.append(position)
    return distinct, positions


def _read_vector(row: int, value: Any) -> torch.Tensor:
    """A row's vector, `(dim,)`, float32; the error names the row and never the values."""
    problem = f"Row {row} holds a {type(value).__name__} that is not a vector of numbers"
    try:
        if isinstance(value, torch.Tensor):
            vector = value.detach().to("cpu", torch.float32)
        else:
            array = np.asarray(value)
            if array.dtype.kind not in "fiu":
                raise TypeError(f"{problem}: pass floats, or a profile as a mapping or text.")
            with np.errstate(over="ignore"):  # an overflow is reported below, with its row
                vector = torch.from_numpy(array.astype(np.float32))
    except ValueError:  # numpy on nested lists of unequal lengths
        raise TypeError(f"{problem}: its entries are nested.") from None
    if vector.ndim != 1 or not len(vector):
        raise TypeError(f"{problem}: its shape is {tuple(vector.shape)}, expected (dim,).")
    if not vector.isfinite().all():
        raise ValueError(f"The vector in row {row} has values that are not finite in float32.")
    return vector
