# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Text that comes piece by piece is the text of all tokens, and never has to be taken back."""

import random

import pytest

from trl_cuma.generation.replies import GrowingText
from trl_cuma.testing import chat_tokenizer, word_tokenizer

TEXT = "Tea 茶 or coffee ☕, peace 平和 and 🫖 家族 – naïve café\nend"


def pieces(tokenizer, tokens, stop=()):
    growing = GrowingText(tokenizer, stop)
    out = []
    for token in tokens:
        out.append(growing.add(token))
        if growing.stopped:
            break
    return [*out, growing.finish()]


def test_pieces_join_to_the_text_and_never_show_half_a_character():
    tokenizer = chat_tokenizer(["Tea or coffee"])  # of other characters each byte is a token
    tokens = tokenizer(TEXT)["input_ids"]
    assert len(tokens) > len(TEXT)
    out = pieces(tokenizer, tokens)
    assert "".join(out) == TEXT
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in out)
    assert sum(map(bool, out)) > 30  # it did come in pieces


def test_bytes_that_are_no_text_come_out_as_all_at_once():
    tokenizer, draw = chat_tokenizer(["Tea or coffee"]), random.Random(0)
    for _ in range(50):
        tokens = [draw.randrange(len(tokenizer)) for _ in range(20)]
        assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_words_keep_the_space_between_them():
    tokenizer = word_tokenizer(["tea or coffee"])
    assert pieces(tokenizer, tokenizer("tea or coffee")["input_ids"]) == ["tea", " or", " coffee", ""]


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["coffee"], "Tea 茶 or "),
        (["nd"], TEXT[: TEXT.index("nd")]),
        (["coffee", "or co"], "Tea 茶 "),  # the earlier
        (["☕,"], "Tea 茶 or coffee "),
        (["coffees"], TEXT),  # begun, and not ended
        (["d"], TEXT[: TEXT.index("d")]),
        (["end."], TEXT),
    ],
)
def test_a_stop_text_ends_it_and_none_of_it_is_shown(stop, expected):
    tokenizer = chat_tokenizer(["Tea or coffee"])
    out = pieces(tokenizer, tokenizer(TEXT)["input_ids"], stop)
    assert "".join(out) == expected
