# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""How questions and profiles are worded: named templates, with the profile in the prompt or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from .survey import OPTION_LETTERS, Question

Task = Literal["survey", "chat", "choice"]


class Letters(NamedTuple):
    """
    How a wording lists options, each behind its letter.

    Attributes:
        before (`str`): What stands between the question and the first letter.
        mark (`str`): What follows a letter, with a blank.
        joint (`str`): What stands between two options.
        end (`str`): What follows the last option. No two wordings end alike.
    """

    before: str
    mark: str
    joint: str
    end: str

    def write(self, text: str, options: Sequence[str]) -> str:
        """The text, and the options behind it."""
        letters = zip(OPTION_LETTERS, options, strict=False)
        return (
            text + self.before + self.joint.join(f"{letter}{self.mark} {each}" for letter, each in letters) + self.end
        )


class LetteredText(NamedTuple):
    """A prompt that was written by [`Letters`], taken apart: `letters.write(text, options)` is the prompt."""

    text: str
    options: tuple[str, ...]
    letters: Letters

    def reordered(self, order: Sequence[int]) -> str:
        """The prompt with option `order[k]` behind the letter number `k`."""
        return self.letters.write(self.text, [self.options[index] for index in order])


class Opening(NamedTuple):
    """
    How a prompt begins for one person.

    Attributes:
        system (`str`, *optional*): The system message; `None` where there is none.
        prefix (`str`): What the first user message says before its own text: `""`, or the profile and a blank line.
    """

    system: str | None
    prefix: str


@dataclass(frozen=True)
class Template:
    """
    A wording. `{profile}` stands for the profile's text.

    Args:
        system (`Mapping[Task, str | None]`): The system message that states no profile.
        system_profile (`Mapping[Task, str]`): The system message that states it.
        user_profile (`Mapping[Task, str]`): The paragraph that states it before the user's text.
        profile (`Callable`): The known fields of a profile, in the source's order, as text.
        question (`Callable`): A survey question and its options.
        choice (`Callable`): A prompt and its candidate answers, one of which is to be chosen.
    """

    system: Mapping[Task, str | None]
    system_profile: Mapping[Task, str]
    user_profile: Mapping[Task, str]
    profile: Callable[[Mapping[str, str], Task], str]
    question: Callable[[Question], str]
    choice: Callable[[str, Sequence[str]], str]


_PLAIN_QUESTION = Letters("\n\n", ".", "\n", "\n\nAnswer with the letter of one option.")
_PLAIN_CHOICE = Letters("\n\n", ".", "\n\n", "\n\nAnswer with the letter of one answer.")
_PAPER_QUESTION = Letters("? ", ".", " ", ". You can only choose one option.")
_PAPER_CHOICE = Letters("\n\nOptions:\n", ":", "\n", "\n\nAnswer:")


def _plain_profile(profile: Mapping[str, str], task: Task) -> str:
    return "; ".join(f"{field.replace('_', ' ')}: {value}" for field, value in profile.items())


def _plain_question(question: Question) -> str:
    return _PLAIN_QUESTION.write(question.text, question.options)


def _plain_choice(prompt: str, candidates: Sequence[str]) -> str:
    return _PLAIN_CHOICE.write(f"Which answer to this do you prefer?\n\n{prompt}", candidates)


def _paper_profile(profile: Mapping[str, str], task: Task) -> str:
    if task != "survey":
        return ", ".join(f"{field.capitalize()}: {value}" for field, value in profile.items())
    names = {"age": "age group"}
    parts = [f"You are a person from {profile['country']}" if "country" in profile else "You are a person"]
    for field, value in profile.items():
        if field == "age" and value.endswith("years"):
            value = f"{value} old"
        if field != "country":
            parts.append(f"{names.get(field, field.replace('_', ' '))}: {value}")
    return ", ".join(parts) + "."


def _paper_question(question: Question) -> str:
    text = (question.short_text or question.text).rstrip("?")
    return _PAPER_QUESTION.write(text, question.short_options or question.options)


def _paper_choice(prompt: str, candidates: Sequence[str]) -> str:
    return _PAPER_CHOICE.write(f"Question: {prompt}", candidates)


_ASSISTANT = "You are a helpful assistant."
_STATED: dict[Task, str] = {
    "survey": "Answer as a person with this profile: {profile}.",
    "chat": "The user's profile: {profile}.",
    "choice": "Answer as a person with this profile: {profile}.",
}
TEMPLATES: dict[str, Template] = {
    "plain": Template(
        system={"survey": None, "chat": None, "choice": None},
        system_profile=_STATED,
        user_profile=_STATED,
        profile=_plain_profile,
        question=_plain_question,
        choice=_plain_choice,
    ),
    # As in the published code of arXiv 2601.04885, but for unknown fields ("nan" there), which are left out, and for a
    # question mark that is not doubled. Where the profile is in the user's message the paper has no wording: it is the
    # system message's.
    "paper": Template(
        system={
            "survey": "You are a helpful assistant that answers survey questions honestly.",
            "chat": _ASSISTANT,
            "choice": f"{_ASSISTANT} Choose the most appropriate response from the options provided.",
        },
        system_profile={
            "survey": "{profile}",
            "chat": "User Profile: {profile}",
            "choice": f"User Profile: {{profile}}\n{_ASSISTANT} Based on the user profile, choose the most "
            "appropriate response from the options provided.",
        },
        user_profile={
            "survey": "{profile}",
            "chat": "User Profile: {profile}",
            "choice": "User Profile: {profile}",
        },
        profile=_paper_profile,
        question=_paper_question,
        choice=_paper_choice,
    ),
}
"""The named wordings."""


