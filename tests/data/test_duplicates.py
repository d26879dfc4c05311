# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import json
import os
import random
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from trl_cuma.data.duplicates import near_duplicate_groups

DATA = Path(os.environ.get("CUMA_DATA", Path(__file__).parents[3] / "shared" / "data"))


def five_grams(text: str) -> set[str]:
    text = unicodedata.normalize("NFKC", text).casefold()
    text = "".join(" " if unicodedata.category(c)[0] in "PZC" else c for c in text)
    text = " ".join(text.split())
    return {text[i : i + 5] for i in range(len(text) - 4)} or {text}


def brute_force(texts: list[str], ids: list[str], threshold: float) -> list[str]:
    """All pairs of sets compared, and the components walked one neighbour at a time."""
    grams = [five_grams(text) for text in texts]
    group: list[str | None] = [None] * len(texts)
    for first in range(len(texts)):
        if group[first] is not None:
            continue
        members, queue = {first}, [first]
        while queue:
            one = grams[queue.pop()]
            near = {n for n, other in enumerate(grams) if len(one & other) / len(one | other) >= threshold}
            queue.extend(near - members)
            members |= near
        for member in members:
            group[member] = min(ids[n] for n in members)
    return group


def random_texts(seed: int, number: int) -> list[str]:
    """Sentences and edits of sentences, in four scripts, of 0 to 90 characters, so that similarities span 0 to 1."""
    draw = random.Random(seed)
    words = "trust people family work हिन्दी की का café CAFÉ ﬁne 北京 мир a of ?! — 7 don't".split()
    texts: list[str] = []
    while len(texts) < number:
        if texts and draw.random() < 0.6:
            edited = draw.choice(texts).split(" ")
            for _ in range(draw.randint(0, 2)):
                edited[draw.randrange(len(edited))] = draw.choice(words)
            if draw.random() < 0.3:
                edited = edited[: draw.randint(1, len(edited))]
            texts.append(" ".join(edited))
        else:
            texts.append(" ".join(draw.choice(words) for _ in range(draw.randint(0, 16))))
    return texts


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.7, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_groups_are_those_of_comparing_all_pairs(seed: int, threshold: float) -> None:
    texts = random_texts(seed, 250)
    ids = [str(n) for n in range(len(texts))]
    groups = near_duplicate_groups(texts, ids, threshold)
    assert groups == brute_force(texts, ids, threshold)
    assert 1 < len(set(groups)) < len(texts)  # neither one group nor only single texts: the comparison means something


@pytest.mark.parametrize("shared", [2, 3, 5, 6, 7, 9, 10, 18, 21])
def test_a_pair_exactly_at_the_threshold_is_alike(shared: int) -> None:
    # A text of n + 4 different characters has n 5-grams, and its beginnings have only 5-grams of it: shared / 30.
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
    texts = [alphabet[:34], alphabet[: shared + 4]]
    assert near_duplicate_groups(texts, ["a", "b"], shared / 30) == ["a", "a"]
    assert near_duplicate_groups(texts, ["a", "b"], shared / 30 + 1e-6) == ["a", "b"]


def test_a_pair_at_the_threshold_is_not_lost_to_rounding() -> None:
    # 14 of 25 5-grams are 0.56 exactly; in floats 0.56 * 25 is 14.000000000000002
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789"
    assert near_duplicate_groups([alphabet[:29], alphabet[:18]], ["a", "b"], 0.56) == ["a", "a"]


def test_a_chain_of_alike_texts_is_one_group() -> None:
    # 26 5-grams each; neighbours share 20 of 32 (0.62), the ends 14 of 38 (0.37)
    alphabet = "abcdefghijklmnopqrstuvwxyz0123456789äöüéèà"
    chain = [alphabet[start : start + 30] for start in (0, 6, 12)]
    assert near_duplicate_groups(chain, ["a", "b", "c"], 0.6) == ["a", "a", "a"]
    assert near_duplicate_groups([chain[0], chain[2]], ["a", "c"], 0.6) == ["a", "c"]


def test_case_punctuation_spaces_and_unicode_forms_make_no_difference() -> None:
    texts = ["How are you, café?", "  how ARE-you\n\tcafe\N{COMBINING ACUTE ACCENT}", "Ｈｏｗ　ａｒｅ　ｙｏｕ café!!"]
    assert near_duplicate_groups(texts, ["a", "b", "c"], 1.0) == ["a", "a", "a"]


def test_vowel_signs_are_no_punctuation() -> None:
    assert near_duplicate_groups(["की", "का", "की?"], ["a", "b", "c"]) == ["a", "b", "a"]


def test_texts_under_five_characters_are_compared_whole() -> None:
    assert near_duplicate_groups(["abc", "abcd", "ABC.", "abcde", ""], list("vwxyz")) == ["v", "w", "v", "y", "z"]


def test_five_grams_do_not_reach_into_the_next_text() -> None:
    # joined, all three are "abcdefgh" twice over; alone none has a 5-gram of another
    assert near_duplicate_groups(["abcd", "efghabcd", "efgh"], list("abc"), 0.01) == ["a", "b", "c"]


