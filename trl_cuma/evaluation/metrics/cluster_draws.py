# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The draws of a bootstrap over clusters, and what sums they give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from ...extras import needs_extra

COUNTS_AT_ONCE = 2 * 10**6
"""Of clusters, in [`drawn_sums`]: memory."""


def cluster_codes(clusters: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Of each column of labels, the number of each row's cluster, from 0 without gaps, `(rows,)`."""
    return [np.unique(column, return_inverse=True)[1].reshape(-1) for column in clusters]


def cluster_draws(codes: Sequence[np.ndarray], num_samples: int, seed: int) -> Iterator[list[np.ndarray]]:
    """Of each draw and column, how often each cluster was drawn, `(clusters,)`: with replacement, so many as are."""
    sizes = [int(code.max()) + 1 for code in codes]
    rng = np.random.default_rng(seed)
    for _ in range(num_samples):
        yield [np.bincount(rng.integers(size, size=size), minlength=size) for size in sizes]


def drawn_sums(table: np.ndarray, codes: Sequence[np.ndarray], num_samples: int, seed: int) -> np.ndarray:
    """
    The columns' sums in each draw, a row counting as often as the product of its clusters' draws.

    Rows of the same clusters are summed before the first draw. Of two columns of clusters these sums are a sparse
    matrix for each column of the table, and a draw is `counts @ matrix @ other counts`.

    Args:
        table (`np.ndarray` of shape `(rows, columns)`): What is summed.
        codes (sequence of `np.ndarray` of shape `(rows,)`): See [`cluster_codes`].
        num_samples, seed (`int`): See [`cluster_draws`].

    Returns:
        `np.ndarray` of shape `(draws, columns)`.
    """
    with needs_extra("evaluation", "The bootstrap"):
        from scipy.sparse import csr_array

    draws = cluster_draws(codes, num_samples, seed)
    if len(codes) > 2:
        weights = (math.prod(count[code] for code, count in zip(codes, counts, strict=True)) for counts in draws)
        return np.stack([each @ table for each in weights])
    if len(codes) == 1:
        sums = np.stack([np.bincount(codes[0], column) for column in table.T], 1)
        return np.stack([counts @ sums for (counts,) in draws])
    sizes = [int(code.max()) + 1 for code in codes]
    many, few = (0, 1) if sizes[0] >= sizes[1] else (1, 0)
    shape = (sizes[many], sizes[few])
    matrices = [csr_array((column, (codes[many], codes[few])), shape=shape) for column in table.T]
    at_once = max(1, COUNTS_AT_ONCE // sizes[many])
    found = []
    for chunk in iter(lambda: list(islice(draws, at_once)), []):
        left, right = (np.array([counts[which] for counts in chunk], dtype=float).T for which in (many, few))
        found.append(np.stack([((matrix @ right) * left).sum(0) for matrix in matrices], 1))
    return np.concatenate(found)
