# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Prompts that no profile has a bearing on."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from trl_cuma import CuMAConfig, FieldEncoder
from trl_cuma.data.prompts import PromptFormat
from trl_cuma.data.survey import Question
from trl_cuma.evaluation.neutral import neutral_document, neutral_rows, read_neutral_questions
from trl_cuma.evaluation.survey import predict_rows
from trl_cuma.testing import chat_tokenizer, tiny_model

PROFILES = [{"country": country, "age": age} for country in ("Arvenia", "Bosk") for age in ("young", None)]
SUMS = [Question("neutral-1", "What is 1 + 1?", ("two", "three")), Question("neutral-2", "Red?", ("a", "b", "c"))]


def evaluated(wording):
    """Rows of a survey, as `trl-cuma prepare` words them."""
    question = Question("q", "Is salt good?", ("Yes", "No"))
    rows = []
    for profile in [*PROFILES, {"country": None, "age": None}]:
        opening = wording.opening(profile, "survey")
        system = [] if opening.system is None else [{"role": "system", "content": opening.system}]
        user = {"role": "user", "content": opening.prefix + wording.question(question)}
        rows.append({"prompt": [*system, user], "demographic": profile})
    return Dataset.from_list(rows)


@pytest.mark.parametrize("place", ["none", "system", "user"])
@pytest.mark.parametrize("template", ["plain", "paper"])
def test_every_profile_is_asked_the_same_in_the_rows_own_wording(place, template):
    wording = PromptFormat(demographics=place, template=template)
    asked = neutral_rows(SUMS, evaluated(wording), "demographic", 0)
    assert len(asked) == 2 * 4  # nobody of whom nothing is known
    for row in asked:
        opening = wording.opening(row["demographic"], "survey")
        question = SUMS[row["question_id"] == "neutral-2"]
        assert row["prompt"][-1]["content"] == opening.prefix + wording.question(question)
        assert [m["content"] for m in row["prompt"][:-1]] == [opening.system] * (opening.system is not None)
        assert row["options"] == list(question.options)
    said = {row["prompt"][-1]["content"] for row in asked}
    assert len(said) == (8 if place == "user" else 2)


def test_the_divergence_is_the_adapters_own():
    rows = evaluated(PromptFormat())
    asked = neutral_rows(SUMS, rows, "demographic", 0)
    tokenizer = chat_tokenizer([row["prompt"][-1]["content"] for row in asked])
    base = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=32, initializer_range=0.2)
    plain = neutral_document(predict_rows(base, tokenizer, asked, show_progress=False), num_samples=20, seed=0)
    assert plain["divergence"]["value"] == 0 and plain["prompts"] == 2
    encoder = FieldEncoder(min_count=1).fit(PROFILES)
    torch.manual_seed(0)
    config = CuMAConfig(
        target_modules=["v_proj"], demographic_encoder=encoder.state(), demographic_dim=encoder.dim, init_weights=False
    )
    prediction = predict_rows(get_peft_model(base, config), tokenizer, asked, show_progress=False)
    found = neutral_document(prediction, num_samples=20, seed=0)
    assert found["profiles"] == 4 and not found["bad_rows"]
    expected = []
    for name in ("neutral-1", "neutral-2"):
        probs = prediction.predicted[prediction.question_id == name][:, : 2 + (name == "neutral-2")]
        expected.append(np.mean(np.sum(probs * np.log(probs / probs.mean(0)), 1)))
    assert found["divergence"]["value"] == pytest.approx(np.mean(expected)) and np.mean(expected) > 1e-4
    assert found["divergence"]["unit"] == "prompt" and "Arvenia" not in json.dumps(found)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2 is no JSON"),
        ('{"question": " ", "options": ["a", "b"]}', "line 2: `question`"),
        ('{"question": "Q?", "options": "ab"}', "line 2: `options` must be a list"),
        ('{"question": "Q?", "options": ["a"]}', "line 2: `options` has 1"),
        ('{"question": "Q?", "options": ["a", "a"]}', "all different"),
        ('["Q?"]', "line 2: `question`"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "neutral.jsonl"
    path.write_text('{"question": "Q?", "options": ["a", "b"]}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_neutral_questions(path)
    path.write_text('{"question": "Q?", "options": ["a", "b"]}\n\n')
    assert read_neutral_questions(path) == [Question("neutral-1", "Q?", ("a", "b"))]
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_neutral_questions(path)


def test_rows_that_can_not_be_reworded_are_refused():
    rows = evaluated(PromptFormat())
    with pytest.raises(ValueError, match="fewer than two"):
        neutral_rows(SUMS, rows.select([0, 0]), "demographic", 0)
    other = rows.map(lambda row: {"prompt": [{"role": "system", "content": "Be brief."}, *row["prompt"]]})
    with pytest.raises(ValueError, match="not worded as"):
        neutral_rows(SUMS, other, "demographic", 0)
    vectors = rows.remove_columns("demographic").add_column("demographic", [[1.0, 2.0]] * 5)
    with pytest.raises(ValueError, match="profiles of fields"):
        neutral_rows(SUMS, vectors, "demographic", 0)