def test_a_group_has_its_smallest_id_whatever_the_order() -> None:
    texts = random_texts(7, 120)
    ids = [str(n) for n in range(len(texts))]
    expected = dict(zip(ids, near_duplicate_groups(texts, ids), strict=True))
    order = random.Random(0).sample(range(len(texts)), len(texts))
    again = near_duplicate_groups([texts[n] for n in order], [ids[n] for n in order])
    assert dict(zip([ids[n] for n in order], again, strict=True)) == expected
    assert near_duplicate_groups(["same text", "same text"], ["9", "10"]) == ["10", "10"]  # as texts, not as numbers


def test_a_lone_surrogate_and_no_texts_are_no_errors() -> None:
    assert near_duplicate_groups(["half \ud83d a pair", "half \ud83d a pair"], ["a", "b"]) == ["a", "a"]
    assert near_duplicate_groups([], []) == []


@pytest.mark.parametrize(
    ("texts", "ids", "threshold", "message"),
    [
        (["a"], ["1"], 0.0, "`threshold`"),
        (["a"], ["1"], 1.5, "`threshold`"),
        (["a", "b"], ["1"], 0.5, "2 and 1"),
        (["a", "b"], ["1", "1"], 0.5, "all different"),
        (["a", None], ["1", "2"], 0.5, r"texts\[1\] must be a `str`, got NoneType"),
    ],
)
def test_errors(texts: list, ids: list[str], threshold: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        near_duplicate_groups(texts, ids, threshold)


@pytest.fixture(scope="module")
def survey_groups() -> dict[str, str]:
    """Group of each value question of WorldValuesBench."""
    path = DATA / "wvb" / "question_metadata.json"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    metadata = json.loads(path.read_text(encoding="utf-8"))
    texts = {key: entry["question"] for key, entry in metadata.items() if entry["use_case"] == "value"}
    return dict(zip(texts, near_duplicate_groups(list(texts.values()), list(texts)), strict=True))


@pytest.mark.parametrize(
    ("first", "last"),
    [
        (7, 17),  # is it important that children are encouraged to learn ...
        (18, 26),  # would you be uncomfortable having ... as neighbors
        (51, 55),  # how often have you experienced ...
        (58, 63),  # how much do you trust people in this group: ...
        (64, 81),  # how much confidence do you have in ...
        (94, 104),  # what is your affiliation to ...
        (113, 117),  # how many are involved in corruption: ...
        (122, 129),  # the effects of immigration: ...
        (132, 138),  # how often do these occur in your neighborhood: ...
        (177, 195),  # how justifiable is ...
        (201, 208),  # how often do you use the following to obtain information: ...
        (209, 220),  # have you done: ...
        (224, 233),  # how often in this country's elections ...
        (235, 239),  # how do you view this political system: ...
        (241, 249),  # how essential a characteristic of democracy: ...
        (255, 259),  # how close do you feel to ...
    ],
)
def test_a_battery_of_the_real_survey_is_one_group(survey_groups: dict[str, str], first: int, last: int) -> None:
    battery = {f"Q{number}" for number in range(first, last + 1)}
    group = survey_groups[f"Q{first}"]
    assert {key for key in survey_groups if survey_groups[key] == group} == battery


@pytest.mark.parametrize(
    "questions",
    [
        ("Q106", "Q107", "Q108", "Q109", "Q110", "Q240"),  # 1 to 10, each between two opinions of its own
        ("Q158", "Q176"),  # 1 'Completely agree' to 10: science; moral rules
        ("Q1", "Q199", "Q254"),  # 1 'Very ...' to 4 'Not at all ...': family; politics; nationality
        ("Q7", "Q18", "Q139", "Q144", "Q151", "Q165"),  # 1 'Yes', 2 'No'
        ("Q49", "Q50", "Q252"),  # 1 to 10, satisfied with: life; finances; the political system
    ],
)
def test_questions_of_the_real_survey_that_share_a_scale_are_apart(
    survey_groups: dict[str, str], questions: tuple[str, ...]
) -> None:
    assert len({survey_groups[question] for question in questions}) == len(questions)


def test_no_group_of_the_real_survey_is_too_large_to_be_a_test_split(survey_groups: dict[str, str]) -> None:
    sizes = Counter(survey_groups.values())
    assert sum(sizes.values()) == 239
    assert max(sizes.values()) == 19  # Q177 to Q195; a tenth of the questions is 24


@pytest.mark.slow
def test_batteries_of_global_opinions() -> None:
    path = DATA / "goqa" / "goqa_ordinal.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = {row["qid"]: row["question"] for row in rows}
    groups = near_duplicate_groups(list(texts.values()), list(texts))
    assert groups == brute_force(list(texts.values()), list(texts), 0.5)
    of_text = dict(zip(texts.values(), groups, strict=True))
    opinion_of = "very favorable, somewhat favorable, somewhat unfavorable, or very unfavorable opinion of..."
    assert len({group for text, group in of_text.items() if opinion_of in text}) == 1
    assert max(Counter(groups).values()) < len(texts) / 10
