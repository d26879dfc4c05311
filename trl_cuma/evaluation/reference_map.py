# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A map of groups that somebody else drew (Inglehart and Welzel's, say), held against the routers'."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import needs_extra

with needs_extra("evaluation", "A reference map"):
    from scipy.spatial import procrustes
    from scipy.spatial.distance import pdist, squareform

MIN_MATCHED = 5
"""With fewer groups two maps agree too easily: four points have 24 orders."""


@dataclass(frozen=True, eq=False)
class ReferenceComparison:
    """
    How alike two maps of the same groups are.

    Attributes:
        matched (`list[str]`): the groups that both have, as the model's side names them.
        unmatched_groups (`int`): groups that the reference lacks.
        unmatched_reference (`list[str]`): names in the reference that are no group here.
        disparity (`float`, *optional*): what is left of the squared distances between the two maps once they are
            shifted, scaled, rotated and mirrored onto each other (Procrustes): 0 the same shape, 1 nothing in common.
        disparity_p (`float`, *optional*): share of the permutations of the groups with a disparity as low.
        mantel_r (`float`, *optional*): correlation of the distances between groups, in the routers' full space and on
            the reference map (Mantel); independent of how well two dimensions show the former.
        mantel_p (`float`, *optional*): share of the permutations of the groups with a correlation as high.
        model_map, reference_map (`np.ndarray` of shape `(matched, 2)`, *optional*): the two maps, laid onto each
            other.
        note (`str`, *optional*): why the numbers are missing.
    """

    matched: list[str]
    unmatched_groups: int
    unmatched_reference: list[str]
    disparity: float | None = None
    disparity_p: float | None = None
    mantel_r: float | None = None
    mantel_p: float | None = None
    model_map: np.ndarray | None = None
    reference_map: np.ndarray | None = None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable, under the attributes' names."""
        document = dict(vars(self))
        for name in ("model_map", "reference_map"):
            document[name] = None if document[name] is None else np.round(document[name], 6).tolist()
        return document


def read_reference_map(path: str | os.PathLike[str]) -> dict[str, tuple[float, float]]:
    """
    Read a map from a file: a header line, then one line per group with its name and two coordinates. Separated by
    tabs if the header has one, else by commas; UTF-8.

    Raises:
        ValueError: if there is no header, or a line doesn't have three entries, a name, finite numbers as coordinates,
            or a name of its own (names are compared without case and outer blanks). The message names the line.
    """
    text = Path(path).read_text(encoding="utf-8-sig")
    header = text.partition("\n")[0]
    lines = csv.reader(text.splitlines(), delimiter="\t" if "\t" in header else ",")
    places: dict[str, tuple[float, float]] = {}
    seen: dict[str, int] = {}
    for number, entries in enumerate(lines, 1):
        if not any(entry.strip() for entry in entries):
            continue
        if len(entries) != 3:
            raise ValueError(
                f"Line {number} of {path} has {len(entries)} entries. A reference map has three columns: the group's "
                "name and two coordinates."
            )
        name, coordinates = entries[0].strip(), tuple(_number(entry) for entry in entries[1:])
        if number == 1:
            if not any(map(math.isnan, coordinates)):
                raise ValueError(
                    f"Line 1 of {path} has numbers where the columns' names belong. Put a header line, such as "
                    "'country,x,y', before it."
                )
            continue
        if not name or not all(map(math.isfinite, coordinates)):
            raise ValueError(f"Line {number} of {path} needs a name and two finite numbers. Correct or remove it.")
        if _key(name) in seen:
            raise ValueError(
                f"Line {number} of {path} has the name of line {seen[_key(name)]}. Keep one line per group."
            )
        seen[_key(name)] = number
        places[name] = coordinates
    return places


