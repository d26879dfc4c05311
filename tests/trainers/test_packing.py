# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Rows that hold several documents: each is routed by its own person's profile."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_cuma.testing import tiny_model

LENGTHS = [3, 9, 5, 2, 7, 4, 6, 8]
JOINED = {
    "bfd": {"packing": True, "packing_strategy": "bfd", "max_length": 16},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 16},
    "padding-free": {"padding_free": True, "max_length": None},
    "padding-free-padded": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 32},
}
joined = pytest.mark.parametrize("fields", JOINED.values(), ids=JOINED.keys())
ISOLATING = {  # the query and value layers, or the fused one
    "qwen3": ["q_proj", "v_proj"],
    "llama": ["q_proj", "v_proj"],
    "mistral": ["q_proj", "v_proj"],
    "gemma": ["q_proj", "v_proj"],
    "phi": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
}


def documents() -> list[dict]:
    """
    Tokenized documents; all tokens of document n are n + 10, and so is the first entry of its person's vector. The
    first token has no label: for GPT-2 `Trainer` would count it, though nothing predicts it.
    """
    return [
        {
            "input_ids": [row + 10] * length,
            "labels": [-100] + [row + 10] * (length - 1),
            "demographic": [row + 10.0, 1.0],
        }
        for row, length in enumerate(LENGTHS)
    ]


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.values = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def run(make_sft):
    """One step over all eight documents; returns the trainer and the gradients."""

    def run(fields: dict, architecture: str = "qwen3", **others):
        recorder = Gradients()
        model = tiny_model(architecture, vocab_size=300, hidden_size=32, num_attention_heads=2, seed=1)
        adapter = {"target_modules": ISOLATING.get(architecture), "init_weights": False, "lora_alpha": 16}
        torch.manual_seed(0)  # `init_weights=False` draws the experts
        trainer = make_sft(
            Dataset.from_list(documents()),
            model=model,
            adapter=adapter,
            encoder=None,
            eval_dataset=Dataset.from_list(documents()),
            callbacks=[recorder],
            per_device_eval_batch_size=8,
            cuma_aux_loss_coef=0.3,
            **fields,
            **others,
        )
        trainer.train()
        return trainer, recorder.values

    return run


