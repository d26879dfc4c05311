# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import pytest

from trl_cuma.rewards.batch import plain_text, read_texts, strip_reasoning


def test_messages_read_as_their_content_or_under_their_roles():
    assert plain_text("Hello") == "Hello"
    assert plain_text([{"role": "assistant", "content": "Hello"}]) == "Hello"
    assert plain_text([{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"text": "lo"}]}]) == "Hello"
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    assert plain_text(turns) == "system: Be kind.\n\nuser: Hello"
    call = [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool", "content": "42"}]
    assert plain_text(call) == "assistant: \n\ntool: 42"
    assert plain_text([{"role": "assistant", "tool_calls": [{"name": "add"}]}, call[1]]) == "assistant: \n\ntool: 42"


@pytest.mark.parametrize("value", [3, ["Hello"], [{"role": "user", "content": [{"type": "image"}]}]])
def test_what_is_no_text_is_refused_with_its_row_and_without_its_content(value):
    with pytest.raises(TypeError, match="Row 1 of the batch, the prompt: expected") as error:
        read_texts(["fine", value], "the prompt")
    assert "Hello" not in str(error.value)


@pytest.mark.parametrize("missing", ["role", "content"])
@pytest.mark.parametrize("turns", [1, 2])
def test_a_message_without_role_or_content_is_named_by_row_and_column(missing, turns):
    fine = [{"role": "user", "content": "Hello"}] * turns
    broken = [*fine[1:], {key: value for key, value in fine[0].items() if key != missing}]
    with pytest.raises(TypeError, match=f"Row 1 of the batch, the 'best' column: .* a `{missing}` each") as error:
        read_texts([fine, broken], "the 'best' column")
    assert "Hello" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "visible"),
    [
        ("<think>hm</think> Yes", "Yes"),
        ("hm</think>Yes", "Yes"),
        ("Yes <think>but", "Yes"),
        ("<think>a</think>One <think>b\nc</think>two", "One two"),
        (" No thoughts. ", "No thoughts."),
    ],
)
def test_reasoning_is_left_out(text, visible):
    assert strip_reasoning(text) == visible
