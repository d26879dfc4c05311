# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Clients get the answers that the model gives alone, each for its own person, whatever is decoded beside them."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from openai import OpenAI
from peft import AutoPeftModelForCausalLM

from trl_cuma import load_demographic_encoder

KENYA, JAPAN = {"country": "Kenya", "age": "18"}, {"country": "Japan", "age": "70"}
ASKED = [{"role": "user", "content": "Tea or coffee ?"}]
OF_JAPAN = {"metadata": JAPAN}  # OpenAI's client knows `metadata` of conversations alone
SAMPLED = {"temperature": 1.1, "top_p": 0.9, "seed": 11}


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def alone(answerer, saved_adapter):
    """What `generate` says to a prompt by itself, of a model of its own: the server's thread has the other."""
    encoder = load_demographic_encoder(saved_adapter())
    model = AutoPeftModelForCausalLM.from_pretrained(saved_adapter())

    def answer(prompt, profile, max_new_tokens=6):
        tokens = torch.tensor([answerer.encode(prompt)])
        embeds = encoder.encode([profile])
        output = model.generate(tokens, demographic_embeds=embeds, max_new_tokens=max_new_tokens)
        return answerer.tokenizer.decode(output[0, tokens.shape[1] :], skip_special_tokens=True)

    return answer


def test_an_answer_is_that_of_the_model_for_this_person(client, alone, answerer):
    said = {}
    for profile in (KENYA, JAPAN):
        response = client.chat.completions.create(model="cuma", messages=ASKED, metadata=profile, max_tokens=6)
        (choice,) = response.choices
        said[profile["country"]] = choice.message.content
        assert (choice.message.role, choice.finish_reason, response.model) == ("assistant", "length", "cuma")
        assert choice.message.content == alone(ASKED, profile)
        assert response.usage.prompt_tokens == len(answerer.encode(ASKED))
        assert (response.usage.completion_tokens, response.usage.total_tokens) == (6, 6 + len(answerer.encode(ASKED)))
    assert said["Kenya"] != said["Japan"]


def test_completions_continue_texts(client, alone):
    response = client.completions.create(
        model="cuma", prompt=["Tea or", "What makes"], extra_body=OF_JAPAN, max_tokens=5
    )
    assert [choice.text for choice in response.choices] == [alone(text, JAPAN, 5) for text in ("Tea or", "What makes")]
    assert [choice.index for choice in response.choices] == [0, 1]
    one = client.completions.create(
        model="cuma", prompt="Tea or", extra_body=OF_JAPAN
    )  # the server's own limit of tokens
    assert one.choices[0].text == alone("Tea or", JAPAN, 6)


def test_people_who_ask_at_once_get_their_own_answers_in_one_batch(server, run_server, slow_answerer, alone):
    with run_server(slow_answerer.answerer, wait_ms=0, default_max_tokens=6) as running:
        with ThreadPoolExecutor(8) as pool:
            first = pool.submit(running.chat)
            assert slow_answerer.began.wait(60)  # the others come while it is being answered
            profiles = [KENYA, JAPAN, {"country": "Korea, South"}] * 2
            limits = [3, 4, 5, 6, 7, 8]
            waiting = [
                pool.submit(running.chat, metadata=profile, max_tokens=limit)
                for profile, limit in zip(profiles, limits, strict=True)
            ]
            while len(running.engine._waiting) < len(waiting):
                pass
            slow_answerer.gate.set()
            answers = [job.result(60)[1]["choices"][0]["message"]["content"] for job in waiting]
            assert first.result(60)[0] == 200
        assert slow_answerer.sizes == [1, 6]
        assert running.metric('cuma_batch_size_bucket{le="1.0"}') == 1 and running.metric("cuma_batch_size_sum") == 7
    assert answers == [alone(ASKED, profile, limit) for profile, limit in zip(profiles, limits, strict=True)]


def stream_of(client, **fields):
    """The texts by choice, the endings, and the chunks."""
    texts, endings, chunks = {}, {}, []
    for chunk in client.chat.completions.create(model="cuma", messages=ASKED, stream=True, **fields):
        chunks.append(chunk)
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                endings[choice.index] = choice.finish_reason
    return texts, endings, chunks


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_streaming_equals_not_streaming(client, settings):
    fields = {"metadata": KENYA, "max_tokens": 12, "n": 2, **settings}
    whole = client.chat.completions.create(model="cuma", messages=ASKED, **fields)
    texts, endings, chunks = stream_of(client, **fields)
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert endings == {0: "length", 1: "length"}
    assert len(chunks) > 8 and all(chunk.usage is None for chunk in chunks)
    assert (texts[0] == texts[1]) == (not settings)  # choices of one request are different draws
    *_, last = stream_of(client, **fields, stream_options={"include_usage": True})[2]
    assert last.choices == [] and last.usage == whole.usage
    again = client.chat.completions.create(model="cuma", messages=ASKED, **fields)
    assert [c.message.content for c in again.choices] == [c.message.content for c in whole.choices]  # by the seed


def test_text_streams_of_completions(client):
    fields = {"model": "cuma", "prompt": "Tea or", "max_tokens": 5, "extra_body": OF_JAPAN}
    chunks = list(client.completions.create(**fields, stream=True))
    whole = client.completions.create(**fields)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_stop_text_ends_an_answer(client, alone):
    text = alone(ASKED, KENYA, 12)
    stop = text[5:7]
    response = client.chat.completions.create(model="cuma", messages=ASKED, metadata=KENYA, max_tokens=12, stop=[stop])
    assert response.choices[0].message.content == text[: text.index(stop)]
    assert response.choices[0].finish_reason == "stop"
    streamed = stream_of(client, metadata=KENYA, max_tokens=12, stop=stop)
    assert streamed[0] == {0: text[: text.index(stop)]} and streamed[1] == {0: "stop"}


def test_messages_may_have_parts_and_a_developer(server, alone):
    parts = [{"type": "text", "text": "Tea or "}, {"type": "text", "text": "coffee ?"}]
    messages = [{"role": "developer", "content": "money"}, {"role": "user", "content": parts}]
    status, body = server.chat(messages=messages)
    expected = alone([{"role": "system", "content": "money"}, *ASKED], KENYA)
    assert (status, body["choices"][0]["message"]["content"]) == (200, expected)


def test_a_value_that_the_adapter_does_not_know_is_answered_with_a_warning(server, alone):
    status, body = server.chat(metadata={"country": "Zanzibar", "age": "18"})
    assert status == 200 and body["choices"][0]["message"]["content"] == alone(ASKED, {"age": "18"})
    (warning,) = body["warnings"]
    assert "It knows Japan; Kenya; Korea, South." in warning and "Zanzibar" not in warning
    assert "warnings" not in server.chat()[1]
    _, _, raw = server.request(
        "POST",
        "/v1/chat/completions",
        json.dumps({"messages": ASKED, "metadata": {"country": "Zanzibar", "age": "18"}, "stream": True}),
        {"Content-Type": "application/json"},
    )
    events = [line.removeprefix("data: ") for line in raw.decode().split("\n\n") if line]
    assert json.loads(events[0])["warnings"] == [warning] and events[-1] == "[DONE]"


def test_neutral_fields_of_clients_are_taken(server):
    neutral = {"frequency_penalty": 0.0, "presence_penalty": 0, "logprobs": False, "tools": [], "top_logprobs": None}
    assert server.chat(**neutral, user="someone", store=False, response_format={"type": "text"})[0] == 200


def test_models_and_health(client, server):
    assert [model.id for model in client.models.list()] == ["cuma"]
    assert server.request("GET", "/health")[0] == 200
