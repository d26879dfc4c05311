# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Whom a model knows: what it makes of what people chose."""

import json

import numpy as np
import pytest
import torch
from peft import get_peft_model

from trl_cuma import CuMAConfig, FieldEncoder
from trl_cuma.evaluation.own_choices import OwnChoices, encode_candidates, own_choice_accuracy
from trl_cuma.evaluation.resampling import crossed_clusters, resampled_mean
from trl_cuma.generation.vectors import NOT_KNOWN
from trl_cuma.testing import chat_tokenizer, tiny_model

ANN, BEN = {"country": "Brazil"}, {"country": "Japan"}


def said(text):
    return [{"role": "assistant", "content": text}]


def asked(text):
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]


def pair(person, prompt, chosen, rejected, demographic):
    return {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "person_id": person,
        "demographic": demographic,
    }


# One row per rejected answer, as they are prepared: Ann's first choice has three candidates.
CHAT = [
    pair("ann", asked("Tea?"), said("Yes, tea."), said("No."), ANN),
    pair("ben", asked("Tea?"), said("No."), said("Yes, tea."), BEN),
    pair("ann", asked("Tea?"), said("Yes, tea."), said("Some water, please"), ANN),
    pair("ann", asked("And now?"), said("Sleep"), said("Run"), ANN),
]
TEXT = [pair("ann", "Tea?", " yes", " no, never", ANN), pair("ben", "Tea?", " no, never", " yes", BEN)]


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer(["Tea? Yes, tea. No."])


@pytest.fixture(scope="module")
def encoder():
    return FieldEncoder(min_count=1).fit([ANN, BEN])


@pytest.fixture(scope="module")
def model(tokenizer, encoder):
    config = CuMAConfig(
        target_modules=["v_proj", "down_proj"],
        demographic_dim=encoder.dim,
        demographic_encoder=encoder.state(),
        num_experts=4,
        r=4,
        lora_alpha=64,
        init_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    base = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=32, max_position_embeddings=96)
    return get_peft_model(base, config).eval()


@torch.no_grad()
def by_hand(model, tokenizer, prompt, answer, vector):
    """Log-likelihood and number of tokens: one row, no padding."""
    if isinstance(prompt, str):
        head, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"]
    else:
        head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(prompt + answer, return_dict=True)["input_ids"]
    logits = model(input_ids=torch.tensor([whole]), demographic_embeds=vector).logits[0].log_softmax(-1)
    places = range(len(head), len(whole))
    return sum(logits[place - 1, whole[place]].item() for place in places), len(places)


@pytest.mark.parametrize(("rows", "choices"), [(CHAT, [[0, 2], [1], [3]]), (TEXT, [[0], [1]])], ids=["chat", "text"])
def test_log_likelihoods_are_those_of_each_answer_alone(model, tokenizer, encoder, rows, choices):
    found = own_choice_accuracy(model, tokenizer, rows, max_batch_tokens=100, description=None)
    assert len(found.log_likelihood) == len(found.num_tokens) == len(choices)
    for numbers, sums, sizes in zip(choices, found.log_likelihood, found.num_tokens, strict=True):
        first = rows[numbers[0]]
        vector = encoder.encode([first["demographic"]])
        candidates = [first["chosen"], *(rows[number]["rejected"] for number in numbers)]
        expected = [by_hand(model, tokenizer, first["prompt"], answer, vector) for answer in candidates]
        np.testing.assert_allclose(sums, [value for value, _ in expected], rtol=1e-4)
        assert sizes.tolist() == [size for _, size in expected]


