# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Approximate exports: the distance is what brute force finds, and the distillation brings it down."""

import numpy as np
import pytest
import torch

from trl_cuma.adapter.export import collapse, in_place_of_experts
from trl_cuma.export.distill import Answered, Distillation, answer, average, distill, measure
from trl_cuma.export.exporter import Exporter

HOW = Distillation(max_new_tokens=4, steps=60)


@pytest.fixture
def encoded(tokenizer, prompts):
    return [tokenizer(prompt)["input_ids"] for prompt in prompts]


def vector(model, seed: int = 0) -> torch.Tensor:
    return torch.randn(model.peft_config["default"].demographic_dim, generator=torch.Generator().manual_seed(seed))


def test_distilling_brings_a_joint_routers_lora_nearer_on_held_out_prompts(make_model, tokenizer, encoded):
    model = make_model(routing="joint")
    found = Exporter(model, tokenizer, encoded, rank=6, how=HOW).export(vector(model))
    assert found.distance.prompts == 8  # a quarter of 32
    assert found.distance.mean_kl < 0.8 * found.averaged.mean_kl
    assert all(a.shape[0] == b.shape[1] == 6 for a, b in found.factors.values())


@torch.no_grad()
def test_the_distance_is_the_one_computed_row_by_row(make_model, tokenizer, encoded):
    model = make_model(routing="joint")
    embeds = vector(model)
    rows = answer(model, tokenizer, [row[: 1 + number % 3] for number, row in enumerate(encoded[:9])], embeds, HOW)
    assert len({len(tokens) for tokens in rows.tokens}) > 1  # rows are padded
    factors = average(model, rows, embeds, 4, HOW)
    kls, same, tokens = [], 0, 0
    for row, start in zip(rows.tokens, rows.starts, strict=True):
        ids = torch.tensor([row])
        own = model(ids, demographic_embeds=embeds[None]).logits[0].double().log_softmax(-1)
        with in_place_of_experts(model, factors):
            other = model(ids).logits[0].double().log_softmax(-1)
        places = range(start - 1, len(row) - 1)  # what predicts the answer's tokens
        kls.append(np.mean([(own[p].exp() * (own[p] - other[p])).sum().item() for p in places]))
        same += sum(int(own[p].argmax() == other[p].argmax()) for p in places)
        tokens += len(places)
    found = measure(model, rows, embeds, factors, batch_size=4)
    assert found.mean_kl == pytest.approx(np.mean(kls), rel=1e-3)
    assert found.worst_kl == pytest.approx(max(kls), rel=1e-3)
    assert (found.top1_agreement, found.prompts, found.tokens) == (same / tokens, 9, tokens)


def test_answers_are_the_routed_models_draws(make_model, tokenizer, encoded):
    model = make_model(routing="joint")
    rows = answer(model, tokenizer, encoded, vector(model), HOW)
    assert [row[:start] for row, start in zip(rows.tokens, rows.starts, strict=True)] == encoded
    assert answer(model, tokenizer, encoded, vector(model), HOW).tokens == rows.tokens  # seeded
    assert answer(model, tokenizer, encoded, vector(model, 1), HOW).tokens != rows.tokens  # another's
    end = tokenizer.eos_token_id
    for row, start in zip(rows.tokens, rows.starts, strict=True):
        new = row[start:]
        assert 1 <= len(new) <= 4 and end not in new[:-1] and (len(new) == 4 or new[-1] == end)


def test_an_exact_export_has_no_distance_with_prompts_or_without(make_model, tokenizer, encoded):
    model = make_model()
    for prompts in (encoded, []):
        exporter = Exporter(model, tokenizer, prompts, how=HOW)
        found = exporter.export(vector(model))
        assert exporter.exact and exporter.rank == 6  # two experts of rank 3
        assert found.distance.mean_kl < 1e-6 and found.distance.top1_agreement == 1 and found.averaged is None


def test_a_rank_too_low_for_an_exact_one_is_approximated(make_model, tokenizer, encoded):
    model = make_model()
    exporter = Exporter(model, tokenizer, encoded, rank=2, how=HOW)
    assert not exporter.exact
    assert 1e-6 < exporter.export(vector(model)).distance.mean_kl
    with pytest.raises(ValueError, match="is an approximation, fitted to prompts.*Pass `prompts`"):
        Exporter(model, tokenizer, rank=2)


def test_film_is_approximated(make_model, tokenizer, encoded):
    model = make_model(film_hidden=4)
    found = Exporter(model, tokenizer, encoded, how=HOW).export(vector(model))
    assert found.distance.mean_kl < found.averaged.mean_kl


def test_held_out_prompts_are_never_fitted_to(make_model, tokenizer, encoded, monkeypatch):
    model = make_model(routing="joint")
    exporter = Exporter(model, tokenizer, encoded, how=HOW)
    assert sorted(exporter.fitted + exporter.held_out) == list(range(32))
    seen: dict[str, list[list[int]]] = {}

    def note(name, function):
        def call(model, rows, *args, **kwargs):
            seen.setdefault(name, []).extend(row[: rows.starts[0]] for row in rows.tokens)
            return function(model, rows, *args, **kwargs)

        return call

    for name, function in (("average", average), ("distill", distill), ("measure", measure)):
        monkeypatch.setattr(f"trl_cuma.export.exporter.{name}", note(name, function))
    exporter.export(vector(model))
    held_out = [encoded[row] for row in exporter.held_out]
    assert sorted(seen["measure"]) == sorted(held_out * 2)  # before and after
    assert not any(row in held_out for row in seen["average"] + seen["distill"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": -1}, "`steps` is -1"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"held_out": 1.0}, "`held_out` is 1.0"),
        ({"learning_rate": float("nan")}, "`learning_rate` is nan"),
    ],
)
def test_numbers_out_of_range_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**fields)


def test_a_prompt_beyond_the_models_context_is_refused(make_model, tokenizer, encoded):
    with pytest.raises(ValueError, match="Prompt 2 has 3000 tokens"):
        Exporter(make_model(routing="joint"), tokenizer, [*encoded[:2], [3] * 3000, *encoded[2:]])


def test_too_few_prompts_and_dropout_are_refused(make_model, tokenizer, encoded):
    with pytest.raises(ValueError, match="`prompts` has 7 different prompts; it takes at least 8"):
        Exporter(make_model(routing="joint"), tokenizer, encoded[:7])
    with pytest.raises(ValueError, match="in training mode"):
        Exporter(make_model().train(), tokenizer)


def test_logits_that_are_not_finite_are_an_error(make_model):
    model = make_model()
    factors = collapse(model, vector(model))
    model.get_base_model().lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        measure(model, Answered([[3, 4, 5]], [1]), vector(model), factors, 1)
