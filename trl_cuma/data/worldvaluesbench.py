# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""WorldValuesBench: one row per person and question, millions of them, built column by column."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Value
from tqdm.auto import tqdm

from ..demographics.field_encoder import check_min_count
from .columns import encoded, joined, message_lists, profile_structs
from .conversion import Conversion, check_task, row_features
from .duplicates import near_duplicate_groups
from .keyed import keyed_digest
from .licenses import WORLD_VALUES_SURVEY
from .people import MIN_COUNT, canonical_people, grouped
from .prompts import PromptFormat
from .report import Report
from .splits import ANY, DROPPED, SPLITS, TRAIN, SplitOptions, split_people, split_prompts, split_rows
from .survey import OPTION_LETTERS
from .worldvaluesbench_files import (
    FIELDS,
    ValueQuestion,
    find_file,
    read_answers,
    read_people,
    read_questions,
    read_weights,
)

PEOPLE_PER_BATCH = 1000
FILES = {"train": "train", "validation": "valid", "test": "test"}


def convert_worldvaluesbench(
    folder: str | os.PathLike[str],
    *,
    task: Literal["sft", "dpo"] = "sft",
    prompts: PromptFormat | None = None,
    splits: SplitOptions | None = None,
    people_split: Literal["source", "random"] = "source",
    questions: Sequence[str] | None = None,
    languages: Sequence[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    max_train_rows: int | None = None,
    min_count: int = MIN_COUNT,
    keep_unknown: bool = False,
) -> Conversion:
    """
    WorldValuesBench (Zhao et al., 2024; arXiv 2404.16308) in TRL's columns.

    An answer is one row: the question with lettered options, and the letter of the person's answer. Answers are on the
    adjusted scale, and so are the options' texts. Left out and counted are: blank answers, interview ids that several
    people share, people without answers or of whom no profile field is known, rows whose person and question are in
    different splits.

    Args:
        folder (`str` or `PathLike`): The checkout of WorldValuesBench in which `data_preparation.py` was run.
        task (`str`, defaults to `"sft"`): `"sft"`: prompt and answer. `"dpo"`: the answer over another option, drawn
            uniformly.
        prompts (`PromptFormat`, *optional*): The wording.
        splits (`SplitOptions`, *optional*): What is held out.
        people_split (`str`, defaults to `"source"`): `"source"`: people are in the split that the benchmark put them
            in, its valid people only where `splits.validation` is positive; the shares of `splits` are then of the
            questions. `"random"`: all its people are split anew.
        questions (`Sequence[str]`, *optional*): Ids of the value questions to take; by default all.
        languages (`Sequence[str]`, *optional*): Languages of the interview to take, as the codebook names them. The
            column `language` is grouped like a profile field.
        weights (`str` or `PathLike`, *optional*): The World Values Survey's CSV, for a column `weight` (`W_WEIGHT`).
        max_train_rows (`int`, *optional*): A uniform sample of this many training rows. The paper trains on 50,000.
            Some training people are left without a row then, also of values of held-out combinations.
        min_count (`int`, defaults to `30`): Profile values that fewer people hold are grouped as "Other".
        keep_unknown (`bool`, defaults to `False`): Keep people of whom no field is known, for adapters with
            `missing_demographics="zero"`.

    Returns:
        [`Conversion`]: Columns of the task, `demographic`, `person_id`, `question_id`, `num_options`, `prompt_group`,
        `language`, and `weight` where asked for.

    Raises:
        `ValueError`: An argument is out of its range, or a file is malformed; the message names file, line and column.
        `FileNotFoundError`: A file is missing.
    """
    folder = Path(folder)
    prompts, splits = prompts or PromptFormat(), splits or SplitOptions()
    check_task(task, ("sft", "dpo"), prompts.messages)
    if people_split not in ("source", "random"):
        raise ValueError(f"`people_split` is {people_split!r}, expected 'source' or 'random'.")
    check_min_count(min_count)
    if max_train_rows is not None and (type(max_train_rows) is not int or max_train_rows < 1):
        raise ValueError(f"`max_train_rows` is {max_train_rows!r}, expected a positive integer or None.")
    # Questions, and people below, are split before some are chosen: whoever trains here doesn't test there.
    every = read_questions(folder)
    every_group = near_duplicate_groups([entry.whole_text for entry in every.values()], list(every))
    prompt_side = dict(zip(every, zip(every_group, split_prompts(every_group, splits), strict=True), strict=True))
    asked = read_questions(folder, questions)
    groups = [prompt_side[name][0] for name in asked]
    prompt_split = np.array([prompt_side[name][1] for name in asked], dtype=np.int8)
    of_source = people_split == "source"
    wanted = [name for name in FILES if name != "validation" or not of_source or splits.validation > 0]
    files = {name: _files(folder, FILES[name]) for name in wanted}
    extra = {name: Value("string") for name in ("question_id", "prompt_group", "language")}
    extra |= {"num_options": Value("int32")} | ({} if weights is None else {"weight": Value("float64")})
    features = row_features(task, list(FIELDS), extra, prompts.messages)
    asked_questions = _Questions(asked, groups, prompts, splits.seed)

    def batches(report: Report) -> Iterator[tuple[str, pa.Table]]:
        people, answers = _read(files, asked, report)
        profiles = canonical_people(people[list(FIELDS)], report, min_count, keep_unknown=keep_unknown)
        answers = answers[people.index.isin(profiles.index)]
        people = people.loc[profiles.index]
        spoken = pd.Series(grouped(people["language"], report, min_count), people.index, dtype=object)
        taken = _taken(people["language"], answers, languages, report)
        can_train = taken & ((answers >= 0) & np.isin(prompt_split, (TRAIN, ANY))).any(axis=1)
        person_split = split_people(profiles, splits, people["split"] if of_source else None, can_train)
        profiles, people, spoken, answers = profiles[taken], people[taken], spoken[taken], answers[taken]
        codes = split_rows(person_split[taken][:, None], prompt_split[None]).astype(np.int8)
        blank = answers < 0
        report.read("answers", answers.size)
        report.drop("answers", "blank", blank.sum())
        report.drop("answers", "person and question in different splits", (~blank & (codes == DROPPED)).sum())
        codes[blank] = DROPPED
        weight = None
        if weights is not None:
            weight = read_weights(Path(weights), people.index)
            report.note("people without a weight", np.isnan(weight).sum())
        keys = _keys(splits.seed, "person", people.index)
        if max_train_rows is not None:
            surplus = _all_but(max_train_rows, codes == SPLITS.index("train"), keys, asked_questions.keys)
            report.drop("answers", "training rows beyond `max_train_rows`", surplus.sum())
            codes[surplus] = DROPPED
        for start in tqdm(range(0, len(codes), PEOPLE_PER_BATCH), unit=f"×{PEOPLE_PER_BATCH} people", disable=None):
            batch = slice(start, start + PEOPLE_PER_BATCH)
            some_weights = None if weight is None else weight[batch]
            some = _People(profiles[batch], spoken[batch], some_weights, answers[batch], keys[batch], prompts)
            for code in np.unique(codes[batch][codes[batch] != DROPPED]):
                person, question = np.nonzero(codes[batch] == code)
                columns = _columns(some, asked_questions, person, question, prompts, task)
                yield SPLITS[code], pa.table({name: columns[name] for name in features})

    return Conversion(features, batches, f"WorldValuesBench, {task}", splits.names, WORLD_VALUES_SURVEY)


def _files(folder: Path, name: str) -> tuple[Path, Path]:
    """The two files of one of the benchmark's splits."""
    demographic, value = (find_file(folder, f"{name}/{name}_{kind}_qa.tsv") for kind in ("demographic", "value"))
    return demographic, value


def _read(
    files: Mapping[str, tuple[Path, Path]],
    asked: Mapping[str, ValueQuestion],
    report: Report,
) -> tuple[pd.DataFrame, np.ndarray]:
    """The people with one id and answers (columns `FIELDS`, `language`, `split`), and their answers."""
    people, answer_ids, answers = [], [], []
    for split, (demographic_file, value_file) in files.items():
        read, unlabelled = read_people(demographic_file)
        report.note("codes without a label, taken as unknown", unlabelled)
        ids, choices = read_answers(value_file, asked)
        people.append(read.assign(split=split))
        answer_ids += ids
        answers.append(choices)
    frame, respondents = pd.concat(people), pd.Index(answer_ids)
    report.read("people", len(frame))
    shared = frame.index[frame.index.duplicated()].union(respondents[respondents.duplicated()])
    dropped = {"id shared with another person": frame.index.isin(shared)}
    dropped["no row of answers"] = ~frame.index.isin(respondents) & ~dropped["id shared with another person"]
    for reason, these in dropped.items():
        report.drop("people", reason, these.sum())
    report.note("rows of answers without a person, left out", (~respondents.isin(frame.index)).sum())
    frame = frame[~np.logical_or.reduce(list(dropped.values()))]
    single = ~respondents.isin(shared)
    position = respondents[single].get_indexer(frame.index)
    return frame, np.concatenate(answers)[single][position]


def _taken(spoken: pd.Series, answers: np.ndarray, languages: Sequence[str] | None, report: Report) -> np.ndarray:
    """bool, `(people,)`: who was interviewed in one of the languages and answered something."""
    taken = np.ones(len(answers), dtype=bool)
    if languages is not None:
        missing = sorted(set(languages) - set(spoken))
        if missing:
            raise ValueError(f"`languages` names {missing}, in which no interview was held.")
        taken = spoken.isin(list(languages)).to_numpy()
        report.drop("people", "interview in another language", (~taken).sum())
    silent = taken & (answers < 0).all(axis=1)
    report.drop("people", "only blank answers", silent.sum())
    return taken & ~silent


class _Questions:
    """What a row has from its question: one entry per question, and one per option letter."""

    def __init__(self, asked: Mapping[str, ValueQuestion], groups: Sequence[str], prompts: PromptFormat, seed: int):
        self.texts = encoded(pa.array([prompts.question(entry.question) for entry in asked.values()]))
        self.letters = encoded(pa.array(list(OPTION_LETTERS)))
        self.num_options = np.array([len(entry.question.options) for entry in asked.values()], dtype=np.int32)
        self.keys = _keys(seed, "question", asked)
        self.columns = {
            "question_id": encoded(pa.array(list(asked))),
            "prompt_group": encoded(pa.array(groups)),
            "num_options": pa.array(self.num_options),
        }


class _People:
    """What a row has from its person: one entry for each of some people."""

    def __init__(
        self,
        profiles: pd.DataFrame,
        languages: pd.Series,
        weights: np.ndarray | None,
        answers: np.ndarray,
        keys: np.ndarray,
        prompts: PromptFormat,
    ) -> None:
        openings = [prompts.opening(profile, "survey") for profile in profiles.to_dict("records")]
        self.systems = encoded(pa.array([opening.system for opening in openings], pa.string()))
        self.prefixes = pa.array([opening.prefix for opening in openings], pa.string())
        self.answers, self.keys = answers, keys
        self.columns = {
            "demographic": profile_structs(profiles),
            "person_id": encoded(pa.array(profiles.index.to_numpy(dtype=object), pa.string())),
            "language": encoded(pa.array(languages.to_numpy(dtype=object), pa.string())),
        } | ({} if weights is None else {"weight": pa.array(weights, from_pandas=True)})


def _columns(
    people: _People,
    questions: _Questions,
    person: np.ndarray,
    question: np.ndarray,
    prompts: PromptFormat,
    task: str,
) -> dict[str, pa.Array]:
    """The columns of rows; `person` and `question` are their indices, `(rows,)` each."""
    by_person, by_question = pa.array(person), pa.array(question)
    choice = people.answers[person, question]
    text = questions.texts.take(by_question)
    if prompts.demographics == "user":
        text = joined(people.prefixes.take(by_person), text)
    asked = (("system", people.systems.take(by_person)), ("user", text))
    answer = ("assistant", questions.letters.take(pa.array(choice)))
    if prompts.messages:
        columns = {"messages": message_lists(*asked, answer)}
    elif task == "sft":
        columns = {"prompt": message_lists(*asked), "completion": message_lists(answer)}
    else:
        others = questions.num_options[question] - 1
        step = _draw(people.keys[person], questions.keys[question]) % others.astype(np.uint64)
        other = (choice + 1 + step.astype(np.int32)) % (others + 1)
        rejected = ("assistant", questions.letters.take(pa.array(other)))
        columns = {
            "prompt": message_lists(*asked),
            "chosen": message_lists(answer),
            "rejected": message_lists(rejected),
        }
    columns |= {name: values.take(by_person) for name, values in people.columns.items()}
    return columns | {name: values.take(by_question) for name, values in questions.columns.items()}


def _all_but(count: int, rows: np.ndarray, person_keys: np.ndarray, question_keys: np.ndarray) -> np.ndarray:
    """Of the `(people, questions)` rows marked, those beyond a uniform sample of `count`."""
    surplus = rows.copy()
    person, question = np.nonzero(rows)
    sample = np.argsort(_draw(person_keys[person], question_keys[question]), kind="stable")[:count]
    surplus[person[sample], question[sample]] = False
    return surplus


def _draw(person_keys: np.ndarray, question_keys: np.ndarray) -> np.ndarray:
    """
    A uniform 64-bit number per row (the finalizer of splitmix64, Steele et al. 2014), from its person and question: it
    does not depend on where the row stands.
    """
    number = person_keys + question_keys
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


def _keys(seed: int, kind: str, ids: Iterable[str]) -> np.ndarray:
    """A 64-bit number per id, `(ids,)`."""
    return np.frombuffer(b"".join(keyed_digest(seed, kind, name)[:8] for name in ids), dtype="<u8")
