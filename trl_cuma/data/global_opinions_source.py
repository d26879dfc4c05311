# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""GlobalOpinionQA as it is published and as it is passed on: both layouts, read and checked, nothing judged."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict

from .reading import Row, open_table
from .survey import OPTION_LETTERS, one_line

# The two surveys behind the data set name these countries differently; no question holds both names.
COUNTRY_ALIASES = {
    "S. Korea": "South Korea",
    "Czech Rep.": "Czechia",
    "Great Britain": "Britain",
    "Taiwan ROC": "Taiwan",
}

HUB_COLUMNS = ("question", "selections", "options")

_DEFAULTDICT = re.compile(r"defaultdict\(<class '\w+'>, (.*)\)", re.DOTALL)


class SourceQuestion(NamedTuple):
    """
    A question as its source has it.

    Attributes:
        question_id (`str`, *optional*): The source's own id, where it gives one.
        text (`str`): The wording, `""` where there is none.
        options (`list[str]`): `""` for an option without a text.
        shares (`list[tuple[str, list[float | None]]]`): A country, and the share of each option.
    """

    question_id: str | None
    text: str
    options: list[str]
    shares: list[tuple[str, list[float | None]]]


def read_source(source: str | os.PathLike[str] | Dataset | DatasetDict) -> list[SourceQuestion]:
    """
    Read GlobalOpinionQA in either layout.

    Args:
        source (`str`, `PathLike`, `Dataset` or `DatasetDict`): A `.jsonl` file of one object per question and country;
            or the layout of the Hub in any form that [`open_table`] takes.

    Returns:
        `list[SourceQuestion]`: In the source's order.

    Raises:
        `ValueError`: Something is malformed; the message names file, line or row, and column, never a country.
        `FileNotFoundError`: There is no such file.
    """
    if not isinstance(source, Dataset | DatasetDict) and Path(source).suffix == ".jsonl":
        questions: dict[str, SourceQuestion] = {}
        for row in read_jsonl(source):
            text = one_line(row["question"])
            question = SourceQuestion(row["qid"], text, list(map(one_line, row["options"])), [])
            question = questions.setdefault(row["qid"], question)
            if question.text != text:
                raise ValueError(
                    f"{source}, line {row['line']}: field `question` differs from an earlier line's of the same qid "
                    f"({row['qid']!r}), by more than white space. Give different questions different `qid`s."
                )
            question.shares.append((row["published_country"], row["dist"]))
        return list(questions.values())
    return [_hub_question(row) for row in open_table(source).rows(HUB_COLUMNS)]


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """
    Read and check every row of the JSONL layout. Errors never name a country.

    Of each row, `country` is the one name of its country, `published_country` what it says, and `line` where it is.
    """
    rows: list[dict[str, Any]] = []
    first_line: dict[tuple[str, str], int] = {}
    first_options: dict[str, tuple[int, list[str]]] = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            row = _check_row(line, where)
            row["published_country"] = row["country"]
            row["country"] = COUNTRY_ALIASES.get(row["country"], row["country"])
            key = (row["qid"], row["country"])
            if key in first_line:
                raise ValueError(
                    f"{where}: fields `qid` and `country` repeat those of line {first_line[key]} "
                    f"(qid {row['qid']!r}). Keep one row per question and country."
                )
            first_line[key] = number
            earlier, options = first_options.setdefault(row["qid"], (number, row["options"]))
            if row["options"] != options:
                raise ValueError(
                    f"{where}: field `options` differs from that of line {earlier} (qid {row['qid']!r}). Give "
                    "questions with different options different `qid`s."
                )
            rows.append(row | {"line": number})
    if not rows:
        raise ValueError(f"{path}: the file holds no rows.")
    return rows


def _check_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        # `from None`: the cause would carry the whole line, country and all.
        raise ValueError(f"{where}: not a JSON object ({error.msg} at column {error.colno}).") from None
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{where}: has half of a surrogate pair, which is no text.") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: not a JSON object but a {type(row).__name__}.")
    for field in ("qid", "question", "country", "options", "dist"):
        if field not in row:
            raise ValueError(f"{where}: field `{field}` is missing.")
    for field in ("qid", "question", "country"):
        if not isinstance(row[field], str) or not row[field].strip():
            raise ValueError(f"{where}: field `{field}` must be a text that is not empty.")
    options, dist = row["options"], row["dist"]
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ValueError(f"{where}: field `options` must be a list of texts.")
    if not 2 <= len(options) <= len(OPTION_LETTERS):
        raise ValueError(f"{where}: field `options` must hold 2 to {len(OPTION_LETTERS)} texts, got {len(options)}.")
    if not isinstance(dist, list) or not all(type(share) in (int, float) for share in dist):
        raise ValueError(f"{where}: field `dist` must be a list of numbers.")
    if len(dist) != len(options):
        raise ValueError(f"{where}: field `dist` holds {len(dist)} numbers for {len(options)} `options`.")
    if not all(share >= 0 for share in dist):  # also refuses NaN
        raise ValueError(f"{where}: field `dist` must not be negative, got {min(dist)}.")
    if not abs(sum(dist) - 1) <= 1e-3:
        raise ValueError(f"{where}: field `dist` must sum to 1 (within 0.001), got {sum(dist):.4f}.")
    return row


def _hub_question(row: Row) -> SourceQuestion:
    """A row of the Hub's layout. What is blank stays blank; what can't be read is an error."""
    question = SourceQuestion(None, one_line(row.text("question") or ""), [], [])
    for option in _literal(row, "options", list):
        if not (option is None or type(option) in (str, int, float)):
            raise row.error("options", f"an option is a {type(option).__name__}, expected a text.")
        text = row.checked_text("options", str(option)) if option is not None else None
        question.options.append(one_line(text or ""))
    for country, shares in _literal(row, "selections", dict).items():
        name = row.checked_text("selections", country)
        if name is None:
            raise row.error("selections", "the name of a country is blank.")
        if not isinstance(shares, list) or not all(share is None or type(share) in (int, float) for share in shares):
            raise row.error("selections", "a country's value is not a list of numbers.")
        if not all(share is None or 0 <= share < float("inf") for share in shares):
            raise row.error("selections", "a share is negative or infinite.")
        question.shares.append((one_line(name), shares))
    return question


class _NanToNone(ast.NodeTransformer):
    """`nan` is how Python writes a missing number in a list: a name, which is no literal."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(None) if node.id == "nan" else node


def _literal(row: Row, column: str, kind: type) -> Any:
    """What a cell says in Python's notation: a list or a dict. Nothing is evaluated but literals."""
    text = row.text(column)
    if text is None:
        return kind()
    wrapped = _DEFAULTDICT.fullmatch(text)
    try:
        tree = ast.parse((wrapped[1] if wrapped else text).strip(), mode="eval")
        literal = ast.literal_eval(_NanToNone().visit(tree))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        # `from None`: the cause would carry the text, countries and all.
        raise row.error(column, f"not a {kind.__name__} in Python's notation.") from None
    if not isinstance(literal, kind):
        raise row.error(column, f"expected a {kind.__name__} in Python's notation, got a {type(literal).__name__}.")
    return literal
