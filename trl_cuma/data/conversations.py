# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Conversations in which a person picks one of several answers at each turn: what two sources have in common."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
from datasets import Value
from tqdm.auto import tqdm

from .conversion import Conversion, check_task, row_features
from .duplicates import near_duplicate_groups
from .keyed import keyed_digest
from .people import canonical_people
from .prompts import Opening, PromptFormat
from .report import Report
from .splits import ANY, DROPPED, SPLITS, TRAIN, SplitOptions, split_people, split_prompts, split_rows
from .survey import OPTION_LETTERS

EMPTY = "EMPTY STRING"  # what stands for an empty text in the published files
END_OF_TEXT = "<|end_of_text|>"
NUM_CHOICES = 4
ROWS_PER_BATCH = 10_000
THRESHOLD = 0.7
"""
Similarity of near-duplicate opening prompts. Higher than for a survey's questions: what people ask in their own words
begins alike ("What are your thoughts on …?") and would grow into one huge group.
"""

_NO_ROW = {"dpo": "no pair", "choice": "no choice"}  # why usable turns give none

_ROLE_NAME = re.compile(r"(?:assistant|human|user|system|bot|ai|model)\s*:", re.IGNORECASE)


class Turn(NamedTuple):
    """
    What a person asked, what it was answered, and which answer the person chose.

    Attributes:
        number (`int`): From 0.
        prompt (`str`): The person's text.
        candidates (`tuple[str, ...]`): The answers that have a text, in the order of the source's ids for them.
        chosen (`int`): Which of them was chosen.
        scores (`tuple[float | None, ...]`, *optional*): The person's score of each, where the source has scores.
    """

    number: int
    prompt: str
    candidates: tuple[str, ...]
    chosen: int
    scores: tuple[float | None, ...] | None = None


class Head(NamedTuple):
    """
    What a conversation is split by.

    Attributes:
        conversation_id (`str`): Unique.
        person_id (`str`): Whose it is.
        prompt (`str`): Its opening prompt.
        language (`str`, *optional*): `None` where it is not known.
        left_out (`str`, *optional*): Why it is not asked for, such as another language. It is split all the same, so
            that the others are in the same splits whatever is asked for.
    """

    conversation_id: str
    person_id: str
    prompt: str
    language: str | None
    left_out: str | None = None


Turns = Iterable[Turn | str | None]
"""A conversation's turns in order. A text is why a turn can't be used; `None` is a turn that is not there."""


def clean_text(text: str | None, report: Report | None = None) -> str | None:
    """
    A text as a model should read it, or `None` where there is none ("EMPTY STRING").

    A final `<|end_of_text|>` is cut off, and one inside becomes a line break: a tokenizer may read it as the token.
    """
    if text is None or text == EMPTY:
        return None
    if END_OF_TEXT in text:
        if report is not None:
            where = "at the end, cut off" if text.endswith(END_OF_TEXT) else "inside, now a line break"
            report.note(f"texts with {END_OF_TEXT} {where}")
        parts = [part.strip() for part in text.split(END_OF_TEXT)]
        return clean_text("\n".join(filter(None, parts)) or None)
    return text


def clean_candidate(text: str | None, report: Report) -> str | None:
    """[`clean_text`] for an answer; counts what is missing, and what begins with a role's name, which stays."""
    text = clean_text(text, report)
    if text is None:
        report.note("candidates without text, left out")
    elif _ROLE_NAME.match(text):
        report.note('candidates that begin with a role\'s name ("Assistant:"), kept')
    return text


def check_languages(languages: Sequence[str] | None) -> frozenset[str] | None:
    """The languages to keep; `None` for all. A text is an error: it would be read letter by letter."""
    if languages is None:
        return None
    if isinstance(languages, str) or not languages:
        raise ValueError(f"`languages` is {languages!r}, expected a list such as ['en'], or None for all.")
    return frozenset(languages)


