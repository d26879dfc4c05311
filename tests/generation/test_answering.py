# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Answers in a mixed batch are those of each question alone, with its own profile, settings and end."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from trl_cuma import load_demographic_encoder
from trl_cuma.evaluation.generation import generate_answers
from trl_cuma.generation.answering import Answerer, Question, Sampling
from trl_cuma.generation.loading import load_model

PROFILES = [{"country": "Kenya", "age": "18"}, {"country": "Japan", "age": "70"}, {"country": "Korea, South"}]
PROMPTS = [[{"role": "user", "content": text}] for text in ("Tea or coffee ?", "a", "What makes a good life ?")]
DRAWN = {"temperature": 0.9, "top_p": 0.95, "top_k": 30, "seed": 5}
SETTINGS = [Sampling(6), Sampling(9, **DRAWN), Sampling(3, temperature=1.5, seed=1), Sampling(9, min_p=0.05, **DRAWN)]


@pytest.fixture(scope="module")
def questions(answerer):
    """Every prompt for every profile, with settings that change from one to the next."""
    pairs = [(prompt, profile) for prompt in PROMPTS for profile in PROFILES]
    settings = [SETTINGS[i % len(SETTINGS)] for i in range(len(pairs))]
    return [
        Question(answerer.encode(prompt), profile, s) for (prompt, profile), s in zip(pairs, settings, strict=True)
    ]


def test_a_mixed_batch_answers_each_question_as_if_it_were_alone(answerer, questions):
    together = answerer.answer(questions)
    alone = [answerer.answer([question])[0] for question in questions]
    assert together == alone
    assert len({reply.text for reply in together}) > 6
    assert [reply.num_tokens for reply in together] == [q.sampling.max_new_tokens for q in questions]
    assert {reply.ending for reply in together} == {"length"}


def test_greedy_answers_are_those_of_generate(answerer, saved_adapter):
    encoder = load_demographic_encoder(saved_adapter())
    texts = set()
    for prompt, profile in zip(PROMPTS, PROFILES, strict=True):
        tokens = answerer.encode(prompt)
        (reply,) = answerer.answer([Question(tokens, profile, Sampling(6))])
        output = answerer.model.generate(
            input_ids=torch.tensor([tokens]), demographic_embeds=encoder.encode([profile]), max_new_tokens=6
        )
        assert reply.text == answerer.tokenizer.decode(output[0, len(tokens) :], skip_special_tokens=True)
        texts.add(answerer.answer([Question(answerer.encode(PROMPTS[0]), profile, Sampling(6))])[0].text)
    assert len(texts) == 3  # the profile decides


def test_evaluation_answers_the_same(answerer):
    written = generate_answers(
        answerer.model, answerer.tokenizer, PROMPTS, PROFILES, max_new_tokens=6, description=None
    )
    questions = [Question(answerer.encode(p), who, Sampling(6)) for p, who in zip(PROMPTS, PROFILES, strict=True)]
    assert [reply.text for reply in answerer.answer(questions)] == written.first


def test_what_streams_is_the_answer(answerer, questions):
    streamed = ["" for _ in questions]
    order = []

    def on_text(row, text):
        streamed[row] += text
        order.append(row)

    replies = answerer.answer(questions, on_text=on_text)
    assert streamed == [reply.text for reply in replies]
    assert order != sorted(order)  # side by side, not one after the other


def test_a_stop_text_ends_its_own_row(answerer):
    tokens = answerer.encode(PROMPTS[0])
    whole = answerer.answer([Question(tokens, PROFILES[0], Sampling(12))])[0].text
    stop = whole[4:6]
    first, second = answerer.answer(
        [Question(tokens, PROFILES[0], Sampling(12, stop=(stop,))), Question(tokens, PROFILES[0], Sampling(12))]
    )
    assert (first.text, first.ending) == (whole[: whole.index(stop)], "stop")
    assert (second.text, second.ending) == (whole, "length")


def test_the_models_end_token_ends_a_reply_without_its_text(answerer):
    tokens = answerer.encode(PROMPTS[0])
    output = answerer.model.generate(
        input_ids=torch.tensor([tokens]),
        demographic_embeds=answerer.table.encoder.encode([PROFILES[0]]),
        max_new_tokens=4,
    )[0, len(tokens) :].tolist()
    config = answerer.model.generation_config
    before, config.eos_token_id = config.eos_token_id, [output[2]]
    try:
        (reply,) = answerer.answer([Question(tokens, PROFILES[0], Sampling(12))])
    finally:
        config.eos_token_id = before
    place = output.index(output[2]) + 1
    assert (reply.num_tokens, reply.ending) == (place, "stop")


