# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A benchmark of the user's own data and base model: what is refused, who stands in for whom, and a toy suite."""

import json
import multiprocessing
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, concatenate_datasets

from trl_cuma.bench import read_suite, runner
from trl_cuma.bench.comparison import compare_answers
from trl_cuma.bench.prepared_world import PreparedWorld
from trl_cuma.bench.runner import Runner, SFTRun
from trl_cuma.bench.training import run_sft
from trl_cuma.cli import main
from trl_cuma.data import PromptFormat, SplitOptions, convert_worldvaluesbench
from trl_cuma.demographics import FieldEncoder
from trl_cuma.evaluation.cell_scores import Scores
from trl_cuma.testing import chat_tokenizer, tiny_model
from trl_cuma.testing_surveys import write_worldvaluesbench

TOY = {
    "name": "toy",
    "data": {
        "source": "prepared",
        "splits": ["test"],
        "split_by": ["person"],
        "answers": 150,
        "validation_answers": 40,
    },
    "base": {"dtype": "float32", "micro_batch_size": 4, "gradient_checkpointing": True},
    "training": {"steps": 2, "batch_size": 8, "select_every": 1, "warmup_steps": 0},
    "tuning": {"worlds": [0], "learning_rates": [1e-2]},
    "reference": {
        "config": {"r": 2, "num_experts": 4, "top_k": 2, "router_hidden": 8, "demographic_projection": 8},
        "target_modules": ["q_proj", "v_proj"],
    },
    "worlds": [0, 1],
    "arms": [{"method": "cuma_shuffled"}, {"method": "lora", "prompt_profile": True}],
    "compare": [["cuma_shuffled", "lora-prompt"], ["cuma_shuffled", "marginal"]],
}