def convert_conversations(
    title: str,
    read_heads: Callable[[Report], tuple[list[Head], pd.DataFrame]],
    read_turns: Callable[[Container[str], Report], Iterator[tuple[str, Turns]]],
    *,
    fields: Sequence[str],
    task: str,
    tasks: Sequence[str],
    prompts: PromptFormat | None,
    splits: SplitOptions | None,
    min_count: int,
    keep_unknown: bool,
    license: str,
) -> Conversion:
    """
    Conversations in TRL's columns: a first pass over what they are split by, a second one over their texts.

    Args:
        title (`str`): Of the source.
        read_heads (`Callable`): Counts people and conversations, and returns the conversations to split and the raw
            profiles of everyone in the source, index `person_id`.
        read_turns (`Callable`): Yields the turns of the conversations whose ids are in the container.
        fields (`Sequence[str]`): Profile fields, in the order in which a prompt states them.
        task (`str`): One of `tasks`.
        tasks (`Sequence[str]`): Those the source has.
        prompts (`PromptFormat`, *optional*): The wording.
        splits (`SplitOptions`, *optional*): What is held out.
        min_count (`int`): Profile values that fewer people hold are grouped. The people counted are those of whom
            `read_heads` keeps a conversation, whether or not rows come of it.
        keep_unknown (`bool`): Whether people of whom no field is known are kept.
        license (`str`): The source's terms.
    """
    prompts, splits = prompts or PromptFormat(), splits or SplitOptions()
    check_task(task, tasks, prompts.messages)
    extra = {"conversation_id": Value("string"), "turn": Value("int32")}
    extra |= {"prompt_group": Value("string"), "language": Value("string")}
    features = row_features(task, fields, extra, prompts.messages)

    def batches(report: Report) -> Iterator[tuple[str, pa.Table]]:
        for unit in ("people", "conversations", "turns", *(["pairs"] if task == "dpo" else [])):
            report.read(unit, 0)  # the report's order, whichever is counted first
        heads, people = read_heads(report)
        kept = people.index.isin({head.person_id for head in heads})
        report.read("people", len(people))
        report.drop("people", "no conversation of theirs can be split", int((~kept).sum()))
        people = canonical_people(people.loc[kept, list(fields)], report, min_count, keep_unknown=keep_unknown)
        known = [head for head in heads if head.person_id in people.index]
        report.drop("conversations", "nothing is known of the person", len(heads) - len(known))
        if all(head.left_out for head in known):
            raise ValueError(f"No conversation is left to convert. What was counted:\n{report}")
        heads = known
        places = _split(heads, people, splits, report)
        profiles = people.to_dict("index")
        openings = {
            person: prompts.opening(profile, "choice" if task == "choice" else "chat")
            for person, profile in profiles.items()
        }
        waiting: dict[str, list[dict[str, Any]]] = defaultdict(list)
        people_in_rows: set[str] = set()
        for conversation_id, turns in tqdm(
            read_turns(places, report), desc=title, total=len(places), unit="conversations", disable=None
        ):
            split, group, head = places[conversation_id]
            usable = usable_prefix(turns, report)
            key = (splits.seed, conversation_id)
            rows = list(conversation_rows(usable, openings[head.person_id], prompts, task, key, report))
            if rows:
                people_in_rows.add(head.person_id)
            else:
                report.drop("conversations", _NO_ROW[task] if usable else "no turn can be used")
            for turn, columns in rows:
                columns |= {"demographic": profiles[head.person_id], "person_id": head.person_id}
                columns |= {"conversation_id": conversation_id, "turn": turn}
                waiting[split].append(columns | {"prompt_group": group, "language": head.language})
            if len(waiting[split]) >= ROWS_PER_BATCH:
                yield split, pa.Table.from_pylist(waiting.pop(split), schema=features.arrow_schema)
        for split, left in waiting.items():
            yield split, pa.Table.from_pylist(left, schema=features.arrow_schema)
        report.drop("people", "none of their conversations gave a row", len(people) - len(people_in_rows))

    return Conversion(features, batches, f"{title}, {task}", splits.names, license)


def _split(
    heads: Sequence[Head], people: pd.DataFrame, splits: SplitOptions, report: Report
) -> dict[str, tuple[str, str, Head]]:
    """Split, prompt group and head of each conversation that is in a split, by its id."""
    groups = near_duplicate_groups(
        [head.prompt for head in heads], [head.conversation_id for head in heads], THRESHOLD
    )
    prompt = split_prompts(groups, splits)
    trained_on = [side in (TRAIN, ANY) and not head.left_out for head, side in zip(heads, prompt, strict=True)]
    can_train = people.index.isin({head.person_id for head, trains in zip(heads, trained_on, strict=True) if trains})
    person = split_people(people, splits, can_train=can_train)
    codes = split_rows(person[people.index.get_indexer([head.person_id for head in heads])], prompt)
    places = {}
    for head, group, code in zip(heads, groups, codes, strict=True):
        if head.left_out or code == DROPPED:
            report.drop("conversations", head.left_out or "person and prompt in different splits")
        else:
            places[head.conversation_id] = (SPLITS[code], group, head)
    return places


