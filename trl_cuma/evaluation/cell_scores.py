# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Scores per cell and per answer, from which every metric, its interval, and its difference between runs are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .metrics.intervals import Estimate, bootstrap_interval
from .metrics.pooled import MIN_ENTROPY_GAP, MIN_INFORMATION, denominator_note
from .resampling import crossed_clusters

GROUP = "group:"
"""What a column's name begins with that holds, of a field, the number of each row's group."""


@dataclass(frozen=True, eq=False)
class Scores:
    """
    Columns of numbers over the same rows.

    Args:
        columns (`dict[str, np.ndarray]`): Name → numbers of shape `(rows,)`; `nan` where a row has none.
        clusters (`tuple[np.ndarray, np.ndarray]`): Two numbers of each row: who, and which question. Rows that share
            one stand or fall together.
        units (`tuple[str, str]`): What the clusters are: `("person", "question")`.
        weights (`np.ndarray` of shape `(rows,)`): Survey weights of answers; people of cells.
    """

    columns: dict[str, np.ndarray]
    clusters: tuple[np.ndarray, np.ndarray]
    units: tuple[str, str]
    weights: np.ndarray

    def arrays(self, prefix: str) -> dict[str, np.ndarray]:
        """As arrays for `cells.npz`: `"<prefix>/<column>"`. They hold numbers alone, and no text of a profile."""
        parts = {"cluster": np.stack(self.clusters, 1), "unit": np.array(self.units), "weight": self.weights}
        return {f"{prefix}/{name}": values for name, values in {**parts, **self.columns}.items()}

    def of_rows(self, rows: np.ndarray) -> Scores:
        """Of some rows alone, `(rows,)` of numbers or of `bool`."""
        columns = {name: values[rows] for name, values in self.columns.items()}
        first, second = self.clusters
        return Scores(columns, (first[rows], second[rows]), self.units, self.weights[rows])

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> Scores | None:
        """What [`Scores.arrays`] gave; `None` where there is no such prefix."""
        found = {
            name.removeprefix(f"{prefix}/"): values for name, values in arrays.items() if name.startswith(f"{prefix}/")
        }
        if not found:
            return None
        cluster, unit, weight = found.pop("cluster"), found.pop("unit"), found.pop("weight")
        return cls(found, (cluster[:, 0], cluster[:, 1]), (str(unit[0]), str(unit[1])), weight)


class Denominator(NamedTuple):
    """
    What a metric divides by, see [`denominator_note`].

    Args:
        name (`str`): For the note.
        function (`Callable`): The means of the metric's columns → the denominator.
        least (`float`): Least lower bound, in nats.
        bounded (`bool`): Whether the lower bound must be known.
    """

    name: str
    function: Callable[..., Any]
    least: float
    bounded: bool = False


class Formula(NamedTuple):
    """
    A metric as a function of means.

    Args:
        tables (`tuple[str, ...]`): Where its columns are: of `"answers"` and `"cells"`, the first that is there.
        columns (`tuple[str, ...]`): Whose means it takes.
        function (`Callable`, *optional*): The means → the metric; by default the mean of the only column.
        weighted (`bool`): Whether cells count by their weights; answers always do.
        denominator (`Denominator`, *optional*): Of a quotient that is not reported where this may be near zero.
    """

    tables: tuple[str, ...]
    columns: tuple[str, ...]
    function: Callable[..., Any] | None = None
    weighted: bool = False
    denominator: Denominator | None = None


FORMULAS = {
    "accuracy": Formula(("answers", "cells"), ("accuracy",)),
    "nll": Formula(("answers", "cells"), ("nll",)),
    "emd": Formula(("cells",), ("emd",)),
    "emd_population": Formula(("cells",), ("emd",), weighted=True),
    "kl": Formula(("cells",), ("kl",)),
    "kl_explained": Formula(
        ("cells",),
        ("kl", "kl_marginal"),
        lambda model, marginal: 1 - model / marginal,
        denominator=Denominator("KL(truth || marginal)", lambda model, marginal: marginal, MIN_INFORMATION),
    ),
    "entropy": Formula(("cells",), ("entropy",)),
    "collapse_index": Formula(
        ("cells",),
        ("entropy", "entropy_true", "entropy_marginal"),
        lambda model, true, marginal: (model - true) / (marginal - true),
        denominator=Denominator(
            "H(marginal) - H(truth)", lambda model, true, marginal: marginal - true, MIN_ENTROPY_GAP, bounded=True
        ),
    ),
    "spread_ratio": Formula(
        ("cells",),
        ("between", "between_true"),
        lambda model, true: model / true,
        denominator=Denominator("the truth's divergence between profiles", lambda model, true: true, MIN_INFORMATION),
    ),
    "outside": Formula(("answers", "cells"), ("outside",)),
    "position_bias": Formula(("answers", "cells"), ("position_bias",)),
}

CHOICES = {
    name: Formula(("own_choices",), (name,))
    for name in ("pair_accuracy", "pair_accuracy_per_token", "choice_accuracy", "choice_accuracy_per_token")
}
"""Of people's choices between texts; a split holds these or a survey's."""


def measure(
    name: str,
    tables: Mapping[str, Scores],
    against: Mapping[str, Scores] | None = None,
    *,
    num_samples: int = 2000,
    seed: int = 0,
) -> tuple[Estimate, str] | None:
    """
    A metric of [`FORMULAS`] or [`CHOICES`] with its interval, or how much it differs from another run's on the same
    rows.

    Args:
        name (`str`): A key of one of them.
        tables (`Mapping[str, Scores]`): `"cells"` and, of individuals, `"answers"`.
        against (`Mapping[str, Scores]`, *optional*): The same of the other run; the estimate is this one's metric less
            the other's, resampled in pairs.
        num_samples (`int`), seed (`int`): Of the bootstrap.

    Returns:
        The estimate, over the rows that have all its numbers, and the unit that was resampled; `None` where there is
        no such row.
    """
    formula = FORMULAS.get(name) or CHOICES[name]
    table = next((table for table in formula.tables if table in tables), None)
    runs = [tables] if against is None else [tables, against]
    if table is None or any(column not in run[table].columns for run in runs for column in formula.columns):
        return None
    values = np.stack([run[table].columns[column] for run in runs for column in formula.columns], 1)
    rows = np.isfinite(values).all(1)
    if not rows.any():
        return None
    scores = tables[table]
    weights = scores.weights[rows] if table == "answers" or formula.weighted else None
    clusters = crossed_clusters([column[rows] for column in scores.clusters])
    of_means = formula.function or (lambda mean: mean)
    count = len(formula.columns)

    def function(*means: Any) -> Any:
        own = of_means(*means[:count])
        return own if against is None else own - of_means(*means[count:])

    if len(clusters) == 2:
        unit = " × ".join(scores.units)
    else:
        sizes = [len(np.unique(column[rows])) for column in scores.clusters]
        unit = scores.units[sizes.index(len(np.unique(clusters[0])))]
    options = dict(weights=weights, num_samples=num_samples, seed=seed)
    if formula.denominator is not None:
        what, divisor, least, bounded = formula.denominator
        for run in np.split(values[rows], len(runs), axis=1):
            found = bootstrap_interval(run, clusters, divisor, **options)
            if note := denominator_note(found, what, least, bounded=bounded):
                return Estimate(None, None, None, found.n, note), unit
    return bootstrap_interval(values[rows], clusters, function, **options), unit


def add_note(entry: dict[str, Any], note: str) -> None:
    """Adds to an entry's note."""
    entry["note"] = "; ".join(filter(None, [entry.get("note"), note]))
