# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
The files of WorldValuesBench, as its `data_preparation.py` leaves them: questions, people, answers.

    FOLDER/WorldValuesBench/{train,valid,test}/{train,valid,test}_{demographic,value}_qa.tsv
    FOLDER/dataset_construction/{question_metadata,codebook,answer_adjustment}.json

The two folders may also be one. Errors name file, row (the file's line) and column, never what somebody answered about
themselves.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv

from .people import known_text
from .survey import Question, one_line

PERSON = "D_INTERVIEW"
LANGUAGE = "S_INTLANGUAGE"
WEIGHT = "W_WEIGHT"
FIELDS = {
    "country": "B_COUNTRY",
    "age": "X003R",
    "gender": "Q260",
    "education": "Q275",
    "marital_status": "Q273",
    "religion": "Q289",
    "ethnicity": "Q290",
    "employment": "Q279",
}
"""Profile fields and their columns: the eight of arXiv 2601.04885, in its order."""

# "On a scale of 1 to 3, 1 meaning 'Better off' and 3 meaning 'Worse Off', how would you rate …?"
PREAMBLE = re.compile(r"^On a scale of (\d+) to (\d+), \1 meaning '(.*?)' and \2 meaning '(.*?)', (.*)$", re.DOTALL)
BLANK = frozenset({"", "nan", "NaN", "NA"})


@dataclass(frozen=True)
class ValueQuestion:
    """
    A value question and its scale.

    Args:
        question (`Question`): Options in the order of the scale; `short_text` and `short_options` are the codebook's.
        low (`int`): The number that stands for the first option.
        whole_text (`str`): The metadata's text, which names the scale and its ends.
    """

    question: Question
    low: int
    whole_text: str


def find_file(folder: Path, *names: str) -> Path:
    """The first of `names` in the places where the project keeps its files."""
    places = (
        folder,
        folder / "WorldValuesBench",
        folder / "dataset_construction",
        folder.parent / "dataset_construction",
    )
    for place in places:
        for name in names:
            if (place / name).is_file():
                return place / name
    raise FileNotFoundError(
        f"{folder} holds no {' or '.join(names)}. Name the checkout of WorldValuesBench in which data_preparation.py "
        "was run."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error}).") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(content).__name__}.")
    return content


def read_questions(folder: Path, wanted: Sequence[str] | None = None) -> dict[str, ValueQuestion]:
    """
    The value questions, with option texts on the *adjusted* scale, which the answers are on.

    Fifteen questions have answers that were re-ordered, merged or taken out (`answer_adjustment.json`), while the
    codebook keeps the raw codes. An option's text is that of the raw code that stays where it is; where none does, of
    the code that was moved there. The ends of the scale are worded as the question itself words them. Questions that
    share their text in the metadata (Q102 repeats Q101's, of another organization) have the codebook's.

    Args:
        folder (`Path`): The project's.
        wanted (`Sequence[str]`, *optional*): Question ids; by default all.

    Returns:
        `dict[str, ValueQuestion]`: By question id.

    Raises:
        `ValueError`: A wanted question is none of these, or the files do not agree about a question's scale.
    """
    metadata_file = find_file(folder, "question_metadata.json")
    codebook_file = find_file(folder, "codebook.json")
    metadata, codebook = read_json(metadata_file), read_json(codebook_file)
    adjustment_file = find_file(folder, "answer_adjustment.json")
    adjustment = read_json(adjustment_file)
    _check_objects(metadata_file, metadata)
    ids = [name for name, entry in metadata.items() if entry.get("use_case") == "value"]
    texts = Counter(one_line(str(metadata[name].get("question"))) for name in ids)
    if isinstance(wanted, str) or (wanted is not None and not wanted):
        raise ValueError(f"`questions` is {wanted!r}, expected a list such as ['Q1'], or None for all.")
    unknown = sorted(set(wanted or ()) - set(ids))
    if unknown:
        raise ValueError(f"`questions` names {unknown}, which are no value questions of {metadata_file}.")
    questions = {}
    for name in ids if wanted is None else [name for name in ids if name in set(wanted)]:
        low, high = metadata[name].get("answer_scale_min"), metadata[name].get("answer_scale_max")
        if not isinstance(low, int) or not isinstance(high, int):
            raise ValueError(f"{metadata_file}: question {name}: `answer_scale_min` and `_max` must be integers.")
        for file, entry in ((metadata_file, metadata[name]), (codebook_file, codebook.get(name))):
            if not isinstance(entry, dict) or not isinstance(entry.get("question"), str):
                raise ValueError(f"{file}: question {name} has no text `question`.")
        _check_codes(f"{codebook_file}: `choices` of question {name}", codebook[name].get("choices"))
        _check_codes(f"{adjustment_file}: question {name}", adjustment.get(name, {}))
        labels = _adjusted_labels(codebook[name]["choices"], adjustment.get(name, {}))
        if sorted(labels) != list(range(low, high + 1)):
            raise ValueError(
                f"{codebook_file}: the adjusted codes of question {name} are {sorted(labels)}, but its scale in "
                f"{metadata_file} goes from {low} to {high}."
            )
        options = [labels[code] for code in range(low, high + 1)]
        whole_text, worded = one_line(metadata[name]["question"]), list(options)
        text, preamble = whole_text, PREAMBLE.match(whole_text)
        if preamble:
            worded[0], worded[-1] = preamble[3].strip(), preamble[4].strip()
            text = preamble[5][:1].upper() + preamble[5][1:]
        if texts[whole_text] > 1:  # Q102 has the text of Q101; the codebook tells them apart
            text = one_line(codebook[name]["question"])
        question = Question(
            name,
            text,
            tuple(worded),
            short_text=one_line(codebook[name]["question"]),
            short_options=tuple(options),
        )
        questions[name] = ValueQuestion(question, low, whole_text)
    return questions