def convert(folder, demographics="none", seed=0) -> DatasetDict:
    splits = SplitOptions(seed=seed, test=0.25, validation=0.15, split_by=("person",))
    prompts = PromptFormat(demographics=demographics)
    return convert_worldvaluesbench(folder, prompts=prompts, splits=splits, people_split="random").datasets()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the same rows as `plain` and with the profile in the prompt, as `profile`; and a base model."""
    folder = tmp_path_factory.mktemp("prepared")
    write_worldvaluesbench(folder / "wvb", num_people=700, num_questions=8)
    convert(folder / "wvb").save_to_disk(folder / "plain")
    with_profile = convert(folder / "wvb", "system")
    with_profile.save_to_disk(folder / "profile")
    messages = [message["content"] for row in with_profile["test"].select(range(200)) for message in row["prompt"]]
    tokenizer = chat_tokenizer(messages)
    tokenizer.save_pretrained(folder / "base")
    model = tiny_model("llama", vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1)
    model.save_pretrained(folder / "base")
    return folder


def suite_of(prepared, tmp_path, **data):
    data = {"path": str(prepared / "plain"), "prompt_path": str(prepared / "profile"), **data}
    content = {**TOY, "data": {**TOY["data"], **data}, "base": {**TOY["base"], "path": str(prepared / "base")}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "toy.yaml"


def world_of(prepared, tmp_path, seed=0, **data) -> PreparedWorld:
    return PreparedWorld(read_suite(suite_of(prepared, tmp_path, **data)), seed, tmp_path / "world")


# ------------------------------------------------------------------------------------------------ what is refused
def refused(prepared, tmp_path, message, **data):
    with pytest.raises(ValueError, match=message):
        world_of(prepared, tmp_path, **data).prepare()
    assert not (tmp_path / "world").exists()


def test_people_of_training_among_the_evaluated_are_refused(prepared, tmp_path):
    splits = DatasetDict.load_from_disk(str(prepared / "plain"))
    splits["test"] = concatenate_datasets([splits["test"], splits["train"].select([0])])
    splits.save_to_disk(tmp_path / "leaky")
    message = "leaky: The splits 'train' and 'test' share 1 values of `person_id`"
    refused(prepared, tmp_path, message, path=str(tmp_path / "leaky"))


def test_shared_questions_are_refused_unless_the_data_was_split_by_people(prepared, tmp_path):
    refused(prepared, tmp_path, "share 8 values of `prompt_group`", split_by=["person", "prompt"])


def test_the_two_folders_must_hold_the_same_people(prepared, tmp_path):
    convert(prepared / "wvb", "system", seed=1).save_to_disk(tmp_path / "other")
    refused(prepared, tmp_path, "differ in more than their prompts", prompt_path=str(tmp_path / "other"))
    same_people = DatasetDict.load_from_disk(str(prepared / "profile"))
    order = np.roll(np.arange(len(same_people["test"])), 1)
    same_people["test"] = same_people["test"].select(order)  # another order is other rows to compare
    same_people.save_to_disk(tmp_path / "turned")
    refused(prepared, tmp_path, "'person_id'.* of the split 'test'", prompt_path=str(tmp_path / "turned"))


def test_a_profile_in_the_prompt_where_none_should_be_is_refused(prepared, tmp_path):
    refused(prepared, tmp_path, "`data.path` .*profile state the profile", path=str(prepared / "profile"))
    refused(prepared, tmp_path, "`data.prompt_path` .*don't state the profile", prompt_path=str(prepared / "plain"))


def test_missing_splits_and_columns_are_named(prepared, tmp_path):
    refused(prepared, tmp_path, "`data.path` .* has no split 'test_countries'; it has", splits=["test_countries"])
    splits = DatasetDict.load_from_disk(str(prepared / "plain")).rename_column("completion", "chosen")
    splits.save_to_disk(tmp_path / "dpo")
    refused(prepared, tmp_path, r"no columns \['completion'\].*--task sft", path=str(tmp_path / "dpo"))


def test_an_arm_that_cannot_be_matched_is_refused_before_anything_trains(prepared, tmp_path):
    path = suite_of(prepared, tmp_path)
    content = yaml.safe_load(path.read_text())
    content["reference"]["config"] |= {"r": 16, "num_experts": 8}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="'lora-prompt' can't have CuMA's"):
        PreparedWorld(read_suite(path), 0, tmp_path / "world").prepare()


def test_a_folder_that_a_new_arm_reads_is_checked_on_first_use(prepared, tmp_path):
    path = suite_of(prepared, tmp_path, prompt_path=str(prepared / "plain"))
    world = PreparedWorld(read_suite(path, arms=["cuma_shuffled"]), 0, tmp_path / "world")
    world.prepare()
    later = PreparedWorld(read_suite(path), 0, tmp_path / "world")
    later.prepare()
    with pytest.raises(ValueError, match="`data.prompt_path` .*don't state the profile"):
        later.sft_rows(True, False, 2)


def test_the_encoder_of_a_new_arm_is_added_to_a_prepared_world(prepared, tmp_path, monkeypatch):
    path = suite_of(prepared, tmp_path)
    PreparedWorld(read_suite(path), 0, tmp_path / "worlds/0").prepare()
    before = (tmp_path / "worlds/0/world.json").stat().st_mtime_ns
    content = yaml.safe_load(path.read_text())
    content |= {"arms": [{"method": "cuma", "encoder": "text"}], "compare": [], "text_encoder": "none is loaded"}
    path.write_text(yaml.safe_dump(content))
    monkeypatch.setattr(PreparedWorld, "_new_encoder", lambda self, kind: FieldEncoder(min_count=2))
    suite_runner = Runner(read_suite(path), tmp_path)
    suite_runner._prepare([0])
    assert suite_runner.world(0).encoder("text").is_fitted
    assert (tmp_path / "worlds/0/world.json").stat().st_mtime_ns == before


# ------------------------------------------------------------------------------------------------ rows
def test_seeds_train_on_other_rows_and_more_steps_have_those_of_fewer_first(prepared, tmp_path):
    world, other = world_of(prepared, tmp_path), world_of(prepared, tmp_path, seed=1)
    rows, few = world.sft_rows(False, False, 4), world.sft_rows(False, False, 2)
    assert len(rows) == 4 * 8 and few.to_list() == rows.to_list()[:16]
    assert rows["person_id"] != other.sft_rows(False, False, 4)["person_id"]
    with_profile = world.sft_rows(True, False, 4)
    assert with_profile["person_id"] == rows["person_id"] and with_profile["prompt"][0] != rows["prompt"][0]
    assert len(world.sft_rows(False, False, 1000)) == 8000  # of about 3,000: over and over


def test_shuffled_profiles_are_training_peoples_drawn_per_person(prepared, tmp_path):
    world = world_of(prepared, tmp_path)
    arm = world.suite.arm("cuma_shuffled")
    training = {str(row["demographic"]) for row in DatasetDict.load_from_disk(str(prepared / "plain"))["train"]}
    for rows, true in (
        (world.sft_rows(False, True, 30), world.sft_rows(False, False, 30)),
        (world._held_out("test", arm), world._held_out("test", world.suite.arm("lora-prompt"))),
    ):
        stand_in = {}
        for row, own in zip(rows, true, strict=True):
            assert (row["person_id"], row["completion"]) == (own["person_id"], own["completion"])
            stand_in.setdefault(row["person_id"], set()).add(str(row["demographic"]))
        assert all(len(each) == 1 for each in stand_in.values())
        assert set().union(*stand_in.values()) <= training
        moved = [row["demographic"] != own["demographic"] for row, own in zip(rows, true, strict=True)]
        assert np.mean(moved) > 0.9


def test_profiles_of_distributions_are_exchanged_within_each_question(prepared, tmp_path):
    """With stand-ins drawn from a dozen, most of a question's cells would repeat one another, and be left out."""
    rng, cells = np.random.default_rng(0), [(q, c) for q in range(30) for c in range(12) if (q + c) % 3]
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{q}?"}],
                "num_options": 2,
                "distribution": rng.dirichlet([1, 1]).tolist(),
                "question_id": f"q{q}",
                "demographic": {"country": f"C{c}"},
            }
            for q, c in cells + cells[:2]
        ]
    )
    world = world_of(prepared, tmp_path)
    shuffled = world._of_others(rows, 1)
    for name in ("distribution", "question_id", "prompt"):
        assert shuffled[name] == rows[name]

    def by_question(dataset):
        found = {}
        for row in dataset.select(range(len(cells))):
            found.setdefault(row["question_id"], []).append(row["demographic"]["country"])
        return found

    own, other = by_question(rows), by_question(shuffled)
    assert {question: sorted(each) for question, each in own.items()} == {q: sorted(each) for q, each in other.items()}
    moved = np.mean([a != b for question in own for a, b in zip(own[question], other[question], strict=True)])
    assert 0.75 < moved < 0.97  # of 8 profiles one in 8 stays in its place
    # a country has another stand-in at another question: it is no new name for it
    assert len({names["C0"] for names in (dict(zip(own[q], other[q], strict=True)) for q in own) if "C0" in names}) > 4
    assert shuffled["demographic"][-2:] == shuffled["demographic"][:2]  # a cell that repeats goes on repeating
    assert world._of_others(rows, 1).to_list() == shuffled.to_list()


