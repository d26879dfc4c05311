# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Answers of two models, judged for people: win-rates with and without the answers' length, and how far to trust the
judge.

A judge's verdict is a language model's idea of what a person prefers. People's own choices come first
([`trl_cuma.evaluation.own_choices`]); [`judge_agreement`] says how often the judge meets them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..demographics.profile import read_profiles
from ..extras import needs_extra
from ..rewards import JudgeStats, ProfileJudge
from ..rewards.batch import read_texts, strip_reasoning
from .metrics.intervals import bootstrap_weights, percentiles, wilson_interval
from .resampling import crossed_clusters, metric, number_labels, resampled_mean

with needs_extra("evaluation", "A win-rate"):
    from scipy.special import expit, logit

PRIOR = 1 / 3**2
"""Precision of the normal prior of the length's effect: weak beside some tens of comparisons."""


@dataclass(frozen=True, eq=False)
class Verdicts:
    """
    Attributes:
        scores (`np.ndarray` of shape `(rows,)`): 1 where the judge prefers the first answer, 0 where the other, 0.5
            for a tie, nan for a row that it failed on.
        stats ([`JudgeStats`]): What the judge did for these rows.
    """

    scores: np.ndarray
    stats: JudgeStats

    @property
    def scored(self) -> np.ndarray:
        """Boolean `(rows,)`."""
        return ~np.isnan(self.scores)

    def document(self) -> dict[str, Any]:
        """
        Counts: `rows`; of them `wins`, `losses`, `ties` and `unscored`; of the ties those where the two orders
        disagreed; `failures` of requests by kind, of which one leaves a row unscored.
        """
        return {
            "rows": len(self.scores),
            "wins": int((self.scores == 1).sum()),
            "losses": int((self.scores == 0).sum()),
            "ties": int((self.scores == 0.5).sum()),
            "order_disagreements": self.stats.order_disagreements,
            "unscored": int((~self.scored).sum()),
            "without_profile": self.stats.missing_profiles,
            "failures": dict(sorted(self.stats.failures.items())),
            "requests": self.stats.requests,
            "cached_verdicts": self.stats.cache_hits,
        }


def judge_pairs(
    judge: ProfileJudge,
    prompts: Sequence[Any],
    answers: Sequence[Any],
    others: Sequence[Any],
    demographics: Sequence[Any],
    *,
    batch_size: int = 64,
    description: str | None = "Judge",
) -> Verdicts:
    """
    Ask the judge, in both orders, which of two answers each row's person would prefer.

    Call it in one process. With the judge's `cache_path`, a run that was cut short goes on where it was.

    Args:
        judge ([`ProfileJudge`]): Asked for `batch_size` rows at a time; its own settings say what becomes of failures.
        prompts, answers, others (sequences of `str` or of chat messages): One per row.
        demographics (`Sequence`): The profile of each row's person, a mapping or text.
        batch_size (`int`): Rows between two moves of the progress bar.
        description (`str`, *optional*): Name of the progress bar; `None` for none.

    Raises:
        ValueError, TypeError, JudgeError: As the judge does; or the lengths differ.
    """
    lengths = {"prompts": len(prompts), "answers": len(answers), "others": len(others)}
    lengths["demographics"] = len(demographics)
    if len(set(lengths.values())) != 1:
        raise ValueError(f"One prompt, two answers and one profile belong to each row, got {lengths}.")
    for texts, what in ((prompts, "the prompt"), (answers, "the answer"), (others, "the other answer")):
        read_texts(texts, what)  # before the first request, and with the row's number among all
    before = judge.stats
    scores: list[float | None] = []
    with tqdm(total=len(prompts), desc=description, unit="row", disable=description is None) as bar:
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            columns = {judge.demographic_column: demographics[rows], judge.reference_column: others[rows]}
            scores += judge(prompts[rows], answers[rows], **columns)
            bar.update(len(prompts[rows]))
    after = judge.stats
    # Of counters, a difference drops what is zero.
    change = {field.name: getattr(after, field.name) - getattr(before, field.name) for field in fields(JudgeStats)}
    return Verdicts(np.array(scores, dtype=float), JudgeStats(**change))  # None becomes nan


