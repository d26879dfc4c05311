# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What the saved adapter tells of its training."""

import json
from pathlib import Path
from typing import Any

import pytest

from trl_cuma import FieldEncoder


def saved_runs(trainer: Any) -> list[dict[str, Any]] | None:
    """`training` in the configuration that the trainer saves; its card tells of as many runs."""
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    runs = json.loads((folder / "adapter_config.json").read_text())["training"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card.count("| trainer |") == len(runs or []) and ("saved outside of a CuMA trainer" in card) == (not runs)
    return runs


def test_the_adapter_tells_of_all_its_training(make_sft, make_dpo, tmp_path) -> None:
    sft = make_sft()
    sft.train()
    sft.save_model(tmp_path / "sft")
    dpo = make_dpo(cuma_adapter_path=str(tmp_path / "sft"))
    dpo.train()
    dpo.create_model_card(dataset_name="some/pairs")
    dpo.save_model(tmp_path / "dpo")
    runs = json.loads((tmp_path / "dpo" / "adapter_config.json").read_text())["training"]
    assert [run["trainer"] for run in runs] == ["CuMASFTTrainer", "CuMADPOTrainer"]
    assert runs[1]["dataset"] == "some/pairs" and runs[1]["steps"] == dpo.state.global_step > 0
    assert runs[1]["unique_profiles"] == len(dpo.demographic_table.embeds)
    logged = [entry for entry in dpo.state.log_history if "router/utilization" in entry][-1]
    assert runs[1]["last_router_utilization"] == logged["router/utilization"]
    for folder in (tmp_path / "dpo", Path(dpo.args.output_dir)):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "| trainer | CuMADPOTrainer |" in card and "| trainer | CuMASFTTrainer |" in card
        assert "| dataset | some/pairs |" in card
        assert "JP" not in card and "young" not in card


def test_every_checkpoint_has_its_card(make_sft, tmp_path) -> None:
    trainer = make_sft(save_strategy="steps", save_steps=1, max_steps=2, logging_steps=1)
    trainer.train()
    for step in (1, 2):
        card = (Path(trainer.args.output_dir) / f"checkpoint-{step}" / "README.md").read_text(encoding="utf-8")
        assert f"| steps | {step} |" in card and "| dataset |" not in card  # the data set has no name
        assert "| last router utilization |" in card


def test_an_evaluation_is_no_training(make_sft, sft_data, sft_adapter) -> None:
    new = make_sft(eval_dataset=sft_data(4))
    new.evaluate()
    assert saved_runs(new) is None
    continued = make_sft(cuma_adapter_path=sft_adapter, eval_dataset=sft_data(4))
    continued.evaluate()
    assert saved_runs(continued) == json.loads((Path(sft_adapter) / "adapter_config.json").read_text())["training"]


@pytest.mark.parametrize(
    ("given", "name", "builder", "recorded"),
    [
        (None, None, None, None),
        (None, "global_opinions", "parquet", "global_opinions"),
        (None, "json", "json", None),  # rows of plain files: the name of their format
        ("some/survey", "global_opinions", "parquet", "some/survey"),
        ("/home/ada/private/survey", None, None, "survey"),
        ("ada/private/survey.jsonl", None, None, "survey.jsonl"),
    ],
)
def test_the_name_of_the_data(make_sft, sft_data, given, name, builder, recorded) -> None:
    data = sft_data()
    data.info.dataset_name, data.info.builder_name = name, builder
    trainer = make_sft(data)
    trainer.train()
    trainer.create_model_card(dataset_name=given)
    (run,) = saved_runs(trainer)
    assert run.get("dataset") == recorded and ("dataset" in run) == (recorded is not None)
    card = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    assert (f"| dataset | {recorded} |" in card) == (recorded is not None)
    assert "ada/" not in card


def test_a_streaming_run_counts_neither_rows_nor_profiles(make_sft, sft_data) -> None:
    """A worker that reads the stream meets profiles of which the main process knows nothing."""
    data = sft_data()
    encoder = FieldEncoder(min_count=2).fit(data["demographic"])
    counted, streamed = make_sft(data, encoder=encoder), make_sft(data.to_iterable_dataset(), encoder=encoder)
    for trainer in (counted, streamed):
        trainer.train()
    (whole,), (stream,) = saved_runs(counted), saved_runs(streamed)
    assert (whole["rows"], whole["unique_profiles"]) == (8, 4)
    assert whole.keys() - stream.keys() == {"rows", "unique_profiles"} and stream["steps"] == 1


@pytest.mark.parametrize(
    ("terms", "forbids"),
    [
        ("cc-by-nc-sa-4.0", True),
        ("people's texts cc-by-4.0, models' answers cc-by-nc-4.0", True),
        ("terms of a survey: non-profit use", True),
        ("cc-by-4.0", False),
        ("", None),
    ],
)
def test_the_datas_licence(make_sft, sft_data, terms, forbids) -> None:
    data = sft_data()
    data.info.license = terms
    trainer = make_sft(data)
    trainer.train()
    (run,) = saved_runs(trainer)
    card = (Path(trainer.args.output_dir) / "README.md").read_text(encoding="utf-8")
    assert run.get("dataset_license") == (terms or None)
    assert ("These terms forbid commercial use" in card) == bool(forbids)
    assert ("Not recorded. Read the terms" in card) == (forbids is None)


def test_the_groups_that_a_run_knew(make_sft) -> None:
    trainer = make_sft()
    trainer.train()
    (run,) = saved_runs(trainer)
    assert run["known_values"] == {"age": 2, "country": 2}


def test_an_owners_words_stay_in_the_output_folder(make_sft) -> None:
    trainer = make_sft()
    trainer.train()
    trainer.save_model()
    path = Path(trainer.args.output_dir) / "README.md"
    path.write_text(path.read_text(encoding="utf-8") + "\nMy own words.\n", encoding="utf-8")
    trainer.save_model()
    text = path.read_text(encoding="utf-8")
    assert "My own words." in text and text.count("# A CuMA adapter") == 1


@pytest.mark.parametrize("routing", ["joint", "semantic"])
def test_a_new_adapter_has_no_history(make_sft, make_adapter, routing) -> None:
    config = make_adapter(routing=routing, training=[{"trainer": "Another"}])
    trainer = make_sft(peft_config=config)
    trainer.train()
    (run,) = saved_runs(trainer)
    assert run["trainer"] == "CuMASFTTrainer" and ("unique_profiles" in run) == (routing == "joint")
    assert config.training == [{"trainer": "Another"}]  # the caller's own is as it was


def test_a_new_adapter_has_no_history_before_it_is_trained_either(make_sft, make_adapter) -> None:
    assert not saved_runs(make_sft(peft_config=make_adapter(training=[{"trainer": "Another"}])))


def test_saving_again_and_training_on_tell_of_one_run(make_sft) -> None:
    trainer = make_sft(max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    first = saved_runs(trainer)
    assert saved_runs(trainer) == first and first[0]["steps"] == 2
    trainer.args.max_steps = 3
    trainer.train()
    (run,) = saved_runs(trainer)
    assert run["steps"] == 3
    # Another trainer with the same model is another run.
    more = make_sft(model=trainer.model, peft_config=None, encoder=None)
    more.train()
    assert [run["steps"] for run in saved_runs(more)] == [3, 1]
