# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What `trl-cuma evaluate` takes from a data set besides the rows to predict."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from ..data.prompts import read_letters
from ..generation.loading import named
from .option_tokens import Prompt, prompt_key
from .rows import AnswerBy, SurveyRows, read_rows

WHOLE = "dataset_dict.json"
"""What `save_to_disk` writes beside the folders of a data set's splits."""

MARGINAL_ROWS = 500_000
"""Training rows that the marginal is taken from; of more, so many are drawn."""


def read_data(
    data: str, config: str | None = None, option: str = "--data", split_option: str = "--split"
) -> DatasetDict:
    """
    All splits of a data set. A single one that `save_to_disk` wrote is the split "test".

    Args:
        data (`str`): What `trl-cuma prepare` or `save_to_disk` wrote, or anything that `load_dataset` takes.
        config (`str`, *optional*): Its configuration.
        option, split_option (`str`): Where it and its split are from, for errors.

    Raises:
        `ValueError`: It can't be loaded.
    """
    if os.path.exists(os.path.join(data, WHOLE)):
        return load_from_disk(data)
    if os.path.exists(os.path.join(data, "state.json")):
        whole, name = os.path.split(os.path.abspath(data))
        if os.path.exists(os.path.join(whole, WHOLE)):
            raise ValueError(
                f"`{option}` is {data!r}, one split of {whole}. Pass that folder, and the split by "
                f"`{split_option} {name}`."
            )
        return DatasetDict(test=load_from_disk(data))
    with named(f"`{option}` {data}"):
        found = load_dataset(data, name=config)
    assert isinstance(found, DatasetDict)
    return found


def load_splits(
    data: str, config: str | None, splits: Sequence[str], train_split: str
) -> tuple[dict[str, Dataset], Dataset | None]:
    """
    The splits to evaluate, and the training split, if there is one.

    Args:
        data (`str`), config (`str`, *optional*): See [`read_data`].
        splits (`Sequence[str]`): To evaluate.
        train_split (`str`): Whose answers make the marginal.

    Raises:
        `ValueError`: It can't be loaded, there is no such split, or the training split is among those to evaluate.
    """
    found = read_data(data, config)
    for split in splits:
        if split not in found:
            raise ValueError(
                f"`--split` names {split!r}, but the data has the splits {list(found)}. Name one of them."
            )
        if split == train_split:
            raise ValueError(
                f"`--split` names {split!r}, the split that was trained on. Name one that was held out, or say with "
                "`--train_split` which one was trained on."
            )
    return {split: found[split] for split in dict.fromkeys(splits)}, found.get(train_split)


def sample_rows(dataset: Dataset, limit: int | None, seed: int) -> Dataset:
    """
    At most `limit` rows, drawn evenly, in their order. Rows, and not people with all of theirs: of as many answers,
    those of many people say more about groups.
    """
    if limit is None or limit >= len(dataset):
        return dataset
    return dataset.select(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:limit]))


def training_marginal(rows: SurveyRows) -> dict[str, np.ndarray]:
    """
    Question → the distribution of its answers over all people, by their survey weights, shape `(options,)`. Half an
    answer is added to every option (Jeffreys' prior), so that none has probability zero; of rows with distributions it
    is the mean.
    """
    sums: dict[str, np.ndarray] = {}
    for number, question in enumerate(rows.question_id.tolist()):
        options = len(rows.options[rows.prompt[number]])
        if question not in sums:
            sums[question] = np.zeros(options) if rows.distribution else np.full(options, 0.5)
        if len(sums[question]) != options:
            raise ValueError(
                f"Question {question!r} has {len(sums[question])} options in one row of the training split and "
                f"{options} in another. Give questions that differ ids of their own."
            )
        if rows.distribution:
            sums[question] += rows.distribution[number]
        else:
            sums[question][rows.choice[number]] += rows.weight[number]
    return {question: total / total.sum() for question, total in sums.items()}


class Wording:
    """
    How questions are worded, if their prompts don't state the profile: then they may be shown, and routed for anybody.

    Args:
        dataset (`Dataset`): Two rows of each question are read.
        answer_by, demographic_column, person_column: See [`~trl_cuma.evaluation.rows.read_rows`].

    Attributes:
        prompt_profile (`bool`, *optional*): Whether prompts state the profile; `None` where no question is asked of
            two different profiles.
        prompts (`dict[str, Prompt]`): Question → prompt; empty unless it is known that no profile is stated.
        questions (`dict[str, tuple]`): Question → text and options, of prompts worded by a template.
    """

    def __init__(self, dataset: Dataset, answer_by: AnswerBy, demographic_column: str, person_column: str) -> None:
        self.prompt_profile: bool | None = None
        self.prompts: dict[str, Prompt] = {}
        self.questions: dict[str, tuple[str, Sequence[str]]] = {}
        if "question_id" not in dataset.column_names:  # people's own conversations
            return
        ids = np.array(dataset.select_columns("question_id")["question_id"][:], dtype=object).astype(str)
        _, first = np.unique(ids, return_index=True)
        _, last = np.unique(ids[::-1], return_index=True)
        sample = dataset.select(np.unique(np.concatenate([first, len(ids) - 1 - last])))
        rows = read_rows(
            sample, answer_by=answer_by, demographic_column=demographic_column, person_column=person_column
        )
        found: dict[str, list[tuple[int, int]]] = {}
        for question, prompt, profile in zip(rows.question_id.tolist(), rows.prompt, rows.profile, strict=True):
            found.setdefault(question, []).append((int(prompt), int(profile)))
        keys = [prompt_key(prompt) for prompt in rows.prompts]
        pairs = [pair for pair in found.values() if len({profile for _, profile in pair}) == 2]
        if pairs:
            self.prompt_profile = any(len({keys[prompt] for prompt, _ in pair}) == 2 for pair in pairs)
        if self.prompt_profile is False:
            self.prompts = {question: rows.prompts[pair[0][0]] for question, pair in found.items()}
            counts = {question: len(rows.options[pair[0][0]]) for question, pair in found.items()}
            self.questions = _texts(self.prompts, counts)


def _texts(prompts: Mapping[str, Prompt], counts: Mapping[str, int]) -> dict[str, tuple[str, Sequence[str]]]:
    texts = {}
    for question, prompt in prompts.items():
        content = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        try:
            read = read_letters(content, counts[question])
        except ValueError:  # another wording; the question's id stands for it
            continue
        texts[question] = (read.text, read.options)
    return texts


def people_of(dataset: Dataset, demographic_column: str, person_column: str) -> tuple[list[Any], bool]:
    """
    Each person's profile, once; and whether they are people: rows without a person are of countries, say, and each
    different profile counts once.
    """
    if person_column in dataset.column_names:
        ids = np.array(dataset.select_columns(person_column)[person_column][:], dtype=object)
        known = np.array([value is not None for value in ids], dtype=bool)
        if known.any():
            _, first = np.unique(ids[known].astype(str), return_index=True)
            rows = np.sort(np.flatnonzero(known)[first])
            return list(dataset.select(rows)[demographic_column][:]), True
    unique: dict[Any, Any] = {}
    for value in dataset.select_columns(demographic_column)[demographic_column][:]:
        unique.setdefault(tuple(value.items()) if isinstance(value, Mapping) else str(value), value)
    return list(unique.values()), False