def pairwise_win_rate(
    judge: ProfileJudge,
    prompts: Sequence[Any],
    answers: Sequence[Any],
    others: Sequence[Any],
    demographics: Sequence[Any],
    *,
    num_samples: int = 2000,
    seed: int = 0,
    **kwargs: Any,
) -> dict[str, Any]:
    """
    How often people would prefer the answers of one model to those of another, by the judge.

    Args:
        judge, prompts, answers, others, demographics: See [`judge_pairs`]; `answers` are those of the model whose
            wins are counted.
        num_samples, seed (`int`): Of the bootstrap.
        kwargs: Further arguments of [`judge_pairs`].

    Returns:
        `dict`: For the evaluation's document, without any text.
        - `counts`: See [`Verdicts.document`]. Rows that the judge failed on are in no rate.
        - `win_rate`: A tie is half a win, of `n` rows that were scored. Wilson's interval, for which the rows are
          independent; ties make it a little wide.
        - `win_rate_decided`: Without the ties. Wilson's interval.
        - `win_rate_resampled`: `win_rate` with the interval that resamples prompts and profiles: the one to read where
          the same prompts are answered for several profiles.
        - `length_controlled`: See [`length_controlled_win_rate`].
        - `length`: Mean characters of `answers` and `others`, and in what share of rows the first is the longer.
    """
    verdicts = judge_pairs(judge, prompts, answers, others, demographics, **kwargs)
    kept = verdicts.scored
    scores = verdicts.scores[kept]
    people = (profile.text for profile in read_profiles(demographics))
    clusters = [number_labels(column)[kept] for column in (read_texts(prompts, "the prompt"), people)]
    lengths = np.stack([_lengths(answers), _lengths(others)])[:, kept]
    decided = scores[scores != 0.5]
    draws = {"num_samples": num_samples, "seed": seed}
    return {
        "counts": verdicts.document(),
        "win_rate": metric(wilson_interval(scores.sum(), len(scores)), "comparison"),
        "win_rate_decided": metric(wilson_interval(decided.sum(), len(decided)), "comparison"),
        "win_rate_resampled": metric(resampled_mean(scores, clusters, **draws), "prompt × profile"),
        "length_controlled": length_controlled_win_rate(scores, *lengths, clusters, **draws),
        "length": {
            "mean": float(lengths[0].mean()) if len(scores) else None,
            "mean_other": float(lengths[1].mean()) if len(scores) else None,
            "longer": float(np.mean(lengths[0] > lengths[1])) if len(scores) else None,
        },
    }


