# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What Community Alignment and PRISM share: usable turns, rows, the order of candidates, splits of conversations."""

import random
from collections import Counter

import pandas as pd
import pytest

from trl_cuma.data.conversations import (
    Head,
    Turn,
    candidate_order,
    check_languages,
    clean_candidate,
    clean_text,
    conversation_rows,
    convert_conversations,
    rejected_texts,
    usable_prefix,
)
from trl_cuma.data.leakage import assert_disjoint
from trl_cuma.data.prompts import Opening, PromptFormat
from trl_cuma.data.report import Report
from trl_cuma.data.splits import SplitOptions

PLAIN = Opening(None, "")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def turn(number=0, chosen=0, candidates=("a", "b", "c", "d"), scores=None):
    return Turn(number, f"p{number}", tuple(candidates), chosen, scores)


def rows(turns, task="sft", opening=PLAIN, prompts=None, report=None):
    prompts = prompts or PromptFormat()
    return list(conversation_rows(turns, opening, prompts, task, (0, "c"), report or Report("")))


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (None, None),
        ("EMPTY STRING", None),
        ("An EMPTY STRING", "An EMPTY STRING"),
        ("Yes.<|end_of_text|>", "Yes."),
        ("Yes. <|end_of_text|> <|end_of_text|>", "Yes."),
        ("<|end_of_text|>", None),
        ("EMPTY STRING<|end_of_text|>", None),
        ("One.<|end_of_text|>Two.", "One.\nTwo."),
    ],
)
def test_texts_without_marks_of_the_file(text, cleaned):
    assert clean_text(text) == cleaned


def test_cleaning_is_counted():
    report = Report("")
    for text in ("a<|end_of_text|>", "a<|end_of_text|>b", "EMPTY STRING", "Assistant: hello", "Models: three", None):
        clean_candidate(text, report)
    assert report.notes == {
        "texts with <|end_of_text|> at the end, cut off": 1,
        "texts with <|end_of_text|> inside, now a line break": 1,
        "candidates without text, left out": 2,
        'candidates that begin with a role\'s name ("Assistant:"), kept': 1,
    }


@pytest.mark.parametrize(
    ("turns", "usable", "drops"),
    [
        ([turn(0), turn(1), None, None], 2, {}),  # the usual end
        ([turn(0), None, turn(2), turn(3)], 1, {"after a turn that is missing or can't be used": 2}),
        ([turn(0), "no prompt", turn(2)], 1, {"no prompt": 1, "after a turn that is missing or can't be used": 1}),
        ([None, turn(1)], 0, {"after a turn that is missing or can't be used": 1}),
        (["no prompt", "no prompt"], 0, {"no prompt": 1, "after a turn that is missing or can't be used": 1}),
    ],
)
def test_what_follows_a_gap_is_dropped(turns, usable, drops):
    report = Report("")
    assert [each.number for each in usable_prefix(turns, report)] == list(range(usable))
    assert dict(report.drops.get("turns", {})) == drops
    assert report.kept("turns") == usable


def test_the_context_holds_the_chosen_answers():
    turns = [turn(0, chosen=1), turn(1, chosen=0, candidates=("e", "f"))]
    assert rows(turns) == [
        (0, {"prompt": [user("p0")], "completion": [assistant("b")]}),
        (1, {"prompt": [user("p0"), assistant("b"), user("p1")], "completion": [assistant("e")]}),
    ]


def test_the_profile_is_stated_once_per_conversation():
    turns = [turn(0), turn(1)]
    in_system = rows(turns, opening=Opening("You know: x.", ""))[1][1]["prompt"]
    assert in_system == [{"role": "system", "content": "You know: x."}, user("p0"), assistant("a"), user("p1")]
    in_user = rows(turns, opening=Opening(None, "I am x.\n\n"))[1][1]["prompt"]
    assert in_user == [user("I am x.\n\np0"), assistant("a"), user("p1")]


def test_messages_hold_a_conversation_once():
    report = Report("")
    report.read("turns", 2)
    made = rows([turn(0), turn(1, chosen=3)], prompts=PromptFormat(messages=True), report=report)
    assert made == [(1, {"messages": [user("p0"), assistant("a"), user("p1"), assistant("d")]})]
    assert report.kept("turns") == 1


