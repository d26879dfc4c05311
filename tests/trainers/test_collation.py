# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import pickle
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from trl_cuma import DemographicTable
from trl_cuma.demographics import table as table_module
from trl_cuma.trainers.collation import TOKEN_PROFILES, DemographicCollator, RowsWithProfiles


def collator(rows_per_example: float = 1, expected: int = 1, **kwargs) -> DemographicCollator:
    def collate(examples):
        return {"input_ids": torch.zeros(round(rows_per_example * len(examples)), 5, dtype=torch.long)}

    return DemographicCollator(collate, DemographicTable(None, **kwargs), "who", expected)


EXAMPLES = [{"who": [1.0, 2.0]}, {"who": [3.0, 4.0]}]


def test_one_row_for_each_example():
    batch = collator()(EXAMPLES)
    assert batch["demographic_embeds"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert batch["demographic_embeds"].dtype is torch.float32 and batch["input_ids"].shape == (2, 5)


def test_pairs_share_their_profile():
    batch = collator(2, expected=2)(EXAMPLES)  # [chosen; rejected]
    assert batch["demographic_embeds"].tolist() == [[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]


def test_a_collator_that_makes_other_rows_is_refused():
    """Also twice as many, where they are no pairs: nothing says whose the others are."""
    for rows in (0.5, 2):
        with pytest.raises(ValueError, match="rows of 2 examples.*Pass a `data_collator` that makes one row of each"):
            collator(rows)(EXAMPLES)
    with pytest.raises(ValueError, match=r"made 2 rows of 2 examples.*makes two rows, \[chosen; rejected\], of each"):
        collator(1, expected=2)(EXAMPLES)


def test_batches_that_are_cut_for_the_processes_are_refused(make_sft, sft_data):
    with pytest.raises(ValueError, match="dispatch_batches: true.*Leave it out"):
        make_sft(accelerator_config={"dispatch_batches": True})
    for fields in (
        {"train": sft_data(4, "vector").to_iterable_dataset()},
        {"train": sft_data(4, "vector"), "eval_dataset": sft_data(4, "vector").to_iterable_dataset()},
    ):
        assert make_sft(encoder=None, **fields).args.accelerator_config.dispatch_batches is False  # fmt: skip


def test_missing_column_and_missing_profile():
    with pytest.raises(KeyError, match=r"Rows \[1\] of the batch have no 'who' column, only \['text'\]"):
        collator()([EXAMPLES[0], {"text": "ZZSENTINEL"}])
    with pytest.raises(ValueError, match="the person in row 1:"):
        collator()([EXAMPLES[0], {"who": None}])
    batch = collator(missing="zero")([EXAMPLES[0], {"who": None}])
    assert batch["demographic_embeds"].tolist() == [[1.0, 2.0], [0.0, 0.0]]


def test_images_are_refused(make_sft, sft_data):
    with pytest.raises(NotImplementedError, match=r"training data set has \['image'\]: a vision tower's"):
        make_sft(sft_data(2, image=["a.png", "b.png"]))


class ReportedParallelism(SimpleNamespace):
    """What accelerate would report; false, so that accelerate itself doesn't ask it for a device mesh."""

    def __bool__(self) -> bool:
        return False


@pytest.mark.parametrize("which", ["cp_enabled", "sp_enabled"])
def test_context_and_sequence_parallelism_are_refused(which, make_sft, monkeypatch):
    # The real thing takes several processes; what matters is what accelerate reports, whoever asked for it.
    fields = {"cp_enabled": False, "sp_enabled": False, "tp_enabled": False, "tp_size": 1, "sp_backend": None}
    reported = ReportedParallelism(**fields | {which: True})
    monkeypatch.setattr(Accelerator, "parallelism_config", property(lambda self: reported))
    with pytest.raises(NotImplementedError, match="Context and sequence parallelism give each process a part"):
        make_sft()


def test_fsdp_checkpointing_of_its_own_is_refused(make_sft):
    # FSDP itself starts several processes: the check reads the arguments
    trainer = make_sft()
    arguments = SimpleNamespace(
        fsdp="full_shard",
        fsdp_config={"activation_checkpointing": True},
        accelerator_config=trainer.args.accelerator_config,
    )
    with pytest.raises(ValueError, match="`activation_checkpointing` loses the demographic profile"):
        trainer._refuse_what_loses_profiles(arguments, trainer.train_dataset)


def test_a_custom_collator_gets_the_profiles_too(make_sft, tokenizer):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    trainer = make_sft(data_collator=DataCollatorForLanguageModeling(tokenizer.pad_token_id, pad_to_multiple_of=64))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape == (8, 64) and batch["demographic_embeds"].shape == (8, 4)


def test_columns_that_nothing_reads_are_still_removed(make_dpo, dpo_data):
    trainer = make_dpo(dpo_data(note=[f"note {row}" for row in range(8)]))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch.keys() == {"input_ids", "attention_mask", "completion_mask", "demographic_embeds", "row_numbers"}
    trainer._set_signature_columns_if_needed()
    trainer._set_signature_columns_if_needed()
    assert trainer._signature_columns.count("demographic") == 1


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """How many values each call of `read_profiles` got from a table."""
    calls: list[int] = []
    original = table_module.read_profiles

    def spy(values):
        values = list(values)
        calls.append(len(values))
        return original(values)

    monkeypatch.setattr(table_module, "read_profiles", spy)
    return calls


def watch_examples(trainer) -> list[dict]:
    """The examples that TRL's collator gets from now on."""
    seen: list[dict] = []
    collate = trainer.data_collator.collator
    trainer.data_collator.collator = lambda examples: seen.extend(examples) or collate(examples)
    return seen


IN_ORDER = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 4}


@pytest.mark.parametrize("form", ["dict", "vector"])
@pytest.mark.parametrize("method", ["sft", "padding-free", "dpo", "kto"])
def test_profiles_are_looked_up_once_and_not_with_each_batch(request, reads, method, form):
    name = method if method in ("dpo", "kto") else "sft"
    make, data = (request.getfixturevalue(fixture) for fixture in (f"make_{name}", f"{name}_data"))
    fields = {"padding_free": True, "max_length": None} if method == "padding-free" else {}
    fields |= {} if form == "dict" else {"encoder": None}
    trainer = make(data(8, form), **IN_ORDER, **fields)
    examples = watch_examples(trainer)
    reads.clear()
    loader = trainer.get_train_dataloader()
    assert reads == [4 if form == "dict" else 8]  # four people; vectors are compared as they are
    batches = list(loader)
    assert len(reads) == 1 and len(batches) == 2
    assert len(examples) == 8 and not any("demographic" in example for example in examples)
    expected = trainer.demographic_table(data(8, form)["demographic"])
    for batch, vectors in zip(batches, expected.split(4), strict=True):
        assert torch.equal(batch["demographic_embeds"], vectors.repeat(2, 1) if name == "dpo" else vectors)


def test_a_stream_is_looked_up_on_its_way(make_sft, sft_data, reads):
    trainer = make_sft(sft_data(8, "vector").to_iterable_dataset(), encoder=None, **IN_ORDER)
    reads.clear()
    assert len(list(trainer.get_train_dataloader())) == len(reads) == 2


def test_unused_columns_that_are_kept_reach_the_collator_as_they_are(make_sft, sft_data, reads):
    trainer = make_sft(sft_data(8), remove_unused_columns=False, **IN_ORDER)
    examples = watch_examples(trainer)
    reads.clear()
    batches = list(trainer.get_train_dataloader())
    assert reads == [4] and examples == trainer.train_dataset.to_list()
    embeds = torch.cat([batch["demographic_embeds"] for batch in batches])
    assert torch.equal(embeds, trainer.demographic_table(sft_data(8)["demographic"]))


def rows_of_people(count: int) -> Dataset:
    """Tokenized rows; the first token, and the first entry of the vector, is the person's number + 10."""
    rows = [{"input_ids": [row + 10, 3], "labels": [row + 10, 3], "demographic": [row + 10.0]} for row in range(count)]
    return Dataset.from_list(rows)


def routed(loader) -> list[int]:
    """The people in the loader's order, each with their own profile."""
    found = []
    for batch in loader:
        assert batch["demographic_embeds"][:, 0].tolist() == batch["input_ids"][:, 0].tolist()
        found += batch["input_ids"][:, 0].tolist()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_chosen_by_an_index_keep_their_profiles(make_sft, workers):
    """`select`, `shuffle` and `filter` leave the rows where they are and keep a list of their numbers."""
    data = rows_of_people(12).shuffle(seed=1).select([7, 2, 11, 4, 0, 5]).filter(lambda row: row["input_ids"][0] != 10)
    assert data._indices is not None
    trainer = make_sft(
        data, encoder=None, eval_dataset=data, dataloader_num_workers=workers, per_device_eval_batch_size=2
    )
    expected = [ids[0] for ids in data["input_ids"]]
    assert routed(trainer.get_eval_dataloader()) == expected
    assert sorted(routed(trainer.get_train_dataloader())) == sorted(expected)


def test_rows_that_truncation_takes_away_take_their_profile_along(make_sft):
    rows = rows_of_people(6).to_list()
    for row in (rows[1], rows[4]):
        row["labels"] = [-100, -100, 5]  # what is left after two tokens has no label, and TRL drops it
        row["input_ids"] = [*row["input_ids"], 5]
    trainer = make_sft(Dataset.from_list(rows), encoder=None, max_length=2, **IN_ORDER)
    assert routed(trainer.get_train_dataloader()) == [10, 12, 13, 15]


def test_what_one_trainer_prepared_is_right_for_another(make_sft):
    """Its table has the people in another order, and there are no numbers of its rows in a prepared data set."""
    data = rows_of_people(8)
    first = make_sft(data, encoder=None, **IN_ORDER)
    second = make_sft(data.select(range(7, -1, -1)), encoder=None, **IN_ORDER)
    first.get_train_dataloader()
    assert first.train_dataset.column_names == data.column_names
    assert [trainer.demographic_table.lookup([[10.0]]).item() for trainer in (first, second)] == [0, 7]
    assert routed(second.get_eval_dataloader(first.train_dataset)) == list(range(10, 18))
    assert second.evaluate(first.train_dataset)["eval_loss"] > 0


def test_numbers_of_another_table_are_not_read(make_sft):
    """As a trainer that packs writes them; here they stand beside the profiles."""
    data = rows_of_people(8).add_column(TOKEN_PROFILES, [[7, 7]] * 8)
    assert routed(make_sft(data, encoder=None, **IN_ORDER).get_train_dataloader()) == list(range(10, 18))


def test_rows_that_a_transform_makes_keep_its_profiles(make_sft):
    def transform(batch):
        return batch | {"input_ids": [[int(vector[0]), 3] for vector in batch["demographic"]]}

    data = rows_of_people(8).remove_columns("input_ids").with_transform(transform)
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    assert routed(make_sft(data, encoder=None, **skip, **IN_ORDER).get_train_dataloader()) == list(range(10, 18))


@pytest.mark.parametrize("skip", [False, True])
def test_rows_that_evaluation_brings(make_sft, skip):
    """Unseen people are added; what is wrong is told of the data set's row, before anything is evaluated."""
    trainer = make_sft(rows_of_people(8), encoder=None, dataset_kwargs={"skip_prepare_dataset": skip})
    new = rows_of_people(12)
    assert routed(trainer.get_eval_dataloader(new)) == list(range(10, 22))
    assert routed(trainer.get_test_dataloader(new)) == list(range(10, 22))
    assert len(trainer.demographic_table.embeds) == 12
    with pytest.raises(ValueError, match="Nothing is known about the person in row 11"):
        trainer.evaluate(Dataset.from_list([*new.to_list()[:11], {**new[11], "demographic": None}]))
    for run in (trainer.evaluate, trainer.predict):
        with pytest.raises(
            ValueError, match=r"data set has no 'demographic' column; it has \['input_ids', 'labels'\]"
        ):
            run(new.remove_columns("demographic"))


def test_rows_with_profiles_can_be_sent_to_a_worker():
    """They are pickled where processes are spawned; the collator needs the table's rows alone."""
    view = RowsWithProfiles(Dataset.from_dict({"text": ["a", "b", "c"]}), torch.tensor([1, 0, 1]))
    for rows in (view, pickle.loads(pickle.dumps(view))):
        assert rows.__getitems__([2, 1]) == [(1, 2, {"text": "c"}), (0, 1, {"text": "b"})]
        assert len(rows) == 3 and rows[0] == {"text": "a"} and rows["text"][:] == ["a", "b", "c"]
    collate = collator()
    collate.table.add([[1.0, 2.0], [3.0, 4.0]])
    assert collate(view.__getitems__([2, 1]))["demographic_embeds"].tolist() == [[3.0, 4.0], [1.0, 2.0]]