def test_answers_of_weight_zero_are_no_rows_of_the_scores(prepared, tmp_path):
    splits = DatasetDict.load_from_disk(str(prepared / "plain"))
    weights = [float(number % 10 > 0) for number in range(len(splits["test"]))]
    splits["test"] = splits["test"].add_column("weight", weights)
    splits.save_to_disk(tmp_path / "weighted")
    suite = read_suite(suite_of(prepared, tmp_path, path=str(tmp_path / "weighted")), arms=["cuma_shuffled"])
    world, arm = PreparedWorld(suite, 0, tmp_path / "world"), suite.arms[0]
    world.prepare()
    expected = [number for number, weight in enumerate(world._held_out("test", arm)["weight"]) if weight]
    found, arrays = world.measure(arm, world.base_model())
    assert 0 < len(expected) < 150 and arrays["test/row"].tolist() == expected
    assert len(arrays["test/nll"]) == len(expected)
    assert arrays["test/nll"].mean() == pytest.approx(found["test"]["nll"])


# ------------------------------------------------------------------------------------------------ comparisons
def test_differences_are_of_the_same_answers_averaged_over_seeds(tmp_path):
    """Arm `b` lost row 1 of 0 to 3 in one of its two seeds, so that rows 0, 2 and 3 are compared."""
    fake = SimpleNamespace(output_dir=tmp_path, longest=4, suite=SimpleNamespace(worlds=(0, 1)))
    nll = {("a", 0): [1, 9, 2, 3], ("a", 1): [3, 9, 2, 3], ("b", 0): [1, 9, 1, 1], ("b", 1): [1, 1, 1]}
    for (arm, world), values in nll.items():
        rows = np.array([0, 2, 3] if len(values) == 3 else [0, 1, 2, 3])
        columns = {"nll": np.array(values, float), "nll_marginal": np.where(rows == 3, np.nan, 1.0), "row": rows}
        columns |= {"accuracy": np.ones(len(rows)), "accuracy_marginal": np.ones(len(rows))}
        clusters = (np.array([0, 0, 1, 1])[rows], np.array([0, 1, 0, 1])[rows])
        folder = tmp_path / SFTRun(arm, world, 1e-3, 2, 4).folder
        folder.mkdir(parents=True)
        scores = Scores(columns, clusters, ("person", "question"), np.ones(len(rows)))
        np.savez(folder / "predictions.npz", **scores.arrays("2/test"))
    results = {"chosen": {arm: {"settings": [1e-3, 2]} for arm in "ab"}}
    found = compare_answers(fake, results, "a", "b", 2, "test")
    assert found["nll"][0].value == pytest.approx(((1 + 3) / 2 + 2 + 3) / 3 - 1)  # rows 0, 2, 3; b has 1 everywhere
    assert found["nll"][1] == "person × question" and found["accuracy"][0].value == 0
    # no training answers to the question of row 3: rows 0, 1 and 2 of arm a, whose means are 2, 9 and 2
    against = compare_answers(fake, results, "a", "marginal", 2, "test")
    assert against["nll"][0].value == pytest.approx((2 + 9 + 2) / 3 - 1)
    assert compare_answers(fake, results, "marginal", "a", 2, "test")["nll"][0].value == -against["nll"][0].value


