# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
How evenly a model serves groups of people, with the sampling noise of small groups taken out.

Rows are (person, question) pairs with a score, such as 1 for a right answer. The independent unit is the person: rows
of one person share a label in `person`, and people that are not known need a label each. A group is named in a result
only where it has enough people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from ...extras import needs_extra
from .intervals import Estimate, bootstrap_interval, percentiles, row_weights

MIN_ROWS_AS_PUBLISHED = 5
"""Least rows of a group in the published sigma-inequity."""


def scores_by_group(
    scores: np.ndarray,
    group: Sequence[str | None],
    person: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    min_people: int = 30,
    level: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """
    Mean score of each group, with the interval of a bootstrap over its people.

    Args:
        scores (`np.ndarray` of shape `(rows,)`): Any score per row: right or wrong, probability, distance.
        group (sequence of `str` or `None`): Each row's group; `None` is left out.
        person (`np.ndarray` of shape `(rows,)`): Label of each row's person (or other independent unit).
        weights (`np.ndarray` of shape `(rows,)`, *optional*): Survey weights; by default equal.
        min_people (`int`): Groups with fewer people are left out.
        level (`float`), num_samples (`int`), seed (`int`): see [`bootstrap_interval`].

    Returns:
        `dict[str, Estimate]`: by group, in the order of their names; `n` counts people.

    Raises:
        `ValueError`: lengths differ, a score is not finite or the weights are no weights.
    """
    scores, weights, person, code, names = _rows(scores, group, person, weights)
    result = {}
    for index, name in enumerate(names):
        rows = code == index
        if len(np.unique(person[rows])) >= min_people:
            result[name] = bootstrap_interval(
                scores[rows],
                [person[rows]],
                weights=weights[rows],
                level=level,
                num_samples=num_samples,
                seed=seed,
            )
    return result


def inequity(
    scores: np.ndarray,
    group: Sequence[str | None],
    person: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    min_people: int = 100,
    level: float = 0.95,
    num_samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Sigma-inequity and worst group of one field, as published and with the sampling variance subtracted.

    As published (`sigma_raw`): the population standard deviation of the accuracies of groups with at least 5 rows. A
    perfectly fair model scores about 0.17 on groups of 5 to 10. Corrected (`sigma`), over the G groups with at least
    `min_people` people (and two at the least):

        variance = 1/G sum_g (a_g - mean a)²  -  (1 - 1/G) mean_g v_g,        sigma = sqrt(max(variance, 0))
        v_g = n_g / (n_g - 1) · sum_{i in g} (S_i - a_g N_i)² / (sum_{i in g} N_i)²

    with `S_i` person i's sum of scores and `N_i` of weights (rows): `v_g` is the sampling variance of `a_g`, so the
    expectation of `variance` is that of the groups' true accuracies. The interval is a bootstrap over people around
    group means shrunken to `variance`: around the observed means it would count the noise twice.

    The worst group is the one with the lowest *shrunken* accuracy (empirical Bayes), for the lowest of many noisy
    numbers is lower than any truth:

        mean a + variance / (variance + v_g) (a_g - mean a)

    Its interval, around `a_g`, holds for all G groups at once (t, Bonferroni), as the group is picked after looking.
    Where `sigma` is 0, no group can be told from the others: all shrunken accuracies are the mean.

    Args:
        scores (`np.ndarray` of shape `(rows,)`): Right or wrong, or another score where higher is better.
        group (sequence of `str` or `None`): Each row's group; `None` is left out.
        person (`np.ndarray` of shape `(rows,)`): Label of each row's person; one group per person.
        weights (`np.ndarray` of shape `(rows,)`, *optional*): Survey weights; by default equal.
        min_people (`int`): Groups with fewer people are left out of everything but `sigma_raw`.
        level (`float`): coverage.
        num_samples (`int`): bootstrap draws. 1,000 take seconds for 100,000 people.
        seed (`int`): seed of the draws.

    Returns:
        `dict`: `sigma`, `low`, `high`, `variance` (unbiased, may be negative), `sigma_raw`, `groups_raw`, `groups`
        (G), `left_out` (groups with too few people), `people` (in the G groups), `worst` (name), `worst_value`
        (shrunken), `worst_raw`, `worst_low`, `worst_high`, `worst_n` (people), `note`. With fewer than two groups all
        are `None` but the raw ones and the counts, and `note` says why.

    Raises:
        `ValueError`: lengths differ, a score is not finite, the weights are no weights, or a person has two groups.
    """
    with needs_extra("evaluation", "A published sigma-inequity"):
        from scipy.stats import t

    scores, weights, person, code, names = _rows(scores, group, person, weights)
    sizes = np.bincount(code[code >= 0], minlength=len(names))
    published = np.flatnonzero(sizes >= MIN_ROWS_AS_PUBLISHED)
    raw = [np.average(scores[code == index], weights=weights[code == index]) for index in published]
    known = code >= 0
    _, first, who = np.unique(person[known], return_index=True, return_inverse=True)
    person_group = code[known][first]
    if (person_group[who] != code[known]).any():
        raise ValueError(
            "`group` must be the same in all rows of a person: a label of `person` stands for two people."
        )
    total, mass = np.bincount(who, (weights * scores)[known]), np.bincount(who, weights[known])

    people = np.bincount(person_group, minlength=len(names))
    kept = np.flatnonzero(people >= max(min_people, 2))
    position = np.full(len(names), -1)
    position[kept] = np.arange(len(kept))
    chosen = position[person_group] >= 0
    place, total, mass = position[person_group[chosen]], total[chosen], mass[chosen]
    result: dict[str, Any] = dict.fromkeys(
        ("sigma", "low", "high", "variance", "worst", "worst_value", "worst_raw", "worst_low", "worst_high", "worst_n")
    )
    result |= {
        "sigma_raw": float(np.std(raw)) if raw else None,
        "groups_raw": len(raw),
        "groups": len(kept),
        "left_out": len(names) - len(kept),
        "people": int(people[kept].sum()),
        "note": None,
    }
    if len(kept) < 2:
        result["note"] = f"fewer than two groups of at least {min_people} people"
        return result

    means, variances = _group_means(total, mass, place, np.ones(len(place)))
    spread = float(np.var(means))
    variance = spread - (1 - 1 / len(kept)) * float(variances.mean())
    between = max(variance, 0.0)
    centre = means.mean()
    shrunken = centre + (means - centre) * np.sqrt(between / spread if spread > 0 else 0.0)
    draws = _draw_variances(total, mass, place, shrunken - means, num_samples, seed)
    low, high = percentiles(draws, len(place), level)

    noise = between + variances
    estimates = centre + (means - centre) * np.divide(between, noise, out=np.ones_like(noise), where=noise > 0)
    worst = np.lexsort((means, estimates))[0]
    edge = t.ppf(1 - (1 - level) / (2 * len(kept)), people[kept][worst] - 1) * np.sqrt(variances[worst])
    return result | {
        "sigma": float(np.sqrt(between)),
        "low": float(np.sqrt(max(low, 0.0))),
        "high": float(np.sqrt(max(high, 0.0))),
        "variance": variance,
        "worst": names[kept[worst]],
        "worst_value": float(estimates[worst]),
        "worst_raw": float(means[worst]),
        "worst_low": float(means[worst] - edge),
        "worst_high": float(means[worst] + edge),
        "worst_n": int(people[kept][worst]),
    }


def inequity_table(
    scores: np.ndarray,
    fields: Mapping[str, Sequence[str | None]],
    person: np.ndarray,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """
    [`inequity`] of each field and of each pair of fields.

    The published sigma-inequity is the mean of `sigma_raw` over the single fields, where the values are as given: of
    fields whose small groups are "Other" it is another number.

    Args:
        scores (`np.ndarray` of shape `(rows,)`): see [`inequity`].
        fields (mapping of `str` to a sequence of `str` or `None`): A field's name to each row's value.
        person (`np.ndarray` of shape `(rows,)`): Label of each row's person.
        options: further arguments of [`inequity`].

    Returns:
        `dict`: `"<field>"` and `"<field> × <field>"` to the result of [`inequity`]; the groups of a pair are named
        `"<value> × <value>"`, and a row without both values is left out. Of pairs all that tells the number or the
        plain mean of single groups is `None`.

    Raises:
        `ValueError`: as [`inequity`].
    """
    table = {name: inequity(scores, values, person, **options) for name, values in fields.items()}
    for (first, left), (second, right) in combinations(fields.items(), 2):
        both = [None if a is None or b is None else f"{a} × {b}" for a, b in zip(left, right, strict=True)]
        result = inequity(scores, both, person, **options)
        # With them and the fields' own groups, what is left of a group could be told, however few people it has.
        hidden = ("worst_raw", "worst_low", "worst_high", "worst_n", "people", "sigma_raw", "groups_raw", "left_out")
        table[f"{first} × {second}"] = result | dict.fromkeys(hidden)
    return table


def _draw_variances(
    total: np.ndarray, mass: np.ndarray, place: np.ndarray, shift: np.ndarray, num_samples: int, seed: int
) -> np.ndarray:
    """Bootstrap draws of the corrected variance, with the groups' means moved by `shift` `(groups,)`."""
    order = np.argsort(place, kind="stable")
    place, total, mass = place[order], total[order], mass[order]
    size, start = np.bincount(place)[place], np.searchsorted(place, place)
    rng = np.random.default_rng(seed)
    samples = np.empty(num_samples)
    for index in range(num_samples):
        # Within the groups: their sizes are no part of the question, and none comes out empty.
        draw = np.bincount(start + (rng.random(len(place)) * size).astype(np.int64), minlength=len(place))
        means, variances = _group_means(total, mass, place, draw)
        samples[index] = np.var(means + shift) - (1 - 1 / len(shift)) * variances.mean()
    return samples


def _group_means(
    total: np.ndarray, mass: np.ndarray, place: np.ndarray, draw: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sampling variance of each group `(groups,)` from people's sums `(people,)`, counted `draw` times."""
    masses = np.bincount(place, draw * mass)
    means = np.bincount(place, draw * total) / masses
    squares = np.bincount(place, draw * (total - means[place] * mass) ** 2)
    people = np.bincount(place, draw)
    return means, people / (people - 1) * squares / masses**2


def _rows(
    scores: np.ndarray, group: Sequence[str | None], person: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """Checked scores, weights and persons, the index of each row's group (-1: none), and the groups' names."""
    scores = np.asarray(scores, dtype=float)
    weights = row_weights(weights, len(scores))
    if not (len(scores) == len(group) == len(person)):
        raise ValueError(
            f"`scores`, `group` and `person` must have one entry per row, got {len(scores)}, {len(group)} and "
            f"{len(person)}."
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"`scores` row {int((~np.isfinite(scores)).argmax())} is not finite.")
    names = sorted({name for name in group if name is not None})
    index = {name: position for position, name in enumerate(names)}
    code = np.array([-1 if name is None else index[name] for name in group])
    return scores, weights, np.asarray(person), code, names
