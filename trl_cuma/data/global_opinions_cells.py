# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Which of GlobalOpinionQA's questions and answer shares are taken, and how: the rules, with a count for each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import fsum

import numpy as np

from ..demographics import DemographicProfile
from .global_opinions_source import COUNTRY_ALIASES, SourceQuestion
from .report import Report
from .survey import OPTION_LETTERS, Question

ROUNDING = 0.05
"""How far from 1 the published shares of a cell may sum: they are percentages, rounded one by one."""

# Beside what says nothing in a profile ("Don't know", "Refused", "No answer", …), as options put it.
_NO_ANSWER = frozenset({"can't choose", "can't say", "dk", "na", "no opinion", "not sure", "unsure"})
_MISSING = re.compile(r"(other )?missing\b *[;,:]")  # followed by why
_ASIDE = re.compile(r"[([](do not read|don't read|volunteered|vol\.?)[])]")  # to the interviewer
_SAMPLE = re.compile(r"\s*\((current|old|non-)\s*national sample\)", re.IGNORECASE)
_WHOLE_NUMBER = re.compile(r"-?\d+\.0")  # options that were numbers once


Key = tuple[str, tuple[str, ...]]  # a question: its text and options
Samples = dict[str, dict[int, list[list[float]]]]  # of a question, by country and by how old the sample is


@dataclass(frozen=True, eq=False)
class CountryShares:
    """
    Questions and the cells of them that are known, in an order that doesn't depend on the source's.

    Args:
        questions (`list[Question]`): By id.
        countries (`list[str]`): By name.
        question (`np.ndarray` of shape `(cells,)`): Index into `questions`.
        country (`np.ndarray` of shape `(cells,)`): Index into `countries`.
        distribution (`list[list[float]]`): Of each cell, over its question's options; sums to 1.
    """

    questions: list[Question]
    countries: list[str]
    question: np.ndarray
    country: np.ndarray
    distribution: list[list[float]]


def country_shares(source: Sequence[SourceQuestion], min_countries: int, report: Report) -> CountryShares:
    """
    Apply the rules that [`~trl_cuma.data.convert_global_opinions`] documents.

    Args:
        source (`Sequence[SourceQuestion]`): As read.
        min_countries (`int`): Questions of fewer countries are left out.
        report (`Report`): Gets the counts, of questions and of cells.

    Raises:
        `ValueError`: Nothing is left.
    """
    ids: dict[Key, str] = {}
    cells: dict[Key, Samples] = {}
    for asked in source:
        report.read("questions")
        report.read("cells", len(asked.shares))
        is_answer = [not says_nothing(option) for option in asked.options]
        options = tuple(_tidy(option) for option, kept in zip(asked.options, is_answer, strict=True) if kept)
        reason = _why_not(asked.text, options)
        if reason:
            report.drop("questions", reason)
            report.drop("cells", "of a question that is left out", len(asked.shares))
            continue
        report.note("options that are no answer, left out", len(is_answer) - len(options))
        key = (asked.text, options)
        question_id = asked.question_id or _question_id(*key)
        if key in ids:
            report.drop("questions", "the same as another, merged")
        ids[key] = min(ids.get(key, question_id), question_id)
        by_country = cells.setdefault(key, {})
        for name, shares in asked.shares:
            _add_cell(by_country, name, shares, is_answer, report)

    for key in list(cells):
        if len(cells[key]) < min_countries:
            report.drop("questions", f"fewer than {min_countries} countries")
            report.drop("cells", f"of a question with fewer than {min_countries} countries", _num_rows(cells.pop(key)))
    if not cells:
        raise ValueError(
            f"No question was asked in {min_countries} countries or more. Lower `min_countries`. What was "
            f"counted:\n{report}"
        )
    return _newest(cells, ids, report)


def says_nothing(option: str) -> bool:
    """Whether an option stands for people who gave no answer, however it joins the reasons ("DK/Refused")."""
    plain = _ASIDE.sub("", option.casefold().replace("’", "'")).strip(" ()[]*.")
    if _no_answer(plain) or _MISSING.match(plain):
        return True
    return all(_no_answer(part.strip()) for part in re.split(r"[/,;]|\bor\b|\band\b", plain))


def _no_answer(text: str) -> bool:
    return text in _NO_ANSWER or not DemographicProfile.from_value(text).text


def _tidy(option: str) -> str:
    return option[:-2] if _WHOLE_NUMBER.fullmatch(option) else option


def _why_not(text: str, options: tuple[str, ...]) -> str | None:
    if not text:
        return "without a text"
    if len(options) < 2:
        return "fewer than 2 options"
    if len(options) > len(OPTION_LETTERS):
        return f"more than {len(OPTION_LETTERS)} options"
    if len(set(options)) < len(options):
        return "two options of the same text"
    return None


def _add_cell(
    by_country: Samples,
    name: str,
    shares: list[float | None],
    is_answer: list[bool],
    report: Report,
) -> None:
    sample = _SAMPLE.search(name)
    age = {"current": 0, "old": 1, "non-": None}[sample[1].lower()] if sample else 0
    if age is None:
        return report.drop("cells", "sample that is not national")
    if len(shares) != len(is_answer):
        return report.drop("cells", "not one share per option")
    if None in shares:
        return report.drop("cells", "a share is missing")
    if fsum(shares) > 0 and abs(fsum(shares) - 1) > ROUNDING:
        return report.drop("cells", "shares that don't sum to 1")
    answered = [share for share, kept in zip(shares, is_answer, strict=True) if kept]
    total = fsum(answered)
    if not total:
        return report.drop("cells", "nobody gave an answer")
    country = _SAMPLE.sub("", name)
    if country in COUNTRY_ALIASES:
        report.note("cells whose country has another name")
        country = COUNTRY_ALIASES[country]
    by_country.setdefault(country, {}).setdefault(age, []).append([share / total for share in answered])


def _newest(cells: dict[Key, Samples], ids: dict[Key, str], report: Report) -> CountryShares:
    """One distribution per question and country: the mean of the rows of its newest sample."""
    keys = sorted(cells, key=ids.__getitem__)
    countries = sorted(set().union(*cells.values()))
    index = {country: number for number, country in enumerate(countries)}
    question, country, distribution = [], [], []
    for number, key in enumerate(keys):
        for name in sorted(cells[key]):
            samples = cells[key][name]
            rows = samples[min(samples)]
            report.drop("cells", "older sample beside a current one", _num_rows({name: samples}) - len(rows))
            report.drop("cells", "the same question and country as another, averaged", len(rows) - 1)
            question.append(number)
            country.append(index[name])
            # fsum: the mean doesn't depend on the rows' order
            distribution.append([fsum(shares) / len(rows) for shares in zip(*rows, strict=True)])
    questions = [Question(ids[text, options], text, options) for text, options in keys]
    return CountryShares(questions, countries, np.array(question), np.array(country), distribution)


def _num_rows(by_country: Samples) -> int:
    return sum(len(rows) for samples in by_country.values() for rows in samples.values())


def _question_id(text: str, options: tuple[str, ...]) -> str:
    """The Hub numbers nothing: an id that stays when rows are added or sorted."""
    return "goqa-" + blake2b("\0".join((text, *options)).encode(), digest_size=6).hexdigest()
