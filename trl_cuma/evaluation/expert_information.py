# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What the expert that gets a token tells of its person's group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..adapter.routing import mutual_information
from ..extras import needs_extra

with needs_extra("evaluation", "Expert information"):
    from scipy.sparse import csr_array


@dataclass(frozen=True, eq=False)
class ExpertInformation:
    """
    Mutual information between expert and group, over people, in nats: `I(expert; group)` of a token's expert and its
    person's group. A finite sample's is above 0 even where routing knows nothing of the groups, so its mean over
    permutations of the people's groups is subtracted.

    Attributes:
        value (`np.ndarray` of shape `(routers,)`): observed less expected; about 0 for no association.
        expected (`np.ndarray` of shape `(routers,)`): the mean over permutations.
        p (`np.ndarray` of shape `(routers,)`): share of the permutations, the observed order among them, with as much;
            not corrected for the number of routers.
        mean_value, mean_expected, mean_p (`float`): the same of the mean over routers, which is one test.
    """

    value: np.ndarray
    expected: np.ndarray
    p: np.ndarray
    mean_value: float
    mean_expected: float
    mean_p: float


def count_people(codes: np.ndarray, profile: np.ndarray, groups: int, profiles: int) -> csr_array:
    """People `(groups, profiles)`, of each person's group `codes` and `profile`, both `(people,)`."""
    return csr_array((np.ones(len(codes)), (codes, profile)), shape=(groups, profiles))


def group_means(counts: csr_array, values: np.ndarray) -> np.ndarray:
    """`(profiles, routers, experts)` → `(groups, routers, experts)`: means over people."""
    sums = counts @ values.reshape(len(values), -1) / counts.sum(1)[:, None]
    return sums.reshape(-1, *values.shape[1:])


def expert_information(
    shares: np.ndarray, profile: np.ndarray, codes: np.ndarray, permutations: int, seed: int
) -> ExpertInformation:
    """
    Args:
        shares (`np.ndarray` of shape `(profiles, routers, experts)`): sums to 1 over the experts.
        profile (`np.ndarray` of shape `(people,)`): index into these.
        codes (`np.ndarray` of shape `(people,)`): each person's group, from 0; none is empty. Some group must have two
            people: where each person is a group, any permutation tells as much, and the value would be 0 for all.
        permutations (`int`): of the people.
        seed (`int`): of these.
    """
    rng = np.random.default_rng(seed)
    size = torch.from_numpy(np.bincount(codes)).double()

    def information(of_person: np.ndarray) -> np.ndarray:
        means = group_means(count_people(of_person, profile, len(size), len(shares)), shares)
        return mutual_information(torch.from_numpy(means), size).numpy()

    observed = information(codes)
    null = np.stack([information(rng.permutation(codes)) for _ in range(permutations)])
    with_mean, null = np.append(observed, observed.mean()), np.column_stack([null, null.mean(1)])
    expected = null.mean(0)
    p = (1 + (null >= with_mean - 1e-9).sum(0)) / (1 + permutations)
    value = with_mean - expected
    return ExpertInformation(value[:-1], expected[:-1], p[:-1], float(value[-1]), float(expected[-1]), float(p[-1]))