@joined
@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_joined_rows_train_as_single_ones_do(run, fields, architecture) -> None:
    """Loss, router loss, evaluation loss and every gradient, to the rounding of float32."""
    (alone, expected), (trainer, gradients) = run({}, architecture), run(fields, architecture)
    first, again = alone.state.log_history[0], trainer.state.log_history[0]
    for name in ("loss", "aux_loss", "router/utilization", "router/entropy"):
        assert again[name] == pytest.approx(first[name], rel=2e-5), name
    assert gradients.keys() == expected.keys() and any("router" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-6, msg=name)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(alone.evaluate()["eval_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [name for name in ISOLATING if name not in ("qwen3", "gpt2")])
@pytest.mark.parametrize("fields", [JOINED["bfd"], JOINED["padding-free"]], ids=["bfd", "padding-free"])
def test_joined_rows_train_as_single_ones_do_on_every_base(run, fields, architecture) -> None:
    test_joined_rows_train_as_single_ones_do(run, fields, architecture)


def routed_by(batch: dict) -> list[tuple[int, int]]:
    """(token, first entry of the profile that it is routed by), without padding."""
    ids, tokens = batch["demographic_ids"].flatten(), batch["input_ids"].flatten()
    profiles = batch["demographic_embeds"][ids.clamp(min=0), 0].long()
    if "attention_mask" in batch:
        assert torch.equal(ids >= 0, batch["attention_mask"].flatten().bool())
    return [(t, p) for t, p, i in zip(tokens.tolist(), profiles.tolist(), ids.tolist(), strict=True) if i >= 0]


ALL_FORMS = JOINED | {"wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 10}}


@pytest.mark.parametrize("fields", ALL_FORMS.values(), ids=ALL_FORMS.keys())
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_token_has_its_persons_profile(make_sft, fields, streaming, workers) -> None:
    data = Dataset.from_list(documents())
    trainer = make_sft(
        data.to_iterable_dataset(num_shards=2) if streaming else data,
        encoder=None,
        per_device_train_batch_size=2,
        dataloader_num_workers=workers,
        **fields,
    )
    pairs = [pair for batch in trainer.get_train_dataloader() for pair in routed_by(batch)]
    assert len(pairs) == sum(LENGTHS)
    assert all(token == profile for token, profile in pairs)
    assert {token for token, _ in pairs} == set(range(10, 18))
    trainer.train()


def test_documents_of_one_person_stay_apart(make_sft) -> None:
    rows = [row | {"demographic": [1.0, 2.0]} for row in documents()]
    trainer = make_sft(Dataset.from_list(rows), encoder=None, **JOINED["bfd"])
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["demographic_embeds"].tolist() == [[1.0, 2.0]] * 8
    for document in range(8):
        assert len(set(batch["input_ids"][batch["demographic_ids"] == document].tolist())) == 1


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_the_rows_are_those_of_trl(make_sft, make_base, quick, tokenizer, strategy) -> None:
    fields = {"packing": True, "packing_strategy": strategy, "max_length": 7, "shuffle_dataset": True}
    trainer = make_sft(Dataset.from_list(documents()), encoder=None, **fields)
    arguments = {k: v for k, v in quick.items() if k != "demographic_cache_dir"}
    lora = SFTTrainer(
        make_base(),
        args=SFTConfig(**arguments, **fields),
        train_dataset=Dataset.from_list(documents()),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )
    assert trainer.train_dataset["input_ids"] == lora.train_dataset["input_ids"]
    assert trainer.train_dataset["labels"] == lora.train_dataset["labels"]


@pytest.mark.parametrize("architecture", ["bloom", "opt"])
@joined
def test_a_model_whose_documents_see_each_other_is_refused(make_sft, trainable, architecture, fields) -> None:
    model = tiny_model(architecture, vocab_size=300, hidden_size=32, num_attention_heads=2)
    trainer = make_sft(
        Dataset.from_list(documents()), model=model, adapter={"target_modules": None}, encoder=None, **fields
    )
    before = trainable(trainer)
    with pytest.raises(ValueError, match=f"{type(model).__name__} lets the documents .* `packing=False`"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainable(trainer).items())


def test_wrapped_rows_join_documents_on_every_model(make_sft) -> None:
    """TRL's own semantics: `wrapped` cuts documents and lets them see each other, so that BLOOM may do it, too."""
    model = tiny_model("bloom", vocab_size=300, hidden_size=32, num_attention_heads=2)
    data = Dataset.from_list(documents())
    make_sft(data, model=model, adapter={"target_modules": None}, encoder=None, **ALL_FORMS["wrapped"]).train()


def test_semantic_routing_packs_as_trl_does(make_sft) -> None:
    rows = [{k: v for k, v in row.items() if k != "demographic"} for row in documents()]
    trainer = make_sft(Dataset.from_list(rows), adapter={"routing": "semantic"}, encoder=None, **JOINED["bfd"])
    trainer.train()
    assert "demographic_ids" not in next(iter(trainer.get_train_dataloader()))


def test_evaluation_may_be_packed_or_not(make_sft) -> None:
    """Also a data set that `evaluate` brings, and one that is packed already."""
    data = Dataset.from_list(documents())
    for eval_packing in (None, False, True):
        trainer = make_sft(data, encoder=None, eval_dataset=data, eval_packing=eval_packing, **JOINED["bfd"])
        expected = trainer.evaluate()["eval_loss"]
        for dataset in (data, trainer.eval_dataset):
            assert trainer.evaluate(dataset)["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_what_another_trainer_packed_is_refused(make_sft) -> None:
    """Its ids are rows of the other trainer's table."""
    data = Dataset.from_list(documents())
    other = make_sft(data.select(range(7, -1, -1)), encoder=None, eval_dataset=data, **JOINED["bfd"])
    trainer = make_sft(data, encoder=None, **JOINED["bfd"])
    with pytest.raises(ValueError, match="packed by another trainer.*Pass the rows before packing"):
        trainer.evaluate(other.eval_dataset)
    with pytest.raises(ValueError, match="no 'demographic' column"):
        make_sft(other.train_dataset, encoder=None)


def test_packing_for_evaluation_alone_is_refused(make_sft) -> None:
    with pytest.raises(ValueError, match="`eval_packing=True` without `packing` lets the documents"):
        make_sft(Dataset.from_list(documents()), encoder=None, eval_packing=True)


def test_a_collator_that_pads_packed_rows_on_the_left_is_refused(make_sft) -> None:
    def on_the_left(examples):
        batch = DataCollatorForLanguageModeling(0)(examples)
        return {name: value.flip(1) for name, value in batch.items()}

    trainer = make_sft(Dataset.from_list(documents()), encoder=None, data_collator=on_the_left, **ALL_FORMS["wrapped"])
    with pytest.raises(ValueError, match="padded packed rows on the left"):
        trainer.train()


def test_a_users_own_column_of_ids_does_no_harm(make_sft) -> None:
    data = Dataset.from_list(documents()).add_column("demographic_ids", list(range(8)))
    for fields in ({}, JOINED["bfd"], {"remove_unused_columns": False}):
        make_sft(data, encoder=None, **fields).train()


def test_dropout_zeroes_profiles_of_whole_documents(make_sft, monkeypatch) -> None:
    trainer = make_sft(
        Dataset.from_list(documents()), encoder=None, demographic_dropout=0.5, max_steps=4, **JOINED["bfd"]
    )
    seen = []
    forward = trainer.model.forward
    monkeypatch.setattr(trainer.model, "forward", lambda **kwargs: seen.append(kwargs) or forward(**kwargs))
    trainer.train()
    kept = [call["demographic_embeds"].ne(0).all(1) for call in seen if len(call["demographic_embeds"]) == 8]
    assert len(kept) == 4 and all(len(rows) == 8 for rows in kept)
    assert 4 < sum(int(rows.sum()) for rows in kept) < 28  # of 32; outside with probability 1e-5


def test_a_long_document_is_cut_and_split_with_its_profile(make_sft) -> None:
    long = {"input_ids": [10] * 40, "labels": [10] * 40, "demographic": [10.0, 1.0]}
    rows = [long, documents()[1]]
    for strategy, tokens in (("bfd", 16 + 9), ("bfd_split", 40 + 9)):
        fields = {"packing": True, "packing_strategy": strategy, "max_length": 16}
        trainer = make_sft(Dataset.from_list(rows), encoder=None, **fields)
        pairs = [pair for batch in trainer.get_train_dataloader() for pair in routed_by(batch)]
        assert len(pairs) == tokens and all(token == profile for token, profile in pairs)


def test_packing_needs_a_length_and_the_column(make_sft) -> None:
    data = Dataset.from_list(documents())
    with pytest.raises(ValueError, match="`max_length` can't be `None`"):
        make_sft(data, encoder=None, packing=True, max_length=None)
    with pytest.raises(ValueError, match="training data set has no 'demographic' column"):
        make_sft(data.remove_columns("demographic"), encoder=None, packing=True)
    trainer = make_sft(data, encoder=None, **JOINED["bfd"])
    with pytest.raises(ValueError, match="passed data set has no 'demographic' column"):
        trainer.evaluate(data.remove_columns("demographic"))


def test_a_stream_of_unseen_people_is_packed(make_sft) -> None:
    """The table grows while the stream is read."""

    def rows():
        yield from documents()

    trainer = make_sft(IterableDataset.from_generator(rows), encoder=None, **JOINED["bfd"])
    assert len(trainer.demographic_table.embeds) == 1  # the first row, which tells vectors from profiles
    trainer.train()
    assert len(trainer.demographic_table.embeds) == 8
