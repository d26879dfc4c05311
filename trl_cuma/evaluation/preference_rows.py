# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Rows in which a person chose between free texts: which rows those are, and whom to write answers for."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from datasets import Dataset

from ..data.prompts import TEMPLATES, PromptFormat, Task
from ..data.survey import OPTION_LETTERS
from ..demographics.profile import is_vector, read_profiles
from .option_tokens import Prompt, prompt_key
from .resampling import number_labels

LOOKED_AT = 200  # rows, to see what they are, and whether prompts state profiles


def row_kind(rows: Dataset) -> Literal["survey", "choices"]:
    """
    What rows are taken for: answers to questions with options (`"survey"`), or a person's choices between free texts
    (`"choices"`): the columns `prompt`, `chosen` and `rejected`, and neither `num_options` nor `options`.

    Raises:
        `ValueError`: They are free texts without anything to compare them with.
    """
    columns = set(rows.column_names)
    if columns & {"num_options", "options", "distribution"}:
        return "survey"
    if {"prompt", "chosen", "rejected"} <= columns:
        return "choices"
    name = next((name for name in ("completion", "messages") if name in columns), None)
    answers = [] if name is None else rows.select(range(min(len(rows), LOOKED_AT))).select_columns(name)[name][:]
    texts = [answer if isinstance(answer, str) else answer[-1]["content"] for answer in answers if answer]
    if texts and not any((text or "").strip() in OPTION_LETTERS for text in texts):
        raise ValueError(
            f"The rows hold free texts in {name!r}, and no option's letter: there is nothing to hold them against. "
            "Prepare the data with `--task dpo`, for people's own choices between texts, or with `--task choice`; to "
            "a survey's rows add 'num_options'."
        )
    return "survey"


def sample_choices(rows: Dataset, limit: int | None, person_column: str, seed: int) -> Dataset:
    """About `limit` rows, of whole choices (a choice has a row for each rejected answer) drawn evenly, in order."""
    if limit is None or limit >= len(rows):
        return rows
    number = _choice_of_rows(rows, person_column)
    order = np.random.default_rng(seed).permutation(number.max() + 1)
    taken = np.cumsum(np.bincount(number)[order]) <= limit
    taken[0] = True
    return rows.select(np.flatnonzero(np.isin(number, order[taken])))


@dataclass(frozen=True, eq=False, repr=False)
class DrawnRows:
    """
    Rows to write answers for: a pair of answers each of some choices, drawn evenly; and some of their prompts, for
    several profiles.

    Attributes:
        prompts, chosen, rejected, demographics, person_ids, prompt_groups (`list`): One per drawn choice.
        spread_prompts, spread_demographics, spread_groups (`list`): One per prompt and profile; the group is the
            prompt's number, whatever profile it states.
        choices (`int`): That could have been drawn.
        too_long (`int`): That were not, since prompt and answer are longer than the model's context.
        note (`str`, *optional*): Why no prompt is for several profiles.
    """

    prompts: list[Prompt]
    chosen: list[Prompt]
    rejected: list[Prompt]
    demographics: list[Any]
    person_ids: list[str]
    prompt_groups: list[Any]
    spread_prompts: list[Prompt]
    spread_demographics: list[Any]
    spread_groups: list[int]
    choices: int
    too_long: int
    note: str | None


def draw_rows(
    rows: Dataset,
    number: int,
    *,
    profiles_per_prompt: int,
    fits: Callable[[Prompt], bool],
    demographic_column: str = "demographic",
    person_column: str = "person_id",
    seed: int = 0,
) -> DrawnRows:
    """
    Draw choices of people of whom something is known. More of them hold fewer, with the same seed.

    A prompt that states its person's profile is worded anew for the other profiles, if it is worded as
    [`~trl_cuma.data.prompts.TEMPLATES`] word it.

    Args:
        rows (`Dataset`): Of [`row_kind`] `"choices"`.
        number (`int`): Choices to draw, and about as many rows of a prompt and one of several profiles.
        profiles_per_prompt (`int`): Of these; below 2 there are none.
        fits (`Callable`): Whether the model can answer a prompt.
        demographic_column, person_column (`str`): Names of columns.
        seed (`int`): Of the draws.

    Raises:
        `ValueError`: No choice can be drawn, a column is absent, or profiles are vectors, which a judge can't read.
    """
    if demographic_column not in rows.features:
        raise ValueError(f"There is no column {demographic_column!r} of profiles: the rows have {rows.column_names}.")
    values = rows.select_columns(demographic_column)[demographic_column][:]
    if any(is_vector(value) for value in values):
        raise ValueError(
            f"The column {demographic_column!r} holds vectors, and no judge can read them. Leave `--judge` and "
            "`--generate` out, or evaluate rows with profiles."
        )
    texts = [profile.text for profile in read_profiles(values)]
    of_choice: dict[int, list[int]] = defaultdict(list)
    people = rows.select_columns(person_column)[person_column][:]
    for row, choice in enumerate(_choice_of_rows(rows, person_column).tolist()):
        if texts[row] and people[row] is not None:
            of_choice[choice].append(row)
    rng = np.random.default_rng(seed)
    drawn, too_long = [], 0
    for choice in rng.permutation(sorted(of_choice)).tolist():
        row = rows[of_choice[choice][int(rng.integers(len(of_choice[choice])))]]
        if not (row["prompt"] and row["chosen"] and row["rejected"]):
            continue
        if not fits(row["prompt"]):
            too_long += 1
        else:
            drawn.append(row)
        if len(drawn) == number:
            break
    if not drawn:
        raise ValueError(
            f"None of {len(rows)} rows can be answered: {too_long} prompts are longer than the model's context less "
            "the answer, and the others have no person, profile or text. Lower `--max_new_tokens`, or evaluate other "
            "rows."
        )
    prompts, demographics = ([row[name] for row in drawn] for name in ("prompt", demographic_column))
    unique = list({text: value for text, value in zip(texts, values, strict=True) if text}.values())
    spread, note = _spread(prompts, demographics, unique, number, profiles_per_prompt, fits, (seed, 1))
    return DrawnRows(
        prompts=prompts,
        chosen=[row["chosen"] for row in drawn],
        rejected=[row["rejected"] for row in drawn],
        demographics=demographics,
        person_ids=[str(row[person_column]) for row in drawn],
        prompt_groups=[row.get("prompt_group") or prompt_key(row["prompt"]) for row in drawn],
        spread_prompts=[prompt for _, prompt, _ in spread],
        spread_demographics=[who for _, _, who in spread],
        spread_groups=[group for group, _, _ in spread],
        choices=len(of_choice),
        too_long=too_long,
        note=note,
    )