def compare_with_reference(
    names: Sequence[str],
    distance: np.ndarray,
    reference: Mapping[str, tuple[float, float]],
    *,
    permutations: int = 999,
    seed: int = 0,
) -> ReferenceComparison:
    """
    Compare the groups' distances with a map of them.

    The Procrustes disparity is of the two-dimensional map of the matched groups alone, see [`classical_map`]. Both
    p-values count the observed order as one of the permutations.

    Args:
        names (`Sequence[str]`): the groups; compared with the reference's without case and outer blanks.
        distance (`np.ndarray` of shape `(groups, groups)`): symmetric, zero diagonal.
        reference (`Mapping`): name → two coordinates, see [`read_reference_map`].
        permutations (`int`): random orders of the groups.
        seed (`int`): of these.

    Returns:
        [`ReferenceComparison`]: with a `note` in place of the numbers where fewer than five groups match, or all
        distances are equal.
    """
    places = {_key(name): place for name, place in reference.items()}
    rows = [row for row, name in enumerate(names) if _key(name) in places]
    own = {_key(name) for name in names}
    counts = {
        "matched": [names[row] for row in rows],
        "unmatched_groups": len(names) - len(rows),
        "unmatched_reference": sorted(name for name in reference if _key(name) not in own),
    }
    if len(rows) < MIN_MATCHED:
        return ReferenceComparison(
            **counts, note=f"n/a: {len(rows)} groups match the reference's names; it takes {MIN_MATCHED}"
        )
    theirs = np.array([places[_key(names[row])] for row in rows])
    ours = distance[np.ix_(rows, rows)]
    their_distance, upper = squareform(pdist(theirs)), np.triu_indices(len(rows), 1)
    for side, values in (("routers'", ours[upper]), ("reference's", their_distance[upper])):
        if np.ptp(values) <= 1e-9 * np.abs(values).max(initial=1e-300):
            return ReferenceComparison(**counts, note=f"n/a: all of the {side} distances between groups are equal")
    plane, _ = classical_map(ours)
    laid, on, disparity = procrustes(theirs, plane)
    mantel = np.corrcoef(ours[upper], their_distance[upper])[0, 1]
    rng = np.random.default_rng(seed)
    as_low = as_high = 1
    for _ in range(permutations):
        order = rng.permutation(len(rows))
        as_low += procrustes(theirs[order], plane)[2] <= disparity + 1e-9
        shuffled = their_distance[np.ix_(order, order)][upper]
        as_high += np.corrcoef(ours[upper], shuffled)[0, 1] >= mantel - 1e-9
    return ReferenceComparison(
        **counts,
        disparity=float(disparity),
        disparity_p=as_low / (permutations + 1),
        mantel_r=float(mantel),
        mantel_p=as_high / (permutations + 1),
        model_map=on,
        reference_map=laid,
    )


def classical_map(distance: np.ndarray) -> tuple[np.ndarray, float]:
    """
    Classical multidimensional scaling (Torgerson): the points in the plane whose inner products are nearest to those
    that the distances imply. Deterministic: of each axis' two directions, the one in which the entry of the largest
    size is positive.

    Args:
        distance (`np.ndarray` of shape `(groups, groups)`): symmetric, zero diagonal.

    Returns:
        Coordinates `(groups, 2)`, and the share of the squared distances that the plane shows, 1 for a perfect map.
    """
    centre = np.eye(len(distance)) - 1 / len(distance)
    values, vectors = np.linalg.eigh(-0.5 * centre @ np.square(distance) @ centre)
    values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
    points = np.zeros((len(distance), 2))
    shown = min(2, len(distance))
    points[:, :shown] = vectors[:, :shown] * np.sqrt(values[:shown])
    largest = np.take_along_axis(points, np.abs(points).argmax(0)[None], 0)
    total = values.sum()
    return points * np.where(largest < 0, -1, 1), float(values[:2].sum() / total) if total > 0 else 1.0


def _key(name: str) -> str:
    return name.strip().casefold()


def _number(text: str) -> float:
    """The number that a text is; NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
