# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Are a model's texts for different people more varied than its texts for one person?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .intervals import Estimate, bootstrap_interval


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """
    Distinct-N (Li et al. 2016, arXiv 1510.03055): different word n-grams over all word n-grams of some texts.

    Words are what is between white space, without regard to case; n-grams don't cross texts. It falls as texts get
    longer or more: compare equal numbers of texts only. It means little in languages written without spaces.

    Args:
        texts (sequence of `str`): Texts.
        n (`int`): Words per n-gram.

    Returns:
        `float`: 0 to 1; 0 where no text has `n` words.
    """
    words = [text.casefold().split() for text in texts]
    grams = [tuple(text[start : start + n]) for text in words for start in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def distinct_ratio(
    texts: Sequence[str],
    prompt: np.ndarray,
    profile: np.ndarray,
    n: int = 2,
    *,
    draws: int = 200,
    level: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """
    Distinct-N between profiles over Distinct-N within a profile, for the same prompt.

        ratio = mean over prompts of E[Distinct-N(m texts of m different profiles, one each)]
              / mean over prompts of E[Distinct-N(m different texts of one profile)]

    with profiles and texts drawn uniformly. Where the profile makes no difference a prompt's texts are exchangeable:
    both sides are m of them, with the same expectation, and the ratio is 1 whatever the model's own variety (its
    sampling temperature). Above 1, profiles bring variety that sampling alone doesn't. m is the greatest number that
    every prompt allows: the fewest texts of any (prompt, profile), or the fewest profiles of any prompt.

    Args:
        texts (sequence of `str`): Generated texts.
        prompt (`np.ndarray` of shape `(texts,)`): Label of each text's prompt.
        profile (`np.ndarray` of shape `(texts,)`): Label of each text's profile.
        n (`int`): Words per n-gram.
        draws (`int`): Sets drawn per prompt and side.
        level (`float`), num_samples (`int`): see [`bootstrap_interval`], which resamples prompts.
        seed (`int`): seed of both.

    Returns:
        [`Estimate`]: `n` counts prompts.

    Raises:
        `ValueError`: There are no texts, a length differs, a (prompt, profile) has a single text, or a prompt a single
            profile.
    """
    if not len(texts) == len(prompt) == len(profile) or len(texts) == 0:
        raise ValueError(
            f"`texts`, `prompt` and `profile` must have one entry per text and at least one, got {len(texts)}, "
            f"{len(prompt)} and {len(profile)}."
        )
    cells: dict[object, dict[object, list[str]]] = {}
    for text, about, person in zip(texts, prompt, profile, strict=True):
        cells.setdefault(about, {}).setdefault(person, []).append(text)
    fewest_texts = min(len(same) for people in cells.values() for same in people.values())
    size = min(fewest_texts, *(len(people) for people in cells.values()))
    if size < 2:
        raise ValueError(
            f"Every prompt needs at least 2 profiles and 2 texts per profile, but the fewest are "
            f"{min(len(people) for people in cells.values())} and {fewest_texts}. Leave such prompts out."
        )
    rng = np.random.default_rng(seed)
    values = []
    for people in cells.values():
        groups = list(people.values())
        between, within = [], []
        for _ in range(draws):
            chosen = rng.choice(len(groups), size, replace=False)
            between.append(distinct_n([groups[index][rng.integers(len(groups[index]))] for index in chosen], n))
            own = groups[rng.integers(len(groups))]
            within.append(distinct_n([own[index] for index in rng.choice(len(own), size, replace=False)], n))
        values.append([np.mean(between), np.mean(within)])
    return bootstrap_interval(
        np.array(values), [np.arange(len(cells))], np.divide, level=level, num_samples=num_samples, seed=seed
    )