def _check_objects(path: Path, content: Mapping[str, Any]) -> None:
    for name, entry in content.items():
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: entry {name} is no JSON object.")


def _check_codes(where: str, codes: Any) -> None:
    """Raise a `ValueError` unless it maps whole numbers, as texts, to texts."""
    if not isinstance(codes, dict):
        raise ValueError(f"{where}: expected a JSON object.")
    for code, text in codes.items():
        if not re.fullmatch(r"-?\d+", code) or not isinstance(text, str):
            raise ValueError(f"{where}: {code!r} must be a whole number and have a text.")


def _adjusted_labels(choices: Mapping[str, str], adjustment: Mapping[str, str]) -> dict[int, str]:
    labels: dict[int, str] = {}
    for moved in (True, False):  # what stays where it is wins
        for code, label in choices.items():
            target = adjustment.get(code, code)
            if int(code) >= 0 and target != "" and (target != code) == moved:
                labels[int(target)] = one_line(label)
    return labels


def read_people(path: Path) -> tuple[pd.DataFrame, int]:
    """
    The people of a `*_demographic_qa.tsv`.

    Returns:
        `tuple[pd.DataFrame, int]`: Index `person_id`, columns `FIELDS` and `language` (of the interview), with `None`
        where a cell says nothing or holds a code that the codebook gives no label; and the number of such codes.
    """
    table = _read_texts(path, [PERSON, *FIELDS.values(), LANGUAGE], separator="\t")
    columns, unlabelled = {}, 0
    for field, column in [*FIELDS.items(), ("language", LANGUAGE)]:
        codes, values = pd.factorize(table[column].to_numpy(zero_copy_only=False))
        is_code = np.array([re.fullmatch(r"-?\d+(\.0)?", value) is not None for value in values], dtype=bool)
        unlabelled += int(is_code[codes].sum())
        texts = [known_text(field, value) for value in values]
        kept = [None if code else text for code, text in zip(is_code, texts, strict=True)]
        columns[field] = np.array(kept, dtype=object)[codes]
    return pd.DataFrame(columns, index=pd.Index(_ids(table, path), name="person_id"), dtype=object), unlabelled