def test_pairs_of_equal_texts_are_no_pairs():
    report = Report("")
    assert rejected_texts(turn(chosen=0, candidates=("a", "b", "a", "b")), report) == ["b"]
    assert dict(report.drops["pairs"]) == {
        "the rejected text is the chosen one": 1,
        "the rejected text comes twice in the turn": 1,
    }
    assert report.kept("pairs") == 1


def test_pairs_that_the_scores_deny_are_no_pairs():
    report = Report("")
    scored = turn(chosen=1, candidates=("tie", "chosen", "higher", "lower", "no score"), scores=(60, 60, 61, 59, None))
    assert rejected_texts(scored, report) == ["lower", "no score"]
    assert dict(report.drops["pairs"]) == {
        "both have the same score": 1,
        "the rejected answer has the higher score": 1,
    }


def test_a_text_with_a_tie_and_a_lower_score_is_a_pair():
    scored = turn(chosen=0, candidates=("a", "b", "b"), scores=(60, 60, 10))
    assert rejected_texts(scored, Report("")) == ["b"]


def test_the_choice_names_the_chosen_candidate():
    for number in range(20):
        asked = turn(number, chosen=number % 4, candidates=("one", "two", "three", "four"))
        ((_, row),) = rows([asked], "choice")
        lines = dict(line.split(". ", 1) for line in row["prompt"][0]["content"].split("\n\n") if line[1:3] == ". ")
        assert sorted(lines.values()) == ["four", "one", "three", "two"]
        assert lines[row["completion"][0]["content"]] == asked.candidates[asked.chosen]


def test_a_choice_has_the_turns_before_it_as_context():
    made = rows([turn(0, chosen=2), turn(1)], "choice", opening=Opening(None, "I am x.\n\n"))
    assert made[0][1]["prompt"][0]["content"].startswith("I am x.\n\nWhich answer to this do you prefer?\n\np0\n\n")
    assert made[1][1]["prompt"][:2] == [user("I am x.\n\np0"), assistant("c")]
    assert made[1][1]["prompt"][2]["content"].startswith("Which answer to this do you prefer?\n\np1\n\n")


@pytest.mark.parametrize("candidates", [("a", "b", "c"), ("a", "b", "c", "b")])
def test_a_choice_needs_four_different_candidates(candidates):
    report = Report("")
    report.read("turns", 2)
    made = rows([turn(0, candidates=candidates), turn(1)], "choice", report=report)
    assert [number for number, _ in made] == [1]
    assert made[0][1]["prompt"][:2] == [user("p0"), assistant("a")]  # it stays in the context
    assert dict(report.drops["turns"]) == {"not 4 different candidates to choose from": 1}


def test_the_chosen_candidate_is_in_every_place_as_often():
    # Each of 4 places has probability 1/4: over 4000 turns 1000 ± 4 standard errors of sqrt(4000 · 1/4 · 3/4) = 27.4.
    places = Counter(candidate_order(turn(number), (0, "c")).index(3) for number in range(4000))
    assert all(abs(places[place] - 1000) < 110 for place in range(4))


def test_the_order_of_candidates_follows_from_seed_conversation_and_turn():
    drawn = {
        candidate_order(turn(number), key)[0]
        for number in (0, 1)
        for key in ((0, "c1"), (0, "c2"), (1, "c1"), (1, "c2"))
    }
    assert len(drawn) > 1
    assert candidate_order(turn(1), (0, "c1")) == candidate_order(turn(1, chosen=2), (0, "c1"))


@pytest.mark.parametrize("languages", ["en", []])
def test_languages_are_a_list(languages):
    with pytest.raises(ValueError, match="`languages`"):
        check_languages(languages)


def two_turns(head):
    return [Turn(0, head.prompt, ("a", "b"), 0), Turn(1, "And?", ("c", "d"), 1)]


def conversion(heads, task="sft", splits=None, min_count=1, prompts=None, turns=two_turns, countries=("Alba",)):
    """Conversations from memory; `turns` are those of a head, and people live in these countries by turns."""
    people = {head.person_id: None for head in heads}
    table = pd.DataFrame(
        {"country": [countries[number % len(countries)] for number in range(len(people))]},
        index=list(people),
        dtype=object,
    )

    def read_heads(report):
        report.read("conversations", len(heads))
        return heads, table

    def read_turns(kept, report):
        for head in heads:
            if head.conversation_id in kept:
                yield head.conversation_id, turns(head)

    return convert_conversations(
        "Talk",
        read_heads,
        read_turns,
        fields=["country"],
        task=task,
        tasks=("sft", "dpo") if turns is two_turns else ("sft", "dpo", "choice"),
        prompts=prompts,
        splits=splits,
        min_count=min_count,
        keep_unknown=False,
        license="own",
    )


