# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_cuma.rewards import JUDGE_TEMPLATE, parse_verdict
from trl_cuma.rewards.verdict import check_template


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("[[A]]", "A"),
        ("Both are polite, but the second is closer.\n[[B]]", "B"),
        ("[[c]]", "C"),
        ("[[ b ]].", "B"),
        ("[[Answer A]]", "A"),
        ("**[[A]]**", "A"),
        ("Verdict: A", "A"),
        ("verdict: b.", "B"),
        ("**Verdict:** C", "C"),
        ("Final verdict: **B**\n", "B"),
        ("Verdict: [[B]]", "B"),
        ("Verdict: Answer B, since it is warmer.", "B"),
        ("Verdict: A - it is warmer", "A"),
        ('{"verdict": "A"}', "A"),
        ('```json\n{\n  "reason": "It is A or B.",\n  "verdict": "b"\n}\n```', "B"),
        ("{'verdict': 'C', 'reason': 'alike'}", "C"),
        ("<think>[[A]] at first sight</think>[[B]]", "B"),
        ("It could be [[A]]. Verdict: A</think>Verdict: B", "B"),  # the template holds the opening tag
        ("[[B]]<think>or [[A]]?</think>", "B"),
        ("[[A]] if the first, [[B]] if the second.\nThe second is closer.\n[[B]]", "B"),
        ("I leaned to [[A]] but settled on the other.\n\n**Final verdict: [[B]]**\n", "B"),
        ("Not [[B]], I think.\n\nMy verdict: A.", "A"),
        ('[[A]] is shorter.\n```json\n{\n  "verdict": "B"\n}\n```\n', "B"),
        ("<think>[[B]]</think>[[B]] is dull.\n[[A]]<think>[[C]]", "A"),
        ("They would say [[A]]. So [[A]] it is.", "A"),
        ("[[A]]\n\n[[A]]", "A"),
        ("**[[A]]**\nVerdict: A", "A"),
    ],
)
def test_a_verdict_is_read_in_the_forms_that_judges_write(reply, verdict):
    assert parse_verdict(reply) == verdict


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "A",
        "[A]",
        "[[D]]",
        "[[AB]]",
        "Answer A is better.",
        "I cannot judge this.",
        "[[A]] or [[B]]",
        "[[A]]/[[B]]",
        "[[A]]\n[[B]]",
        "[[A/B]]",
        "[[A or C]]",
        "Verdict: A or B",
        "Verdict: A and B are alike",
        "Verdict: answer A / answer B",
        "[[A]] it seems. Verdict: A or B",  # the last word is open
        "[[A]], not [[B]].",
        "The person prefers [[A]] rather than [[B]]",
        "The person prefers [[A]] rather\nthan\n[[B]].",
        "Verdict: A, not\n[[B]]",
        "I leaned to [[A]] but settled on [[B]]",
        "[[A]]\nThe other one, [[B]], is too long.",
        "[[A]] is warm.\n[[A]] or [[B]]",
        "Verdict: A\nVerdict: B",
        "[[A]]\n[[B]]\n[[C]]",
        '{"verdict": "A", "reason": "warmer than [[B]]"}',
        "Verdict: a tie",  # an article, no vote for A
        "Verdict: Both",
        "Verdict: a better answer is B",
        '{"verdict": "neither"}',
        '{"verdict": null}',
        "<think>I would say [[A]]</think>",
        "<think>I would say [[A]], and then",  # cut off
        "No verdict. A person would like either",
    ],
)
def test_what_is_open_or_ambiguous_is_no_verdict(reply):
    assert parse_verdict(reply) is None


def test_the_question_holds_everything_and_shows_no_side_more_often():
    question = JUDGE_TEMPLATE.format(profile="p-1", prompt="q-2", answer_a="x-3", answer_b="y-4")
    assert [question.count(text) for text in ("p-1", "q-2", "x-3", "y-4")] == [1, 1, 1, 1]
    assert [question.count(f"[[{letter}]]") for letter in "ABC"] == [1, 1, 1]
    assert parse_verdict(question) is None  # a judge that repeats it has not judged


@pytest.mark.parametrize("template", ["{profile} {prompt} {answer_a}", JUDGE_TEMPLATE + "{country}"])
def test_a_template_with_other_fields_is_refused(template):
    with pytest.raises(ValueError, match="`template` has the fields"):
        check_template(template)
