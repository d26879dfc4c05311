# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""PRISM: conversations of surveyed people with language models, who scored each answer."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from .conversations import Head, Turn, Turns, check_languages, clean_candidate, clean_text, convert_conversations
from .conversion import Conversion
from .licenses import PRISM
from .people import MIN_COUNT
from .prompts import PromptFormat
from .reading import SUFFIXES, Row, Table, open_table
from .report import Report
from .splits import SplitOptions

HUB_ID = "HannahRoseKirk/prism-alignment"
FIELDS = {
    "country": "location.reside_country",
    "age": "age",
    "gender": "gender",
    "education": "education",
    "religion": "religion.simplified",
    "ethnicity": "ethnicity.simplified",
    "employment": "employment_status",
}
"""Profile field and column of the survey, in the order in which a prompt states them."""

SUBSETS = ("included_in_balanced_subset",)
HISTORY = "conversation_history"


def convert_prism(
    source: str | os.PathLike[str] = HUB_ID,
    *,
    task: Literal["sft", "dpo"] = "sft",
    prompts: PromptFormat | None = None,
    splits: SplitOptions | None = None,
    min_count: int = MIN_COUNT,
    keep_unknown: bool = False,
    languages: Sequence[str] | None = None,
    subset: Literal["included_in_balanced_subset"] | None = None,
) -> Conversion:
    """
    PRISM (Kirk et al., 2024; arXiv 2404.16019) in TRL's columns.

    Each row is a turn: the conversation up to it, with the answers that the person chose; turns are ordered by `turn`,
    candidates by `within_turn_id`. All turns of a conversation are in the split of its opening prompt, together with
    all near-duplicates of that prompt.

    What is left out or changed, each counted in the report:
    - A conversation: of another language or not in the subset; whose person is not in the survey; without an opening
      prompt; whose person and prompt are in different splits; without a turn that can be used, or that gives a
      row.
    - A turn: that has not exactly one prompt, no chosen answer (`if_chosen`), several with different texts, or one
      without text. What follows it was said in an unknown context, and is left out too: the turns before it stay.
      Several chosen answers of the same text are one, with the highest of their scores.
    - A candidate that is null, blank or "EMPTY STRING".
    - A pair: whose rejected text is the chosen one or comes twice in the turn; of equal scores (the chosen one was
      drawn at random then); whose rejected answer has the higher score (the two records contradict each other). The
      chosen answer stays in SFT and in the context: with it the conversation went on.
    - A profile: "Prefer not to say" is unknown; "No Affiliation" (religion) is an answer. People of whom nothing is
      known are left out, unless `keep_unknown`. People of the survey who had no conversation are left out.

    Of the survey, the columns of `FIELDS` alone are read: no self-description and no other text in a person's words.

    Args:
        source (`str` or `PathLike`, defaults to the id on the Hub): The data set on the Hub, or a folder with
            `survey.jsonl`, `conversations.jsonl` and, for the language, `metadata.jsonl` (or `.json`, `.parquet`, or
            folders of these names).
        task (`str`, defaults to `"sft"`): `"sft"`: the chosen answer. `"dpo"`: the chosen one over each of the others.
        prompts (`PromptFormat`, *optional*): The wording.
        splits (`SplitOptions`, *optional*): What is held out.
        min_count (`int`, defaults to `30`): Profile values that fewer people hold are grouped as "Other". The people
            counted are those with a conversation of the wanted languages and subset, before any split.
        keep_unknown (`bool`, defaults to `False`): Keep people of whom no field is known, for adapters with
            `missing_demographics="zero"`.
        languages (`Sequence[str]`, *optional*): Languages of the opening prompt to keep, such as `["en"]`.
        subset (`str`, *optional*): Only the conversations that this column marks.

    Returns:
        [`Conversion`]: Columns of the task, `demographic`, `person_id` (`user_id`), `conversation_id`, `turn`,
        `prompt_group`, `language`: of the opening prompt as `metadata` has it (detected by langid), null without it.

    Raises:
        `ValueError`: An argument is out of its range, or a row is malformed; the message names file, row and column.
        `FileNotFoundError`: A table is missing.
        `TypeError`: `source` is a loaded data set, of which this one would need three.
    """
    if subset is not None and subset not in SUBSETS:
        raise ValueError(f"`subset` is {subset!r}, expected {SUBSETS[0]!r}, or None for all conversations.")
    if not isinstance(source, str | os.PathLike):
        raise TypeError(
            f"`source` is a {type(source).__name__}, expected a folder or an id on the Hub: PRISM has several tables."
        )
    wanted = check_languages(languages)
    survey, conversations = _open(source, "survey"), _open(source, "conversations")
    metadata = _open(source, "metadata", required=wanted is not None)

    def read_heads(report: Report) -> tuple[list[Head], pd.DataFrame]:
        people = _people(survey)
        spoken = {} if metadata is None else _opening_languages(metadata)
        heads: dict[str, Head] = {}
        seen: set[str] = set()
        for row in conversations.rows(["conversation_id", "user_id", HISTORY] + ([subset] if subset else [])):
            report.read("conversations")
            conversation, person = row.identifier("conversation_id"), row.identifier("user_id")
            if conversation in seen:
                raise row.error("conversation_id", "an earlier row has the same id. Keep one row per conversation.")
            seen.add(conversation)
            language, prompt = spoken.get(conversation), _opening_prompt(row)
            left_out = None
            if subset and not row.flag(subset):
                left_out = f"not in the subset `{subset}`"
            elif wanted is not None and language not in wanted:
                left_out = "of another language, or of none"
            if person not in people.index:
                report.drop("conversations", "the person is not in the survey")
            elif prompt is None:
                report.drop("conversations", "no opening prompt")
            else:
                heads[conversation] = Head(conversation, person, prompt, language, left_out)
        return list(heads.values()), people

    def read_turns(kept: Container[str], report: Report) -> Iterator[tuple[str, Turns]]:
        for row in conversations.rows(["conversation_id", HISTORY]):
            conversation = row.identifier("conversation_id")
            if conversation in kept:
                yield conversation, _turns(row, report)

    return convert_conversations(
        "PRISM",
        read_heads,
        read_turns,
        fields=list(FIELDS),
        task=task,
        tasks=("sft", "dpo"),
        prompts=prompts,
        splits=splits,
        min_count=min_count,
        keep_unknown=keep_unknown,
        license=PRISM,
    )