def test_the_profile_that_counts_is_the_persons(model, tokenizer):
    theirs = own_choice_accuracy(model, tokenizer, CHAT, description=None)
    swapped = [row | {"demographic": BEN if row["person_id"] == "ann" else ANN} for row in CHAT]
    others = own_choice_accuracy(model, tokenizer, swapped, description=None)
    for mine, other in zip(theirs.log_likelihood, others.log_likelihood, strict=True):
        assert np.abs(mine - other).max() > 1e-2
    with model.disable_adapter():  # the base model, which knows nobody
        nobody = own_choice_accuracy(model, tokenizer, CHAT, description=None)
        swapped = own_choice_accuracy(model, tokenizer, swapped, description=None)
    for mine, other in zip(nobody.log_likelihood, swapped.log_likelihood, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_rows_make_choices_of_people_about_prompts(model, tokenizer):
    choices = own_choice_accuracy(model, tokenizer, CHAT, description=None)
    assert choices.person.tolist() == [0, 1, 0]
    assert choices.prompt.tolist() == [0, 0, 1]
    # The same words on two occasions are two choices; near-duplicate prompts are one group.
    rows = [row | {"conversation_id": str(number), "prompt_group": "g"} for number, row in enumerate(CHAT)]
    apart = own_choice_accuracy(model, tokenizer, rows, description=None)
    assert apart.person.tolist() == [0, 1, 0, 0]
    assert apart.prompt.tolist() == [0] * 4


def test_scores_by_hand():
    """
    Choice 0 beats both others in sum; per token (-4/4, -6/2, -5/10) it beats one of two, and is not the likeliest.
    Choice 1 ties: half a pair, half a choice; per token (-2/1, -2/2) it loses.
    Choice 2 loses in sum (-9 to -3), and wins per token (-9/9, -3/1).
    """
    choices = OwnChoices(
        person=np.array([0, 1, 1]),
        prompt=np.array([0, 0, 1]),
        log_likelihood=[np.array([-4.0, -6.0, -5.0]), np.array([-2.0, -2.0]), np.array([-9.0, -3.0])],
        num_tokens=[np.array([4, 2, 10]), np.array([1, 2]), np.array([9, 1])],
        rows=5,
        bad_rows={"no text": 1},
    )
    expected = {
        "pair_accuracy": [1, 0.5, 0],
        "pair_accuracy_per_token": [0.5, 0, 1],
        "choice_accuracy": [1, 0.5, 0],
        "choice_accuracy_per_token": [0, 0, 1],
        "pair_accuracy_longer": [0.5, 0, 1],
        "choice_chance": [1 / 3, 1 / 2, 1 / 2],
    }
    assert {name: values.tolist() for name, values in choices.scores.items()} == expected
    document = choices.document(num_samples=50)
    for name, values in expected.items():
        entry = document["metrics"][name]
        assert entry["value"] == pytest.approx(np.mean(values))
        assert entry["low"] is None and "fewer than 5 clusters" in entry["note"]  # of two people
        assert (entry["n"], entry["unit"]) == (2, "person × prompt")
    assert document["counts"] == {
        "rows": 5,
        "choices": 3,
        "pairs": 4,
        "people": 2,
        "prompts": 2,
        "ties": 1,
        "bad_rows": {"no text": 1},
    }


def test_a_choice_among_equally_likely_answers_is_a_guess():
    """By rounding alone one is more likely: of three, one in three; each pair a half."""
    sums = np.array([-100.0, -100.00001, -99.99999])
    choices = OwnChoices(np.array([0]), np.array([0]), [sums], [np.array([3, 3, 3])], 2, {})
    assert choices.scores["choice_accuracy"] == pytest.approx([1 / 3])
    assert choices.scores["pair_accuracy"] == [0.5]


def test_bad_rows_are_counted(model, tokenizer):
    bad = [
        pair(None, asked("Tea?"), said("Yes"), said("No"), ANN),
        pair("ann", asked("Tea?"), said("Yes"), None, ANN),
        pair("ann", asked("Tea? " * 99), said("Yes"), said("No"), ANN),  # the model reads 96 tokens
    ]
    document = own_choice_accuracy(model, tokenizer, CHAT + bad, description=None).document(num_samples=50)
    reasons = {"no person": 1, "no text": 1, "longer than the model's context": 1}
    assert document["counts"]["bad_rows"] == reasons
    assert (document["counts"]["rows"], document["counts"]["choices"]) == (7, 3)
    for secret in ("ann", "Brazil", "Tea", "Sleep"):
        assert secret not in json.dumps(document)
    with pytest.raises(ValueError, match="None of 3 rows") as caught:
        own_choice_accuracy(model, tokenizer, bad, description=None)
    assert "Brazil" not in str(caught.value)


def test_a_missing_profile_leaves_a_row_out_and_a_missing_column_is_named(model, tokenizer):
    row = dict(CHAT[0])
    del row["rejected"]
    with pytest.raises(ValueError, match=r"Row 1 has no \['rejected'\]"):
        own_choice_accuracy(model, tokenizer, [CHAT[0], row], description=None)
    found = own_choice_accuracy(model, tokenizer, [CHAT[0] | {"demographic": None}, *CHAT[1:]], description=None)
    assert found.bad_rows == {NOT_KNOWN: 1} and found.rows == 4
    alone = own_choice_accuracy(model, tokenizer, CHAT[1:], description=None)
    for name, values in found.scores.items():
        np.testing.assert_allclose(values, alone.scores[name])


def test_an_answer_is_closed_once(tokenizer):
    end = tokenizer.eos_token
    once = encode_candidates(tokenizer, "Tea?", [" yes", " no"])
    twice = encode_candidates(tokenizer, "Tea?", [" yes" + end, " no" + end])
    assert once.options == twice.options
    assert all(tokens[-1] == tokenizer.eos_token_id for tokens in once.options)
    with pytest.raises(ValueError, match="no token before its answers"):
        encode_candidates(tokenizer, "", ["a", "b"])


# ---------------------------------------------------------------------- what is resampled
def test_nested_clusters_are_resampled_by_the_coarser():
    people, prompts = np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3])
    for columns in ([people, prompts], [prompts, people]):
        (column,) = crossed_clusters(columns)
        assert column is people  # each prompt is one person's
    assert len(crossed_clusters([people, np.array([0, 1, 0, 1])])) == 2
    (column,) = crossed_clusters([np.zeros(4, dtype=int), prompts])  # a single person says nothing of people
    assert column is prompts


def test_no_interval_where_there_is_nothing_to_resample():
    rows = np.arange(4)
    assert resampled_mean(np.ones(4), [rows, rows]).low is None
    assert resampled_mean(np.zeros(0), [rows[:0], rows[:0]]).value is None
    rows = np.arange(8)
    spread = resampled_mean(np.array([0.0, 1.0, 1.0, 1.0] * 2), [rows, rows], num_samples=200)
    assert spread.low < spread.value == 0.75 < spread.high