def many():
    """30 people with 20 conversations each, over 40 prompts of which every second repeats the one before it."""
    # Ten words that no other prompt has: only the two writings of one prompt are alike.
    prompts = [" ".join(f"word{prompt:02}{place}" for place in range(10)) for prompt in range(20)]
    prompts += [prompt.upper() + "!" for prompt in prompts]
    heads = [
        Head(f"c{person}-{place}", f"person-{person}", prompts[(person * 7 + place) % 40], "en")
        for person in range(30)
        for place in range(20)
    ]
    return heads


def test_splits_share_neither_people_nor_prompts():
    made = conversion(many(), splits=SplitOptions(test=0.3, validation=0.1))
    splits = made.datasets()
    assert list(splits) == ["train", "validation", "test"]
    assert_disjoint(splits)
    texts = {name: {row["prompt"][0]["content"].strip("!").lower() for row in data} for name, data in splits.items()}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"]
    report = made.report
    assert report.kept("turns") == sum(report.rows.values()) == 2 * report.kept("conversations")
    assert report.drops["conversations"]["person and prompt in different splits"] == 600 - report.kept("conversations")


def test_the_split_of_a_conversation_does_not_depend_on_the_order_of_the_rows():
    shuffled = many()
    random.Random(1).shuffle(shuffled)

    def places(heads):
        splits = conversion(heads, splits=SplitOptions(test=0.3)).datasets()
        return {
            (row["conversation_id"], row["turn"]): (name, row["prompt_group"])
            for name, data in splits.items()
            for row in data
        }

    assert places(many()) == places(shuffled)


LETTERS = ("a", "b", "c", "d")
OF_PERSON = {  # turns of a conversation, by its person
    "every": [Turn(0, "?", LETTERS, 0), Turn(1, "?", LETTERS, 1)],
    "second": [Turn(0, "?", ("a", "a"), 0), Turn(1, "?", LETTERS, 1)],  # neither pair nor choice in the first turn
    "none": [Turn(0, "?", ("a",), 0), Turn(1, "?", ("b", "b"), 0), "no prompt"],
    "unusable": ["no prompt", Turn(1, "?", LETTERS, 0)],
}
NO_ROW = "none of their conversations gave a row"


@pytest.mark.parametrize(
    ("task", "messages", "turns", "conversations", "people"),
    [
        ("sft", False, {}, {}, {NO_ROW: 1}),
        ("sft", True, {"in the row of their conversation's last turn": 3}, {}, {NO_ROW: 1}),
        ("dpo", False, {"no pair": 3}, {"no pair": 1}, {NO_ROW: 2}),
        ("choice", False, {"not 4 different candidates to choose from": 3}, {"no choice": 1}, {NO_ROW: 2}),
    ],
)
def test_what_is_kept_is_what_is_in_the_rows(task, messages, turns, conversations, people):
    heads = [Head(person, person, f"{person} asks", "en") for person in OF_PERSON]
    made = conversion(
        heads,
        task,
        SplitOptions(split_by=("prompt",), test=0.0),
        prompts=PromptFormat(messages=messages),
        turns=lambda head: OF_PERSON[head.person_id],
    )
    rows, report = made.datasets()["train"].to_list(), made.report
    assert report.kept("people") == len({row["person_id"] for row in rows})
    assert report.kept("conversations") == len({row["conversation_id"] for row in rows})
    assert report.kept("turns") == len({(row["conversation_id"], row["turn"]) for row in rows})
    assert report.kept(list(report.units)[-1]) == len(rows)
    later = {"no prompt": 2, "after a turn that is missing or can't be used": 1}
    assert report.drops["turns"] == turns | later
    assert report.drops["conversations"] == conversations | {"no turn can be used": 1}
    assert report.drops["people"] == people


def test_people_between_the_splits_are_not_kept():
    made = conversion([head for head in many() if head.conversation_id.endswith("-0")], splits=SplitOptions(test=0.3))
    people = {row["person_id"] for data in made.datasets().values() for row in data}
    assert made.report.kept("people") == len(people) < 30
    assert made.report.drops["people"] == {NO_ROW: 30 - len(people)}