def test_a_question_that_nobody_waits_for_costs_no_more_tokens(answerer):
    question = Question(answerer.encode(PROMPTS[0]), PROFILES[0], Sampling(8))
    first, second = answerer.answer([question, question], cancelled=lambda row: row == 0)
    assert (first.num_tokens, first.ending) == (1, "cancelled")
    assert second == answerer.answer([question])[0]


# ---------------------------------------------------------------------- settings
@pytest.fixture
def own_settings(saved_adapter):
    """An answerer whose model brings sampling settings of its own."""

    def make(**settings):
        model, tokenizer, _ = load_model(None, str(saved_adapter()))
        model.generation_config.update(**settings)
        return Answerer(model, tokenizer)

    return make


def test_the_models_own_sampling_settings_hold_until_others_are_given(own_settings):
    answerer = own_settings(do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
    assert answerer.sampling() == Sampling(512, 0.6, 0.9, 20)
    assert answerer.sampling(temperature=None, top_p=0.5, seed=3) == Sampling(512, 0.6, 0.5, 20, seed=3)
    assert answerer.sampling(temperature=0) == Sampling()
    assert own_settings(do_sample=True).sampling().temperature == 1.0
    assert own_settings().sampling() == Sampling()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "`temperature` is -1.0"),
        ({"temperature": float("nan")}, "`temperature` is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "`top_p` is 0.0"),
        ({"temperature": 1.0, "min_p": 2.0}, "`min_p` is 2.0"),
        ({"top_p": 0.5}, "`top_p` needs a `temperature` above 0"),
        ({"temperature": 0, "top_k": 5}, "`top_k` needs a `temperature` above 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ({"seed": -1}, "`seed` is -1"),
        ({"stop": ("",)}, "`stop` has an empty text"),
    ],
)
def test_settings_out_of_range(answerer, settings, message):
    with pytest.raises(ValueError, match=message):
        answerer.sampling(**settings)


# ---------------------------------------------------------------------- refusals
def test_prompts_that_cannot_be_answered(answerer, saved_adapter):
    model, tokenizer, _ = load_model(None, str(saved_adapter(chat=False)))
    plain = Answerer(model, tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has no chat template. Give a text."):
        plain.encode(PROMPTS[0])
    with pytest.raises(ValueError, match="has no tokens"):
        plain.encode("")
    with pytest.raises(ValueError, match="The chat template refuses the conversation"):
        answerer.encode([{"role": "user"}])
    context = answerer.model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"`max_new_tokens={context}` that is more than the model's context"):
        answerer.answer([Question(answerer.encode(PROMPTS[0]), PROFILES[0], Sampling(context))])


def test_an_adapter_of_ready_made_vectors_is_refused(saved_adapter):
    model, tokenizer, _ = load_model(None, str(saved_adapter(demographic_encoder=None)))
    with pytest.raises(ValueError, match="trained on ready-made vectors"):
        Answerer(model, tokenizer)


def test_a_model_without_an_adapter_answers_without_profiles(saved_adapter):
    base = str(saved_adapter().parent / "base")
    model, tokenizer, name = load_model(base, None)
    assert name == base
    answerer = Answerer(model, tokenizer)
    (reply,) = answerer.answer([Question(answerer.encode(PROMPTS[0]), None, Sampling(4))])
    plain = AutoModelForCausalLM.from_pretrained(base)
    tokens = torch.tensor([answerer.encode(PROMPTS[0])])
    output = plain.generate(tokens, generation_config=GenerationConfig(max_new_tokens=4, pad_token_id=0))
    assert reply.text == tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)


# ---------------------------------------------------------------------- the README's lines
def test_the_lines_of_the_readme(saved_adapter, monkeypatch):
    """Its code for inference runs as it stands there."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import trl_cuma .*?)```", text, re.DOTALL)
    code = code.replace('"cuma-dpo"', repr(str(saved_adapter()))).replace('"25-34"', '"18"')
    assert "load_demographic_encoder(" in code and 'encoder.encode([{"country": "Kenya", "age": "18"}])' in code
    *lines, last = code.strip().splitlines()
    model, tokenizer, _ = load_model(None, str(saved_adapter()))
    answerer = Answerer(model, tokenizer)
    tokens = answerer.encode(PROMPTS[0])
    names = {"inputs": {"input_ids": torch.tensor([tokens]), "max_new_tokens": 6}}
    exec("\n".join([*lines, f"output = {last}"]), names)
    (reply,) = answerer.answer([Question(tokens, PROFILES[0], Sampling(6))])
    assert tokenizer.decode(names["output"][0, len(tokens) :], skip_special_tokens=True) == reply.text