def length_controlled_win_rate(
    scores: np.ndarray,
    lengths: np.ndarray,
    other_lengths: np.ndarray,
    clusters: Sequence[np.ndarray],
    *,
    num_samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    The win-rate that a logistic regression expects where both answers are equally long (Dubois et al., 2024, arXiv
    2404.04475):

        P(win) = σ(θ + φ · tanh((length - other length) / sd)),    σ(θ) is reported

    `sd` is the standard deviation of the difference. The paper's third term, how hard each prompt is, takes many
    models on the same prompts, and is left out. θ is free, so that answers of equal length give the plain win-rate; φ
    has a normal prior with the standard deviation 3 (the paper has a weak penalty, too), without which it is infinite
    where the longer answer always wins. A tie is half a win.

    Args:
        scores (`np.ndarray` of shape `(rows,)`): 1, 0 or 0.5.
        lengths, other_lengths (`np.ndarray` of shape `(rows,)`): Of the two answers, e.g. in characters.
        clusters (sequence of `np.ndarray` of shape `(rows,)`): Columns of labels to resample for the interval.
        num_samples, seed (`int`): Of the bootstrap.

    Returns:
        `dict`: A metric, with `length_effect`, the φ of it.
    """
    unit = "prompt × profile"
    plain = resampled_mean(scores, clusters, num_samples=num_samples, seed=seed)
    if plain.value is None:
        return metric(plain, unit) | {"length_effect": None}
    difference = np.asarray(lengths, dtype=float) - np.asarray(other_lengths, dtype=float)
    spread = difference.std()
    x = np.tanh(difference / spread) if spread > 0 else np.zeros(len(difference))
    value, effect = _fit_length(x, scores, np.ones(len(x)))
    low = high = None
    if plain.low is not None:
        draws = bootstrap_weights(crossed_clusters(clusters), num_samples, seed)
        values = np.array([_fit_length(x, scores, weights)[0] for weights in draws])
        low, high = percentiles(values, plain.n, 0.95)
    return metric(replace(plain, value=value, low=low, high=high), unit) | {"length_effect": effect}


def judge_agreement(
    judge: ProfileJudge,
    prompts: Sequence[Any],
    chosen: Sequence[Any],
    rejected: Sequence[Any],
    demographics: Sequence[Any],
    person_ids: Sequence[str],
    *,
    prompt_groups: Sequence[Any] | None = None,
    num_samples: int = 2000,
    seed: int = 0,
    **kwargs: Any,
) -> dict[str, Any]:
    """
    How often the judge, told a person's profile, prefers the answer that the person chose.

    Args:
        judge, prompts, demographics: See [`judge_pairs`].
        chosen, rejected (sequences of `str` or of chat messages): What each row's person chose, and over what.
        person_ids (`Sequence[str]`): Whose choice it is.
        prompt_groups (`Sequence`, *optional*): Prompts that are resampled together; by default equal ones.
        num_samples, seed (`int`): Of the bootstrap over people and prompts.
        kwargs: Further arguments of [`judge_pairs`].

    Returns:
        `dict`: For the evaluation's document, without any text.
        - `counts`: See [`Verdicts.document`]; a win is a verdict for the person's choice. `shared`: rows whose two
          answers, to the same prompt, another person chose between as well.
        - `agreement`: A tie is half a hit, so that 0.5 is `chance` for every judge that does not read the
          answers, whether it draws or always says "tie". `agreement_decided`: without the ties.
        - `longer`: The agreement of a judge that prefers the longer answer.
        - `people`: How often *another person* made the same choice, over the shared rows: each row's share among the
          other people. `agreement_shared`: the judge's, on the same rows. One who answers as another person would
          gets the first; one who knew each majority would get more.
    """
    if len(person_ids) != len(prompts):
        raise ValueError(f"`person_ids` has {len(person_ids)} rows and `prompts` {len(prompts)}. Pass one each.")
    verdicts = judge_pairs(judge, prompts, chosen, rejected, demographics, **kwargs)
    texts = read_texts(prompts, "the prompt")
    pairs = [*zip(texts, read_texts(chosen, "`chosen`"), read_texts(rejected, "`rejected`"), strict=True)]
    people = _agreement_of_people(pairs, person_ids)
    clusters = [number_labels(person_ids), number_labels(texts if prompt_groups is None else prompt_groups)]
    lengths = np.stack([_lengths(chosen), _lengths(rejected)])
    longer = (np.sign(lengths[0] - lengths[1]) + 1) / 2

    def over(values: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
        some = [column[rows] for column in clusters]
        estimate = resampled_mean(values[rows], some, num_samples=num_samples, seed=seed)
        return metric(estimate, "person × prompt")

    kept, shared = verdicts.scored, ~np.isnan(people)
    return {
        "counts": verdicts.document() | {"people": len(set(person_ids)), "shared": int(shared.sum())},
        "agreement": over(verdicts.scores, kept),
        "agreement_decided": over(verdicts.scores, kept & (verdicts.scores != 0.5)),
        "chance": 0.5,
        "longer": over(longer, np.ones(len(longer), dtype=bool)),
        "people": over(people, shared),
        "agreement_shared": over(verdicts.scores, kept & shared),
    }


def _agreement_of_people(pairs: Sequence[tuple[str, str, str]], person_ids: Sequence[str]) -> np.ndarray:
    """Of each row, the share of other people between the same answers who chose the same; nan without others."""
    choices: dict[tuple, set[tuple[str, str]]] = defaultdict(set)
    for (prompt, chosen, rejected), person in zip(pairs, person_ids, strict=True):
        choices[prompt, frozenset((chosen, rejected))].add((person, chosen))
    shares = []
    for (prompt, chosen, rejected), person in zip(pairs, person_ids, strict=True):
        others = [what == chosen for who, what in choices[prompt, frozenset((chosen, rejected))] if who != person]
        shares.append(np.mean(others) if others else np.nan)
    return np.array(shares)


def _fit_length(x: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """
    σ(θ) and φ of the length model, by Newton's method.

    Args:
        x, scores (`np.ndarray` of shape `(rows,)`): The tanh of the length difference, and the wins.
        weights (`np.ndarray` of shape `(rows,)`): How often each row counts.
    """
    if not weights.any():
        return np.nan, np.nan
    mean = weights @ scores / weights.sum()
    if mean in (0, 1):  # θ is infinite
        return float(mean), 0.0
    theta, phi = logit(mean), 0.0
    for _ in range(100):
        p = expit(theta + phi * x)
        error, curvature = weights * (scores - p), weights * p * (1 - p)
        mixed = curvature @ x
        # Positive definite: the prior keeps the determinant above zero.
        hessian = np.array([[curvature.sum(), mixed], [mixed, curvature @ x**2 + PRIOR]])
        step = np.linalg.solve(hessian, [error.sum(), error @ x - PRIOR * phi])
        step /= max(1.0, np.abs(step).max())  # the quadratic holds near by only
        theta, phi = theta + step[0], phi + step[1]
        if np.abs(step).max() < 1e-9:
            break
    return float(expit(theta)), float(phi)


def _lengths(answers: Sequence[Any]) -> np.ndarray:
    """Characters of what the judge is shown."""
    return np.array([len(strip_reasoning(text)) for text in read_texts(answers, "the answer")])