def test_opening_prompts_that_are_alike_share_a_group():
    # A text of 26 characters has 22 five-grams; one that goes on has these and one more per character.
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [letters, letters + "1234567"]  # 22 of 29: 0.76
    texts += [letters[::-1], letters[::-1] + "12345678901234"]  # 22 of 36: 0.61
    heads = [Head(f"c{number}", f"person-{number}", text, "en") for number, text in enumerate(texts)]
    data = conversion(heads, splits=SplitOptions(split_by=("prompt",), test=0.0)).datasets()["train"]
    group = dict(zip(data["conversation_id"], data["prompt_group"], strict=True))
    assert group == {"c0": "c0", "c1": "c0", "c2": "c2", "c3": "c3"}


def test_the_seed_draws_the_order_of_candidates():
    heads = [Head(f"c{number}", f"person-{number}", f"word{number} " * 3, "en") for number in range(20)]

    def prompts_with(seed):
        splits = SplitOptions(split_by=("prompt",), test=0.0, seed=seed)
        made = conversion(heads, "choice", splits, turns=lambda head: [Turn(0, head.prompt, LETTERS, 0)])
        return [row["prompt"] for row in made.datasets()["train"]]

    assert prompts_with(0) == prompts_with(0) != prompts_with(1)


def test_a_choice_states_the_profile_as_for_a_choice():
    heads = [Head("c0", "person-0", "Hello?", "en")]
    for template in ("plain", "paper"):
        prompts = PromptFormat(demographics="system", template=template)
        for task, kind in (("sft", "chat"), ("dpo", "chat"), ("choice", "choice")):
            made = conversion(
                heads,
                task,
                SplitOptions(split_by=("prompt",), test=0.0),
                prompts=prompts,
                turns=lambda head: [Turn(0, head.prompt, LETTERS, 0)],
            )
            system = made.datasets()["train"][0]["prompt"][0]["content"]
            assert system == prompts.opening({"country": "Alba"}, kind).system


def test_values_of_few_people_are_grouped():
    # 30 people by turns in Alba, Alba and Belo: 20 and 10
    made = conversion(many(), splits=SplitOptions(test=0.3), min_count=11, countries=("Alba", "Alba", "Belo"))
    with pytest.raises(ValueError, match="No conversation is left"):
        conversion(many(), splits=SplitOptions(test=0.3), min_count=31).datasets()
    values = {row["demographic"]["country"] for data in made.datasets().values() for row in data}
    assert values == {"Alba"}  # "Other" would be as rare: they are people of whom nothing is known
    assert made.report.drops["people"]["nothing is known of them"] == 10


def test_what_is_left_out_changes_no_ones_split():
    """Who trains on everything and tests in one language must not meet what was trained on."""
    heads = many()
    splits = SplitOptions(test=0.3, validation=0.2)
    everything = conversion(heads, splits=splits).datasets()
    half = [head._replace(left_out="of another language" if number % 2 else None) for number, head in enumerate(heads)]
    made = conversion(half, splits=splits)
    some = made.datasets()
    for name in everything:
        chosen = {head.conversation_id for head in half if not head.left_out}
        assert set(some[name]["conversation_id"]) == set(everything[name]["conversation_id"]) & chosen
    assert made.report.drops["conversations"]["of another language"] == len(heads) // 2


def test_rows_come_in_batches(monkeypatch):
    whole = conversion(many(), "dpo", SplitOptions(test=0.3)).datasets()
    monkeypatch.setattr("trl_cuma.data.conversations.ROWS_PER_BATCH", 7)
    made = conversion(many(), "dpo", SplitOptions(test=0.3))
    pieces = [len(table) for _, table in made._batches(Report(""))]
    assert len(pieces) > 10 and max(pieces) <= 8  # a conversation's two rows stay together
    assert {name: data.to_list() for name, data in made.datasets().items()} == {
        name: data.to_list() for name, data in whole.items()
    }


def test_nothing_to_convert_is_an_error_with_the_counts():
    with pytest.raises(ValueError, match="No conversation is left(.|\n)*conversations read +0"):
        conversion([]).datasets()


def test_a_task_that_the_source_lacks_is_an_error():
    with pytest.raises(ValueError, match="`task` is 'choice'"):
        conversion(many(), "choice")