def read_letters(prompt: str, num_options: int) -> LetteredText:
    """
    Take a user message apart that one of the [`TEMPLATES`] wrote for a survey question or a choice: the inverse of
    [`PromptFormat.question`] and [`PromptFormat.choice`]. What precedes the question, such as a profile, stays before
    it.

    Args:
        prompt (`str`): The message.
        num_options (`int`): How many options it lists.

    Raises:
        `ValueError`: The message doesn't end as these wordings do, or doesn't list so many options, or it could be
            taken apart in several ways, since an option or the question holds what looks like a list of its own.
    """
    known = (_PLAIN_QUESTION, _PLAIN_CHOICE, _PAPER_QUESTION, _PAPER_CHOICE)
    letters = next((letters for letters in known if prompt.endswith(letters.end)), None)
    if letters is None:
        raise ValueError(f"The prompt ends in none of the ways in which {list(TEMPLATES)} end a list of options.")
    body = prompt[: len(prompt) - len(letters.end)]
    marks = [f"{letters.joint}{letter}{letters.mark} " for letter in OPTION_LETTERS[:num_options]]
    marks[0] = letters.before + marks[0].removeprefix(letters.joint)
    first: list[int] = []
    last: list[int] = []
    start, stop = 0, len(body)
    for mark in marks:  # each as far ahead as can be, from the first
        first.append(body.find(mark, start))
        start = first[-1] + len(mark)
        if first[-1] < 0:
            raise ValueError(f"The prompt ends as a list of options does, but doesn't list {num_options} of them.")
    for mark in reversed(marks):  # and each as far behind as can be, from the last
        last.insert(0, body.rfind(mark, 0, stop))
        stop = last[0]
    more = [f"{letters.joint}{letter}{letters.mark} " for letter in OPTION_LETTERS[num_options : num_options + 1]]
    if first != last or any(mark in body[start:] for mark in more):
        raise ValueError(
            f"The prompt's {num_options} options can be told apart in several ways: an option or the question holds "
            "what looks like a list of its own, or there are more options."
        )
    ends = [*first[1:], len(body)]
    options = tuple(body[at + len(mark) : end] for at, mark, end in zip(first, marks, ends, strict=True))
    return LetteredText(body[: first[0]], options, letters)


@dataclass(frozen=True)
class PromptFormat:
    """
    What the model reads.

    Args:
        demographics (`str`, defaults to `"none"`): Where the prompt states the profile: nowhere (`"none"`: only the
            router knows it, through the column `demographic`, which is there in any case), in the `"system"` message,
            or at the head of the first `"user"` message.
        template (`str`, defaults to `"plain"`): `"plain"`, or `"paper"` for the wording of arXiv 2601.04885.
        messages (`bool`, defaults to `False`): For SFT, whole conversations in a column `messages` (TRL's language
            modeling format) instead of `prompt` and `completion`, of which TRL trains on the completion alone.

    Raises:
        `ValueError`: A value is not one of these.
    """

    demographics: Literal["none", "system", "user"] = "none"
    template: str = "plain"
    messages: bool = False

    def __post_init__(self) -> None:
        if self.demographics not in ("none", "system", "user"):
            raise ValueError(f"`demographics` is {self.demographics!r}, expected 'none', 'system' or 'user'.")
        if self.template not in TEMPLATES:
            raise ValueError(f"`template` is {self.template!r}, expected one of {list(TEMPLATES)}.")

    def opening(self, profile: Mapping[str, str | None], task: Task) -> Opening:
        """How a prompt begins for the person with this profile. Unknown fields are left out; an empty profile too."""
        template = TEMPLATES[self.template]
        known = {field: value for field, value in profile.items() if value is not None}
        if self.demographics == "none" or not known:
            return Opening(template.system[task], "")
        text = template.profile(known, task)
        if self.demographics == "system":
            return Opening(template.system_profile[task].replace("{profile}", text), "")
        return Opening(template.system[task], template.user_profile[task].replace("{profile}", text) + "\n\n")

    def question(self, question: Question) -> str:
        """The user message's text for a survey question; its answer is a bare letter."""
        return TEMPLATES[self.template].question(question)

    def choice(self, prompt: str, candidates: Sequence[str]) -> str:
        """The user message's text that asks which of the candidates is preferred; its answer is a bare letter."""
        return TEMPLATES[self.template].choice(prompt, candidates)