def _open(source: str | os.PathLike[str], name: str, required: bool = True) -> Table | None:
    """A table of the data set: a configuration on the Hub, else a file or a folder of its name."""
    folder = Path(source)
    if not folder.exists():
        return open_table(source, config=name)
    if folder.is_dir():
        for path in [folder / name, *(folder / f"{name}{suffix}" for suffix in SUFFIXES)]:
            if path.exists():
                return open_table(path)
    if required:
        raise FileNotFoundError(f"{folder} is no folder with {name}.jsonl (or .json, .parquet, or a folder {name}).")
    return None


def _people(survey: Table) -> pd.DataFrame:
    profiles: dict[str, list[str | None]] = {}
    for row in survey.rows(["user_id", *FIELDS.values()]):
        person = row.identifier("user_id")
        if person in profiles:
            raise row.error("user_id", "an earlier row has the same id. Keep one row per person.")
        profiles[person] = [row.text(column) for column in FIELDS.values()]
    return pd.DataFrame(list(profiles.values()), index=list(profiles), columns=list(FIELDS), dtype=object)


def _opening_languages(metadata: Table) -> dict[str, str]:
    """
    The language of each conversation's opening prompt.

    `metadata` has one row per text. Prompts go by an `interaction_id`, "int7": the interactions are numbered by
    conversation and turn, so the lowest number of a conversation is its opening.
    """
    first: dict[str, tuple[int, str | None]] = {}
    for row in metadata.rows(["column_id", "conversation_id", "interaction_id", "language_flag"]):
        if row.text("column_id") == "user_prompt":
            conversation, interaction = row.identifier("conversation_id"), row.identifier("interaction_id")
            digits = interaction.removeprefix("int")
            if not digits.isdecimal():
                raise row.error("interaction_id", 'expected "int" and a number.')
            entry = (int(digits), row.text("language_flag"))
            if conversation not in first or entry[0] < first[conversation][0]:
                first[conversation] = entry
    return {conversation: language for conversation, (_, language) in first.items() if language is not None}