def usable_prefix(turns: Turns, report: Report) -> list[Turn]:
    """
    The turns before the first one that is missing or can't be used: what follows was said in an unknown context.

    Counts the turns that are there, and why they are dropped.
    """
    usable: list[Turn] = []
    ended = False
    for turn in turns:
        if turn is not None:
            report.read("turns")
            if ended:
                report.drop("turns", "after a turn that is missing or can't be used")
            elif isinstance(turn, str):
                report.drop("turns", turn)
            else:
                usable.append(turn)
        ended = ended or not isinstance(turn, Turn)
    return usable


def conversation_rows(
    turns: Sequence[Turn], opening: Opening, prompts: PromptFormat, task: str, key: tuple[int, str], report: Report
) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    A conversation's rows: the number of a turn, and the columns of the task.

    The prompt of a turn holds all turns before it, each with the answer that the person chose.

    Args:
        turns (`Sequence[Turn]`): The usable turns.
        opening (`Opening`): How the prompt begins for this person.
        prompts (`PromptFormat`): The wording. With `messages`, a conversation is one row, and its turn the last: a row
            per turn would train on the first answers again and again.
        task (`str`): `"sft"`, `"dpo"` or `"choice"`.
        key (`tuple[int, str]`): Seed and conversation, for the order of the candidates.
        report (`Report`): Gets the counts.
    """
    context = [] if opening.system is None else [_message("system", opening.system)]
    prefix = opening.prefix
    for turn in turns:
        asked = [*context, _message("user", prefix + turn.prompt)]
        answer = [_message("assistant", turn.candidates[turn.chosen])]
        if task == "dpo":
            rejected = rejected_texts(turn, report)
            if not rejected:
                report.drop("turns", _NO_ROW[task])
            for text in rejected:
                yield turn.number, {"prompt": asked, "chosen": answer, "rejected": [_message("assistant", text)]}
        elif task == "choice" and not len(turn.candidates) == len(set(turn.candidates)) == NUM_CHOICES:
            report.drop("turns", f"not {NUM_CHOICES} different candidates to choose from")
        elif task == "choice":
            order = candidate_order(turn, key)
            choice = prefix + prompts.choice(turn.prompt, [turn.candidates[index] for index in order])
            letter = _message("assistant", OPTION_LETTERS[order.index(turn.chosen)])
            yield turn.number, {"prompt": [*context, _message("user", choice)], "completion": [letter]}
        elif not prompts.messages:
            yield turn.number, {"prompt": asked, "completion": answer}
        context, prefix = [*asked, *answer], ""
    if prompts.messages and turns:
        report.drop("turns", "in the row of their conversation's last turn", len(turns) - 1)
        yield turns[-1].number, {"messages": context}


def rejected_texts(turn: Turn, report: Report) -> list[str]:
    """
    The answers over which the chosen one was preferred.

    No pair, and counted: the same text as the chosen one, a text that comes twice, and where there are scores, one
    that the person scored as high or higher.
    """
    rejected: list[str] = []
    for index, text in enumerate(turn.candidates):
        if index == turn.chosen:
            continue
        report.read("pairs")
        score, best = (turn.scores[index], turn.scores[turn.chosen]) if turn.scores else (None, None)
        if text == turn.candidates[turn.chosen]:
            report.drop("pairs", "the rejected text is the chosen one")
        elif None not in (score, best) and score == best:
            report.drop("pairs", "both have the same score")
        elif None not in (score, best) and score > best:
            report.drop("pairs", "the rejected answer has the higher score")
        elif text in rejected:
            report.drop("pairs", "the rejected text comes twice in the turn")
        else:
            rejected.append(text)
    return rejected


def candidate_order(turn: Turn, key: tuple[int, str]) -> list[int]:
    """
    The candidates in an order that a hash of seed, conversation, turn and candidate draws.

    Annotators saw them in the published order, and chose the last place more often than the first: in that order, a
    model could learn the place.
    """
    return sorted(range(len(turn.candidates)), key=lambda index: keyed_digest(*key, turn.number, index))


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