def test_each_process_has_one_of_the_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert runner._gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    gpus, started, taken = runner._gpus(), multiprocessing.get_context("spawn").Value("i", 0), []
    for _ in range(3):
        runner._take_gpu(gpus, started)
        taken.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert taken == ["5", "GPU-7", "5"]


# ------------------------------------------------------------------------------------------------ a toy suite
@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    suite = suite_of(prepared, folder)
    assert main(["bench", str(suite), "--output_dir", str(folder / "out")]) == 0
    return suite, folder / "out"


@pytest.mark.slow
def test_a_toy_suite_runs_to_its_tables(prepared, finished):
    suite, out = finished
    results = json.loads((out / "results.json").read_text())
    assert {arm: sorted(runs) for arm, runs in results["sft"].items()} == dict.fromkeys(
        ("cuma_shuffled", "lora-prompt"), ["0", "1"]
    )
    assert results["sft"]["lora-prompt"]["0"] != results["sft"]["lora-prompt"]["1"]
    text = (out / "tables.md").read_text()
    for part in ("Seeds of training: 0, 1", "SFT, test, 4 steps", "cuma_shuffled − lora-prompt", "− marginal"):
        assert part in text
    assert "n/a |" not in text  # all questions have training answers
    # The marginal of an option: its training answers and a half, of all that and a half for each option.
    splits = DatasetDict.load_from_disk(str(prepared / "plain"))
    train = splits["train"].to_pandas()
    test = PreparedWorld(read_suite(suite), 0, out / "worlds/0")._held_out("test", read_suite(suite).arms[0])
    expected = []
    for row in test:
        own = train[train.question_id == row["question_id"]]
        same = sum(answer[0]["content"] == row["completion"][0]["content"] for answer in own.completion)
        expected.append(-np.log((same + 0.5) / (len(own) + row["num_options"] / 2)))
    scores = results["sft"]["cuma_shuffled"]["0"]["budgets"]["2"]["splits"]["test"]
    assert len(expected) == 150 and scores["nll_marginal"] == pytest.approx(np.mean(expected))


@pytest.mark.slow
def test_stored_scores_are_of_each_answer_and_hold_no_profile(finished):
    suite, out = finished
    runner_ = Runner(read_suite(suite), out)
    for path in (out / "sft").rglob("*-4/predictions.npz"):
        result = json.loads((path.parent / "result.json").read_text())
        with np.load(path, allow_pickle=False) as arrays:
            texts = {name for name, values in arrays.items() if values.dtype.kind not in "fi"}
            assert texts == {"2/test/unit", "4/test/unit"}
            for budget in ("2", "4"):
                assert arrays[f"{budget}/test/row"].tolist() == list(range(150))
                stored = arrays[f"{budget}/test/nll"].mean()
                assert stored == pytest.approx(result["budgets"][budget]["splits"]["test"]["nll"])
    results = json.loads((out / "results.json").read_text())
    found = compare_answers(runner_, results, "cuma_shuffled", "lora-prompt", 4, "test")["nll"][0]
    means = [
        np.mean([run["budgets"]["4"]["splits"]["test"]["nll"] for run in results["sft"][arm].values()])
        for arm in ("cuma_shuffled", "lora-prompt")
    ]
    assert found.value == pytest.approx(means[0] - means[1]) and found.low <= found.value <= found.high
    written = {path.name for path in (out / "worlds/0").iterdir()}
    assert written == {"world.json", "marginal.json", "encoder-field.json"}  # the data stays where it is


@pytest.mark.slow
def test_a_run_repeats_to_the_bit(finished, tmp_path):
    suite, out = finished
    loaded = read_suite(suite)
    settings = json.loads((out / "results.json").read_text())["chosen"]["cuma_shuffled"]["settings"]
    torch.set_num_threads(1)
    world = PreparedWorld(loaded, 0, out / "worlds/0")
    again = run_sft(world, loaded.arm("cuma_shuffled"), *settings, 4, tmp_path / "again")
    assert again == json.loads((out / SFTRun("cuma_shuffled", 0, *settings, 4).folder / "result.json").read_text())


@pytest.mark.slow
def test_a_new_seed_is_checked_by_its_log_loss(finished, tmp_path, capsys):
    suite, out = finished
    check = ["bench", str(suite), "--output_dir", str(tmp_path), "--check", str(out / "results.json")]
    assert main([*check, "--arms", "lora-prompt", "--worlds", "5"]) == 0
    text = capsys.readouterr().out
    assert "| NLL |" in text and "of 2 inside" in text  # one split × two budgets