def states_profile(prompts: Sequence[Prompt], demographics: Sequence[Any]) -> tuple[bool | None, PromptFormat | None]:
    """
    Whether prompts state the profiles of their people, and in which of the known wordings; `None` where nothing is
    known of anybody. In another wording they do if most hold all that is known.
    """
    profiles = read_profiles(None if is_vector(value) else value for value in demographics)
    known = [
        (prompt, value, profile)
        for prompt, value, profile in zip(prompts, demographics, profiles, strict=True)
        if profile.text
    ][:LOOKED_AT]
    if not known:
        return None, None
    if all(isinstance(value, Mapping) for _, value, _ in known):
        for template in TEMPLATES:
            for place in ("system", "user"):
                wording = PromptFormat(demographics=place, template=template)
                if all(without_opening(prompt, value, wording) is not None for prompt, value, _ in known):
                    return True, wording
    held = 0
    for prompt, _, profile in known:
        said = prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
        held += all(value in said for value in profile.fields.values() or [profile.text])
    return held > len(known) / 2, None


def _choice_of_rows(rows: Dataset, person_column: str) -> np.ndarray:
    """A number for each row's choice, `(rows,)`, as [`~trl_cuma.evaluation.own_choices`] tells them apart."""
    names = [name for name in (person_column, "conversation_id", "turn", "prompt", "chosen") if name in rows.features]

    def digest(row: Mapping[str, Any]) -> bytes:
        return hashlib.blake2b(json.dumps([row[name] for name in names]).encode(), digest_size=16).digest()

    return number_labels(map(digest, rows.with_format(None).select_columns(names)))


def _spread(
    prompts: Sequence[Prompt],
    demographics: Sequence[Any],
    unique: Sequence[Any],
    number: int,
    profiles_per_prompt: int,
    fits: Callable[[Prompt], bool],
    seed: tuple[int, int],
) -> tuple[list[tuple[int, Prompt, Any]], str | None]:
    """Some different prompts, for as many profiles each: number of the prompt, prompt, profile."""
    size = min(profiles_per_prompt, len(unique))
    if size < 2:
        return [], "a prompt is for one profile alone"
    stated, wording = states_profile(prompts, demographics)
    if stated and wording is None:
        return [], "the prompts state the profile in a wording that is not known, so that they fit no other profile"
    rng = np.random.default_rng(seed)
    found: list[tuple[int, Prompt, Any]] = []
    asked = set()
    for prompt, value in zip(prompts, demographics, strict=True):
        rest = prompt if wording is None else without_opening(prompt, value, wording)
        if rest is None or prompt_key(rest) in asked:
            continue
        chosen = [unique[index] for index in rng.choice(len(unique), size, replace=False)]
        worded = [rest if wording is None else with_opening(rest, other, wording) for other in chosen]
        if all(map(fits, worded)):
            found += [(len(asked), each, other) for each, other in zip(worded, chosen, strict=True)]
            asked.add(prompt_key(rest))
        if len(asked) == max(1, number // size):
            break
    return found, None if found else "no prompt that could be worded for several profiles fits the model's context"


def without_opening(
    prompt: Prompt, profile: Mapping[str, Any], wording: PromptFormat, task: Task = "chat"
) -> Prompt | None:
    """A conversation without what it says of the profile; `None` where it does not begin so."""
    opening = wording.opening(profile, task)
    messages = [] if isinstance(prompt, str) else list(prompt)
    if opening.system is not None:
        if not messages or (messages[0]["role"], messages[0]["content"]) != ("system", opening.system):
            return None
        messages = messages[1:]
    if not messages or messages[0]["role"] != "user" or not messages[0]["content"].startswith(opening.prefix):
        return None
    return [{**messages[0], "content": messages[0]["content"].removeprefix(opening.prefix)}, *messages[1:]]


def with_opening(rest: Prompt, profile: Mapping[str, Any], wording: PromptFormat, task: Task = "chat") -> Prompt:
    """A conversation that begins with what the wording says of the profile."""
    opening = wording.opening(profile, task)
    system = [] if opening.system is None else [{"role": "system", "content": opening.system}]
    first, *more = rest
    return [*system, {**first, "content": opening.prefix + first["content"]}, *more]
