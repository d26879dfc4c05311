# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Community Alignment: up to four turns, at each of which an annotator picked one of four answers."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from typing import Literal

import pandas as pd
from datasets import Dataset, DatasetDict

from .conversations import (
    Head,
    Turn,
    Turns,
    check_languages,
    clean_candidate,
    clean_text,
    convert_conversations,
)
from .conversion import Conversion
from .licenses import COMMUNITY_ALIGNMENT
from .people import MIN_COUNT, known_text
from .prompts import PromptFormat
from .reading import Row, open_table
from .report import Report
from .splits import SplitOptions

HUB_ID = "facebook/community-alignment-dataset"
FIELDS = {
    "age": "annotator_age",
    "gender": "annotator_gender",
    "country": "annotator_country",
    "political": "annotator_political",
    "ethnicity": "annotator_ethnicity",
    "education": "annotator_education_level",
}
"""Profile field and column, in the order in which a prompt states them."""

SUBSETS = ("in_balanced_subset", "in_balanced_subset_10")
TURNS = ("first", "second", "third", "fourth")
LETTERS = "abcd"
_TURN_COLUMNS = {
    turn: [f"{turn}_turn_{name}" for name in ("prompt", "preferred_response", *(f"response_{x}" for x in LETTERS))]
    for turn in TURNS
}


def convert_community_alignment(
    source: str | os.PathLike[str] | Dataset | DatasetDict = HUB_ID,
    *,
    task: Literal["sft", "dpo", "choice"] = "sft",
    prompts: PromptFormat | None = None,
    splits: SplitOptions | None = None,
    min_count: int = MIN_COUNT,
    keep_unknown: bool = False,
    languages: Sequence[str] | None = None,
    subset: Literal["in_balanced_subset", "in_balanced_subset_10"] | None = None,
    config: str | None = None,
    source_split: str | None = None,
) -> Conversion:
    """
    Community Alignment (Zhang et al., 2025) in TRL's columns.

    Each row is a turn: the conversation up to it, with the answers that the annotator chose. All turns of a
    conversation are in the split of its opening prompt, together with all near-duplicates of that prompt.

    What is left out or changed, each counted in the report:
    - A conversation: of another language or not in the subset; without an opening prompt; whose annotator and prompt
      are in different splits; without a turn that can be used, or that gives a row.
    - A turn: without a prompt, with a preferred response that is missing, unknown, or has no text. What follows it, or
      follows a gap, was said in an unknown context, and is left out too: the turns before it stay.
    - A candidate that is null, blank or "EMPTY STRING". A final `<|end_of_text|>` is cut off.
    - A pair: whose rejected text is the chosen one, or comes twice in the turn. A turn without a pair goes.
    - In the choice: a turn that has not four different candidates. It stays in the context of the next.
    - A profile: "Prefer not to say" is unknown; "I don't think of myself in this way" (political) is an answer. People
      of whom nothing is known are left out, unless `keep_unknown`. A field that differs between an annotator's rows
      (by more than case) is unknown.

    In the four-way choice, the prompt asks for the letter of the preferred candidate. Their order is drawn by a hash
    of seed, conversation and turn: annotators chose the last place more often than the first, and would teach it.

    Neither feedback texts nor any other column than those named here is read.

    Args:
        source (`str`, `PathLike`, `Dataset` or `DatasetDict`, defaults to the id on the Hub): What
            [`~trl_cuma.data.reading.open_table`] opens.
        task (`str`, defaults to `"sft"`): `"sft"`: the chosen response. `"dpo"`: the chosen one over each of the
            others. `"choice"`: the letter of the chosen one among the four.
        prompts (`PromptFormat`, *optional*): The wording.
        splits (`SplitOptions`, *optional*): What is held out.
        min_count (`int`, defaults to `30`): Profile values that fewer people hold are grouped as "Other". The people
            counted are those with a conversation of the wanted languages and subset, before any split.
        keep_unknown (`bool`, defaults to `False`): Keep people of whom no field is known, for adapters with
            `missing_demographics="zero"`.
        languages (`Sequence[str]`, *optional*): Values of `assigned_lang` to keep, such as `["en"]`.
        subset (`str`, *optional*): Only the rows that this column marks.
        config (`str`, *optional*): The configuration on the Hub, or of a folder.
        source_split (`str`, *optional*): The split on the Hub, of a `DatasetDict` or of a folder; "train" on the Hub.

    Returns:
        [`Conversion`]: Columns of the task, `demographic`, `person_id` (`annotator_id`), `conversation_id`, `turn`,
        `prompt_group`, `language` (`assigned_lang`: which one the annotator was to write in).

    Raises:
        `ValueError`: An argument is out of its range, or a row is malformed; the message names file, row and column.
        `FileNotFoundError`: There is nothing at `source`.
    """
    if subset is not None and subset not in SUBSETS:
        raise ValueError(f"`subset` is {subset!r}, expected one of {list(SUBSETS)}, or None for all rows.")
    wanted = check_languages(languages)
    table = open_table(source, config=config, split=source_split)

    def read_heads(report: Report) -> tuple[list[Head], pd.DataFrame]:
        columns = ["conversation_id", "annotator_id", "assigned_lang", "first_turn_prompt", *FIELDS.values()]
        heads: dict[str, Head] = {}
        seen: set[str] = set()
        answers: dict[str, dict[str, set[str | None]]] = defaultdict(lambda: {field: set() for field in FIELDS})
        for row in table.rows(columns + ([subset] if subset else [])):
            report.read("conversations")
            conversation, person = row.identifier("conversation_id"), row.identifier("annotator_id")
            if conversation in seen:
                raise row.error("conversation_id", "an earlier row has the same id. Keep one row per conversation.")
            seen.add(conversation)
            given = answers[person]
            for field, column in FIELDS.items():
                given[field].add(row.text(column))
            language, prompt = row.text("assigned_lang"), clean_text(row.text("first_turn_prompt"))
            left_out = None
            if subset and not row.flag(subset):
                left_out = f"not in the subset `{subset}`"
            elif wanted is not None and language not in wanted:
                left_out = "of another language, or of none"
            if prompt is None:
                report.drop("conversations", "no opening prompt")
            else:
                heads[conversation] = Head(conversation, person, prompt, language, left_out)
        return list(heads.values()), _profiles(answers, report)

    def read_turns(kept: Container[str], report: Report) -> Iterator[tuple[str, Turns]]:
        for row in table.rows(["conversation_id", *(column for turn in TURNS for column in _TURN_COLUMNS[turn])]):
            conversation = row.identifier("conversation_id")
            if conversation in kept:
                yield conversation, [_turn(row, number, report) for number in range(len(TURNS))]

    return convert_conversations(
        "Community Alignment",
        read_heads,
        read_turns,
        fields=list(FIELDS),
        task=task,
        tasks=("sft", "dpo", "choice"),
        prompts=prompts,
        splits=splits,
        min_count=min_count,
        keep_unknown=keep_unknown,
        license=COMMUNITY_ALIGNMENT,
    )