def _history(row: Row) -> list[dict[str, Any]]:
    """The entries of a conversation, with their types checked."""
    history = row.cells[HISTORY]
    if not isinstance(history, list):
        raise row.error(HISTORY, f"expected a list, got {type(history).__name__}.")
    for place, entry in enumerate(history):
        if not isinstance(entry, dict):
            raise row.error(HISTORY, f"entry {place} is no object but {type(entry).__name__}.")
        if entry.get("role") not in ("user", "model"):
            raise row.error(HISTORY, f"the `role` of entry {place} is neither 'user' nor 'model'.")
        if not _is_a(entry.get("turn"), int):
            raise row.error(HISTORY, f"the `turn` of entry {place} is no integer.")
        if entry["role"] == "model":
            if not isinstance(entry.get("if_chosen"), bool):
                raise row.error(HISTORY, f"`if_chosen` of entry {place} is neither true nor false.")
            if entry.get("score") is not None and not _is_a(entry["score"], int | float):
                raise row.error(HISTORY, f"the `score` of entry {place} is no number.")
            place_id = entry.get("within_turn_id")
            if not _is_a(place_id, int | str) and not (isinstance(place_id, float) and place_id.is_integer()):
                raise row.error(HISTORY, f"`within_turn_id` of entry {place} is no integer and no text.")
    return history


def _is_a(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # which is an int to Python


def _opening_prompt(row: Row) -> str | None:
    """What the person asked in turn 0: this, and not the column `opening_prompt`, is what the rows will hold."""
    texts = [
        clean_text(row.checked_text(HISTORY, entry.get("content")))
        for entry in _history(row)
        if entry["turn"] == 0 and entry["role"] == "user"
    ]
    return texts[0] if len(texts) == 1 else None


def _turns(row: Row, report: Report) -> list[Turn | str | None]:
    by_number: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for entry in _history(row):
        by_number[entry["turn"]].append(entry)
    turns: list[Turn | str | None] = []
    for place, number in enumerate(sorted(by_number)):
        turns += [None] if number != place else []  # a gap
        turns.append(_turn(row, number, by_number[number], report))
    return turns


def _turn(row: Row, number: int, entries: list[dict[str, Any]], report: Report) -> Turn | str:
    asked = [entry for entry in entries if entry["role"] == "user"]
    if len(asked) != 1:
        return "no prompt, or several"
    prompt = clean_text(row.checked_text(HISTORY, asked[0].get("content")), report)
    answers = []
    for entry in entries:
        if entry["role"] == "model":
            text = clean_candidate(row.checked_text(HISTORY, entry.get("content")), report)
            place, score = entry["within_turn_id"], entry.get("score")
            # As floats where a table had gaps: 3.0 is "3", and a score that is not there NaN.
            place = str(int(place) if isinstance(place, float) else place)
            score = None if score is None or math.isnan(score) else score
            answers.append((place, text, score, entry["if_chosen"]))
    answers.sort(key=lambda answer: (len(answer[0]), answer[0], answer[1] or ""))  # "2" before "10"
    chosen_texts = {text for _, text, _, chosen in answers if chosen}
    if prompt is None:
        return "no prompt, or several"
    if not chosen_texts:
        return "no chosen answer"
    if len(chosen_texts) > 1:
        return "several chosen answers with different texts"
    if None in chosen_texts:
        return "the chosen answer has no text"
    answers = [answer for answer in answers if answer[1] is not None]
    scores = tuple(score for _, _, score, _ in answers)
    places = [place for place, answer in enumerate(answers) if answer[3]]
    if len(places) > 1:
        report.note("turns with several chosen answers of one text, taken as one")
    chosen = max(places, key=lambda place: -1 if scores[place] is None else scores[place])
    if any(score is not None and scores[chosen] is not None and score > scores[chosen] for score in scores):
        report.note("turns whose chosen answer has a lower score than another, kept")
    return Turn(number, prompt, tuple(text for _, text, _, _ in answers), chosen, scores)
