# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from trl_cuma import DemographicTable
from trl_cuma.trainers.collation import DemographicCollator


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
    assert batch.keys() == {"input_ids", "attention_mask", "completion_mask", "demographic_embeds"}
    trainer._set_signature_columns_if_needed()
    trainer._set_signature_columns_if_needed()
    assert trainer._signature_columns.count("demographic") == 1