def _profiles(answers: dict[str, dict[str, set[str | None]]], report: Report) -> pd.DataFrame:
    """
    One profile per annotator, from the answers in all their rows.

    Where some rows hold an answer and others none, it is that answer, in the first of its spellings where they differ
    by case alone. Where the answers differ, nobody knows which one holds: the field becomes unknown.
    """
    profiles = []
    for given in answers.values():
        profile: list[str | None] = []
        for field, texts in given.items():
            known = {known_text(field, text) for text in texts} - {None}
            num_answers = len({text.casefold() for text in known})
            if num_answers > 1:
                report.note(f"people whose rows differ in `{field}`, which becomes unknown")
            profile.append(min(known) if num_answers == 1 else None)
        profiles.append(profile)
    return pd.DataFrame(profiles, index=list(answers), columns=list(FIELDS), dtype=object)


def _turn(row: Row, number: int, report: Report) -> Turn | str | None:
    prompt, preferred, *responses = (row.text(column) for column in _TURN_COLUMNS[TURNS[number]])
    if not any(clean_text(text) for text in (prompt, preferred, *responses)):
        return None  # null, or filled up with "EMPTY STRING"
    prompt, preferred = clean_text(prompt, report), clean_text(preferred)
    texts = {f"response_{x}": clean_candidate(text, report) for x, text in zip(LETTERS, responses, strict=True)}
    if prompt is None:
        return "no prompt"
    if preferred is None:
        return "no preferred response"
    if preferred not in texts:
        return "an unknown preferred response"
    if texts[preferred] is None:
        return "the preferred response has no text"
    candidates = {name: text for name, text in texts.items() if text is not None}
    return Turn(number, prompt, tuple(candidates.values()), list(candidates).index(preferred))
