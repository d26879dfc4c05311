# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""That each row's profile is with it, from the data set to generation, scoring and the loss."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Qwen3Config
from trl.chat_template_utils import qwen3_chat_template

from trl_cuma import FieldEncoder
from trl_cuma.adapter.model import CuMAModel
from trl_cuma.adapter.router import CuMARouter
from trl_cuma.testing import chat_tokenizer


@pytest.fixture
def trained_adapter(make_grpo: Callable, tmp_path: Path) -> str:
    """The folder of an adapter whose residual is far from zero."""
    make_grpo().save_model(str(tmp_path / "adapter"))
    return str(tmp_path / "adapter")


class RouterSpy:
    """
    At each call of a router, compares the profile that each row is routed by with the person whom the row's prompt
    names. A decoding step sees one new token per row: its rows are those of the step that read the prompts.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, words: Any) -> None:
        self.seen: dict[str, list[list[int]]] = {}
        named_by = {words.convert_tokens_to_ids(f"p{person}"): person for person in range(8)}
        begin, route = CuMAModel._begin_forward, CuMARouter.forward

        def begin_forward(model: CuMAModel, base: Any, args: tuple, kwargs: dict) -> Any:
            rows = kwargs["input_ids"].tolist()
            if len(rows[0]) > 1:
                self.people = [next(named_by[token] for token in row if token in named_by) for row in rows]
            result = begin(model, base, args, kwargs)
            if model._conditioning.current.expand:
                self.phase = "decode" if len(rows[0]) == 1 else "prompt"
            else:
                self.phase = "loss" if torch.is_grad_enabled() else model.active_adapters[0]
            return result

        def forward(
            router: CuMARouter,
            hidden: torch.Tensor,
            demographic: torch.Tensor,
            gather: Callable | None = None,
            profile_part: torch.Tensor | None = None,
        ) -> Any:
            if profile_part is not None:
                torch.testing.assert_close(profile_part, router.profile_part(demographic))
            routed_by = gather(demographic)[:, 0, 0].tolist()
            assert routed_by == self.people, f"{self.phase}: rows of {self.people} are routed by {routed_by}"
            self.seen.setdefault(self.phase, []).append(self.people)
            return route(router, hidden, demographic, gather, profile_part)

        monkeypatch.setattr(CuMAModel, "_begin_forward", begin_forward)
        monkeypatch.setattr(CuMARouter, "forward", forward)


@pytest.mark.parametrize(
    "fields, continues, phases",
    [
        ({}, False, set()),
        (
            {"num_generations": 4, "steps_per_generation": 2, "per_device_train_batch_size": 4, "max_steps": 8},
            False,
            {"default"},  # the old log-probabilities
        ),
        (
            {"num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "beta": 0.1},
            True,
            {"default", "ref"},
        ),
        (
            {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "beta": 0.1}
            | {"per_device_train_batch_size": 2, "max_steps": 6, "cache_implementation": "static"},
            True,
            {"default", "ref"},
        ),
        ({"gradient_checkpointing": True, "bf16": True, "dataloader_num_workers": 1}, False, set()),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, True, set()),
    ],
    ids=["defaults", "split", "iterated", "all", "checkpointed", "reentrant"],
)
def test_rows_are_routed_by_whom_their_prompts_name(
    fields, continues, phases, make_grpo, words, trained_adapter, monkeypatch
):
    spy = RouterSpy(monkeypatch, words)
    if continues:
        fields = fields | {"cuma_adapter_path": trained_adapter}
    trainer = make_grpo(**({"max_steps": 4} | fields))
    trainer.train()
    assert spy.seen.keys() == {"prompt", "decode", "loss"} | phases
    generated = spy.seen["prompt"][0]
    assert all(generated.count(person) == trainer.num_generations for person in generated)
    assert any(rows != generated[: len(rows)] for rows in spy.seen["loss"])  # TRL shuffles between them
    assert {person for rows in spy.seen["loss"] for person in rows} == set(range(8))


def test_rows_of_an_evaluation_are_routed_by_whom_their_prompts_name(
    make_grpo, grpo_data, words, trained_adapter, monkeypatch
):
    spy = RouterSpy(monkeypatch, words)
    trainer = make_grpo(
        cuma_adapter_path=trained_adapter,
        beta=0.1,
        eval_dataset={"a": grpo_data(3), "b": grpo_data(4).to_iterable_dataset()},
        per_device_eval_batch_size=3,
        num_generations_eval=3,
        steps_per_generation=2,  # so that there are old log-probabilities
    )
    assert {"eval_a_loss", "eval_b_loss"} <= trainer.evaluate().keys()
    assert spy.seen.keys() == {"prompt", "decode", "default", "ref"}
    assert set(map(tuple, spy.seen["default"])) == {(person,) * 3 for person in range(4)}
    assert "eval_loss" in trainer.evaluate(grpo_data(2))
    with pytest.raises(ValueError, match=r"no 'demographic' column; it has \['prompt'\]"):
        trainer.evaluate(grpo_data(2).remove_columns("demographic"))


def test_completions_are_those_of_the_persons_own_generate(make_grpo, grpo_data):
    seen: dict[str, Any] = {}

    def reward(completion_ids, **columns):
        seen.update(columns, completion_ids=completion_ids)
        return [0.0] * len(completion_ids)

    trainer = make_grpo(
        grpo_data(prompt=["x x"] * 8),
        adapter={"lora_alpha": 256},
        reward_funcs=reward,
        generation_kwargs={"do_sample": False},
        learning_rate=0.0,
    )
    trainer.train()
    prompts = trainer.processing_class(seen["prompts"], return_tensors="pt")
    embeds = torch.tensor(seen["demographic"])
    tokens = trainer.model.generate(**prompts, demographic_embeds=embeds, generation_config=trainer.generation_config)
    expected = [[t for t in row if t] for row in tokens[:, 2:].tolist()]  # without padding
    assert seen["completion_ids"] == expected
    assert len(set(map(tuple, expected))) > 1  # one prompt, several people
    for (person, _), row in zip(seen["demographic"], expected, strict=True):
        assert row == expected[[p for p, _ in seen["demographic"]].index(person)]


def test_old_and_reference_log_probs_are_the_policys_at_step_0(make_grpo, trained_adapter):
    trainer = make_grpo(cuma_adapter_path=trained_adapter, beta=0.1, steps_per_generation=2)
    steps: list[tuple[torch.Tensor, ...]] = []
    compute, loss = trainer._get_per_token_logps_and_entropies, trainer._compute_loss

    def spy(*args, **kwargs):
        result = compute(*args, **kwargs)
        steps.append((result[0].detach(),))
        return result

    def compute_loss(model, inputs):
        value = loss(model, inputs)
        steps[-1] = (steps[-1][0], inputs["old_per_token_logps"], inputs["ref_per_token_logps"])
        return value

    trainer._get_per_token_logps_and_entropies, trainer._compute_loss = spy, compute_loss
    trainer.train()
    policy, old, reference = steps[-1]
    torch.testing.assert_close(old, policy, rtol=0, atol=1e-5)
    torch.testing.assert_close(reference, policy, rtol=0, atol=1e-5)
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-9)
    with torch.no_grad(), trainer._for_people(trainer._buffered_inputs[0]["demographic_embeds"].roll(1, 0)):
        inputs = trainer._buffered_inputs[0]
        ids, mask = (torch.cat([inputs[f"prompt_{k}"], inputs[f"completion_{k}"]], 1) for k in ("ids", "mask"))
        others, *_ = compute(trainer.model, ids, mask, inputs["completion_ids"].shape[1])
    assert (others - policy).abs().max() > 1e-2  # of other people they would have differed


def test_a_new_adapters_reference_is_the_base_model(make_grpo):
    trainer = make_grpo(adapter={"init_weights": True}, beta=0.1, max_steps=3)
    trainer.train()
    kl = [record["kl"] for record in trainer.state.log_history if "kl" in record]
    assert kl[0] == pytest.approx(0, abs=1e-9) and kl[2] > 1e-7
    assert "ref" not in trainer.model.peft_config


# ---------------------------------------------------------------------- rewards, tools
def test_reward_functions_get_the_column_and_reward_models_the_text(make_grpo, grpo_data, words):
    people = [{"age": "old", "country": None}, {"age": "young", "country": "JP"}] * 4
    data = grpo_data().remove_columns("demographic").add_column("demographic", people)
    judge = AutoModelForSequenceClassification.from_config(
        Qwen3Config(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, intermediate_size=16, num_labels=1)
    )
    calls: list[set[str]] = []
    judge.register_forward_pre_hook(lambda module, args, kwargs: calls.append(set(kwargs)), with_kwargs=True)
    seen: list[tuple[str, dict]] = []

    def reward(prompts, demographic, **kwargs):
        seen.extend(zip(prompts, demographic, strict=True))
        return [float(person["age"] == "old") for person in demographic]

    async def slow_reward(prompts, demographic, **kwargs):
        return reward(prompts, demographic)

    make_grpo(
        data,
        reward_funcs=[reward, slow_reward, judge],
        reward_processing_classes=[None, None, words],
        demographic_encoder=FieldEncoder(min_count=1),
    ).train()
    assert len(seen) == 16
    for prompt, person in seen:
        assert person == people[int(prompt[-1])]
    assert calls and all("demographic_embeds" not in names for names in calls)


class Dictionary:
    """An environment; its method is also used as a tool of its own."""

    def reset(self, demographic: list[float], **columns: Any) -> str:
        return f" I am {demographic[0]:.0f}."

    def lookup(self, word: str) -> str:
        """
        Look a word up.

        Args:
            word: the word.
        """
        return "found"


@pytest.mark.parametrize("fields", [{"tools": [Dictionary().lookup]}, {"environment_factory": Dictionary}], ids=list)
def test_every_turn_with_tools_has_its_rows_profiles(fields, make_grpo, grpo_data, monkeypatch):
    tokenizer = chat_tokenizer(["Question p0?"])
    tokenizer.chat_template = qwen3_chat_template
    calls: dict[str, list[tuple[int, int]]] = {}  # (the person named, the person routed by) of each row
    call = '<tool_call>\n{"name": "lookup", "arguments": {"word": "x"}}\n</tool_call><|im_end|>'
    begin = CuMAModel._begin_forward

    def record(name: str, input_ids: torch.Tensor, demographic_embeds: torch.Tensor) -> None:
        named = [int(re.search(r"Question p(\d)", text)[1]) for text in tokenizer.batch_decode(input_ids)]
        calls[name] = list(zip(named, demographic_embeds[:, 0].int().tolist(), strict=True))

    def generate(model: CuMAModel, input_ids: torch.Tensor, demographic_embeds: torch.Tensor, **kwargs: Any) -> Any:
        turn = "second turn" if calls else "first turn"
        record(turn, input_ids, demographic_embeds)
        # In the first turn, people with odd numbers call the tool.
        answers = [call if turn == "first turn" and person % 2 else "yes<|im_end|>" for person, _ in calls[turn]]
        return torch.cat([input_ids, tokenizer(answers, padding=True, return_tensors="pt")["input_ids"]], dim=1)

    def begin_forward(model: CuMAModel, base: Any, args: tuple, kwargs: dict) -> Any:
        record("loss", kwargs["input_ids"], kwargs["demographic_embeds"])
        return begin(model, base, args, kwargs)

    monkeypatch.setattr(CuMAModel, "generate", generate)
    monkeypatch.setattr(CuMAModel, "_begin_forward", begin_forward)
    data = grpo_data(prompt=[[{"role": "user", "content": f"Question p{person}?"}] for person in range(8)])
    make_grpo(data, processing_class=tokenizer, max_completion_length=300, **fields).train()
    assert {name: len(rows) for name, rows in calls.items()} == {"first turn": 8, "second turn": 4, "loss": 8}
    for rows in calls.values():
        assert all(named == routed_by for named, routed_by in rows)


# ---------------------------------------------------------------------- data and routings
def test_streams_text_and_rows_without_a_profile(make_grpo, grpo_data, text_encoder):
    people = ["country: JP", "age: old", None, "country: FR"] * 2
    data = grpo_data().remove_columns("demographic").add_column("demographic", people)
    trainer = make_grpo(
        data.to_iterable_dataset(), adapter={"missing_demographics": "zero"}, demographic_encoder=text_encoder
    )
    trainer.train()
    rows = trainer._buffered_inputs[0]
    zeros = [not any(vector) for vector in rows["demographic_embeds"].tolist()]
    named = [people[int(text[-1])] for text in trainer.processing_class.batch_decode(rows["prompt_ids"])]
    assert zeros == [person is None for person in named]


def test_a_missing_profile_is_an_error(make_grpo, grpo_data):
    people = [{"age": "old"}, {"age": None}] * 4
    with pytest.raises(ValueError, match="In the training data set: Nothing is known .* in rows 1, 3, 5, 7"):
        make_grpo(
            grpo_data().remove_columns("demographic").add_column("demographic", people),
            demographic_encoder=FieldEncoder(min_count=1),
        )


def test_semantic_routing_needs_no_column(make_grpo, grpo_data):
    trainer = make_grpo(grpo_data().remove_columns("demographic"), adapter={"routing": "semantic"}, beta=0.1)
    trainer.train()
    assert "demographic_embeds" not in trainer._buffered_inputs[0]
    assert {"aux_loss", "kl"} <= trainer.state.log_history[0].keys()