def read_answers(path: Path, questions: Mapping[str, ValueQuestion]) -> tuple[list[str], np.ndarray]:
    """
    The answers of a `*_value_qa.tsv`.

    Returns:
        `tuple[list[str], np.ndarray]`: Person ids, and `(people, questions)` int8: the chosen option, 0 the first, -1
        where there is no answer.

    Raises:
        `ValueError`: A column is missing, or a cell is no whole number of the question's scale.
    """
    table = _read_texts(path, [PERSON, *questions], separator="\t")
    answers = np.full((len(table), len(questions)), -1, dtype=np.int8)
    for index, (name, asked) in enumerate(questions.items()):
        low, num_options = asked.low, len(asked.question.options)
        codes, texts = pd.factorize(table[name].to_numpy(zero_copy_only=False))
        choices = np.empty(len(texts), dtype=np.int16)
        for position, text in enumerate(texts):
            choice = _choice(text, low, num_options)
            if choice is None:
                line = int(np.argmax(codes == position)) + 2
                raise ValueError(
                    f"{path}, line {line}, column {name}: {text!r} is no whole number from {low} to "
                    f"{low + num_options - 1}, nor blank. Was the file written by data_preparation.py, with "
                    "the same answer_adjustment.json?"
                )
            choices[position] = choice
        answers[:, index] = choices[codes]
    return _ids(table, path), answers


def _choice(text: str, low: int, num_options: int) -> int | None:
    """The option for a cell's text: -1 for none, `None` if it is neither. pandas writes gappy columns as "3.0"."""
    if text in BLANK:
        return -1
    try:
        value = float(text)
    except ValueError:
        return None
    if not value.is_integer() or value - low >= num_options or 0 <= value < low:
        return None
    return -1 if value < 0 else int(value) - low


def read_weights(path: Path, people: Sequence[str]) -> np.ndarray:
    """
    `W_WEIGHT` of each person from the World Values Survey's own CSV, NaN where it has none, or several.

    Raises:
        `ValueError`: A column is missing, a weight is no positive number, or nobody has one.
    """
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        separator = max(",;\t", key=file.readline().count)
    table = _read_texts(path, [PERSON, WEIGHT], separator=separator)
    weights = pd.to_numeric(pd.Series(table[WEIGHT].to_numpy(zero_copy_only=False)), errors="coerce").to_numpy(float)
    blank = np.isin(table[WEIGHT].to_numpy(zero_copy_only=False).astype(str), list(BLANK))
    bad = ~blank & ~((weights > 0) & np.isfinite(weights))
    if bad.any():
        raise ValueError(f"{path}, line {int(np.argmax(bad)) + 2}, column {WEIGHT}: not a positive number.")
    by_person = pd.Series(weights, index=_ids(table, path))
    found = by_person[~by_person.index.duplicated(keep=False)].reindex(people).to_numpy()
    if np.isnan(found).all():
        raise ValueError(f"{path} has a weight of none of the people. Name the file that they are from.")
    return found


def _read_texts(path: Path, columns: Sequence[str], separator: str) -> pa.Table:
    """Columns of a separated file as texts, `""` where a cell is empty."""
    try:
        return csv.read_csv(
            path,
            read_options=csv.ReadOptions(use_threads=False),  # else errors don't know their row
            parse_options=csv.ParseOptions(delimiter=separator, ignore_empty_lines=False),
            convert_options=csv.ConvertOptions(
                include_columns=list(columns), column_types=dict.fromkeys(columns, pa.string())
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        message = re.sub(r"(got \d+): .*", r"\1", str(error), flags=re.DOTALL)  # pyarrow quotes the row: a profile
        message = re.sub(r"column #(\d+)", lambda found: f"column {columns[int(found[1])]}", message)
        raise ValueError(f"{path}: {message}.") from None


def _ids(table: pa.Table, path: Path) -> list[str]:
    """Interview ids as texts, "8070001" also where pandas wrote "8070001.0"."""
    ids = [text.removesuffix(".0") for text in table[PERSON].to_pylist()]
    for row, text in enumerate(ids):
        if not text.isdigit():
            raise ValueError(f"{path}, line {row + 2}, column {PERSON}: not a whole number.")
    return ids
