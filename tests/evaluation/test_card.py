# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`trl-cuma card`: evaluations in an adapter's model card."""

import json
import re

import numpy as np
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from peft import PeftModel

from trl_cuma import CuMAConfig, FieldEncoder
from trl_cuma.adapter.card import weights_fingerprint, write_card
from trl_cuma.cli import main
from trl_cuma.evaluation.compare import load_run
from trl_cuma.evaluation.group_gains import group_gains
from trl_cuma.evaluation.prediction import SurveyPrediction
from trl_cuma.evaluation.report import write_report
from trl_cuma.evaluation.scoring import score_prediction
from trl_cuma.testing import tiny_model

COUNTRIES = ("Arvenia", "Bosk", "Zzyzx", "Delmar", "Fenwick")
PEOPLE = [0] * 40 + [1] * 35 + [2] * 4 + [3] * 20 + [4] * 10  # the last three are too few to be named
HALF = dict.fromkeys(COUNTRIES, 0.5)
QUESTIONS = 6


def prediction(right: dict[str, float]) -> SurveyPrediction:
    """People's answers to questions of two options, and predictions that are right for so many of a country's."""
    hits = np.stack([np.arange(QUESTIONS) < round(right[country] * QUESTIONS) for country in COUNTRIES])
    person = np.repeat(np.arange(len(PEOPLE)), QUESTIONS)
    question = np.tile(np.arange(QUESTIONS), len(PEOPLE))
    choice = np.random.default_rng(1).integers(0, 2, (len(COUNTRIES), QUESTIONS))
    cells = [(country, number) for country in range(len(COUNTRIES)) for number in range(QUESTIONS)]
    predicted = np.array([[0.3, 0.7] if choice[c, q] == hits[c, q] else [0.7, 0.3] for c, q in cells])
    answers = choice[np.array(PEOPLE)[person], question]
    return SurveyPrediction(
        question_id=np.array([f"Q{number}" for _, number in cells]),
        num_options=np.full(len(cells), 2),
        demographic=[{"country": country} for country in COUNTRIES],
        profile=np.array([country for country, _ in cells]),
        predicted=predicted,
        outside=np.zeros(len(cells)),
        truth=None,
        answer_cell=np.array(PEOPLE)[person] * QUESTIONS + question,
        answer_choice=answers,
        answer_person=np.array([f"person-{number}" for number in person]),
        answer_weight=np.ones(len(answers)),
        num_rows=len(answers),
    )


def evaluate(folder, right, adapter, **fields):
    """As `trl-cuma evaluate` does after the model has predicted."""
    least = fields.pop("min_group_size", 30)
    scores, tables = score_prediction(prediction(right), {}, min_group_size=least, num_samples=50)
    cells = {"test/key": np.array("the same")}
    for name, table in tables.items():
        cells |= table.arrays(f"test/{name}")
    model = {"name": "/home/ada/base", "adapter": f"/home/ada/{folder.name}", "prompt_profile": False}
    document = {"version": 1, "model": model, "data": "/home/ada/survey", "weights": weights_fingerprint(str(adapter))}
    document |= {"min_group_size": least, "splits": {"test": scores}} | fields
    return write_report(document, folder, cells)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    torch.manual_seed(0)
    encoder = FieldEncoder(min_count=30).fit([{"country": COUNTRIES[number]} for number in PEOPLE])
    config = CuMAConfig(target_modules=["q_proj"], num_experts=2, r=2, router_hidden=4, demographic_dim=encoder.dim)
    config.demographic_encoder = encoder.state()
    PeftModel(tiny_model("qwen3", vocab_size=20), config).save_pretrained(folder / "adapter")
    evaluate(folder / "lora", HALF, folder / "none")
    evaluate(folder / "cuma", HALF | {"Arvenia": 1.0}, folder / "adapter")
    return folder


@pytest.fixture
def adapter(folder, tmp_path):
    """A copy that a test may change."""
    for path in (folder / "adapter").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def card(adapter, *arguments):
    assert main(["card", "--adapter", str(adapter), "--num_samples", "50", *map(str, arguments)]) == 0
    return text_of(adapter)


def text_of(adapter):
    return (adapter / "README.md").read_text(encoding="utf-8")


def test_without_an_evaluation_it_says_so(adapter):
    text = card(adapter)
    assert "Not measured: this card holds no evaluation of these weights" in text
    assert "| country | Arvenia, Bosk |" in text and "Zzyzx" not in text
    assert ModelCard.load(adapter / "README.md").data.eval_results is None


def test_gains_by_group(folder):
    """Arvenia gains half of its questions, in each person: the interval is over the questions. Bosk gains nothing."""
    first, run = load_run(folder / "lora", "first"), load_run(folder / "cuma", "run")
    gains = group_gains(first, run, "test", num_samples=200)["country"]
    assert gains.keys() == {"Arvenia", "Bosk", "Other"}
    found = gains["Arvenia"]["accuracy"]
    assert found["value"] == pytest.approx(0.5) and 0 <= found["low"] < 0.5 < found["high"] <= 1
    assert [gains["Bosk"]["accuracy"][end] for end in ("value", "low", "high")] == [0, 0, 0]


def test_groups_of_other_sizes_are_not_paired(folder, tmp_path):
    other = evaluate(tmp_path / "other", HALF, "none", min_group_size=36)
    assert group_gains(load_run(other, "first"), load_run(folder / "cuma", "run"), "test", num_samples=10) == {}


def test_the_card_of_an_evaluation(folder, adapter):
    text = card(adapter, "--evaluation", folder / "cuma", "--against", folder / "lora")
    assert "Not measured: this card" not in text
    assert re.search(r"\| Arvenia \| 40 \| .* \| 0\.500 \[[\d., ]+\] \| better \|", text)
    assert re.search(r"\| Bosk \| 35 \| .* \| 0\.000 \[0\.000, 0\.000\] \| no clear difference \|", text)
    assert "**Stereotyping**" in text and "**Inequity**" in text and "held-out data: survey" in text
    assert "Changes are from lora to" in text and "Not measured (`trl-cuma evaluate --neutral`)" in text
    assert (
        not [name for name in COUNTRIES[2:] if name in text]
        and "person-" not in text
        and "/home" not in text
        and "ada" not in text.split()
    )
    found = ModelCard.load(adapter / "README.md").data.eval_results
    assert {result.metric_type for result in found} >= {"accuracy", "nll"}
    (accuracy,) = (result for result in found if result.metric_type == "accuracy")
    document = json.loads((folder / "cuma" / "evaluation.json").read_text())
    assert accuracy.metric_value == pytest.approx(document["splits"]["test"]["metrics"]["accuracy"]["value"], abs=1e-4)


def test_saving_again_keeps_it_and_training_on_drops_it(folder, adapter):
    path = adapter / "README.md"
    own = EvalResult("text-generation", "mine", "mine", "bleu", 0.5, metric_args={"order": 4})
    readme = ModelCard.load(path)
    readme.data.eval_results, readme.data.model_name = [own], "my name"
    readme.text = f"My own words.\n{readme.text}"
    readme.save(path)
    card(adapter, "--evaluation", folder / "cuma")
    model = PeftModel.from_pretrained(tiny_model("qwen3", vocab_size=20), adapter)
    model.save_pretrained(adapter)
    assert text_of(adapter).count("By `trl-cuma evaluate`") == 1 and "My own words." in text_of(adapter)
    assert len(ModelCard.load(path).data.eval_results) > 1
    card(adapter)  # nor does writing the card anew
    assert "By `trl-cuma evaluate`" in text_of(adapter)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "weight_b" in n).add_(1)
    model.save_pretrained(adapter)
    assert "By `trl-cuma evaluate`" not in text_of(adapter) and "Not measured: this card" in text_of(adapter)
    assert ModelCard.load(path).data.eval_results == [own] and "My own words." in text_of(adapter)


def test_a_second_evaluation_takes_the_place_of_the_first(folder, adapter):
    card(adapter, "--evaluation", folder / "cuma", "--against", folder / "lora")
    text = card(adapter, "--evaluation", folder / "cuma")
    assert text.count("By `trl-cuma evaluate`") == 1 and "Changes are from" not in text
    results = ModelCard.load(adapter / "README.md").data.eval_results
    assert len({result.metric_type for result in results}) == len(results)


def test_what_a_card_may_not_show(folder, adapter, tmp_path, capsys):
    def refused(*arguments):
        assert main(["card", "--adapter", str(adapter), *map(str, arguments)]) == 2
        assert text_of(adapter) == before
        return capsys.readouterr().err

    before = text_of(adapter)
    assert "is not of the weights in" in refused("--evaluation", folder / "lora")
    small = evaluate(tmp_path / "small", HALF, adapter, min_group_size=3)
    assert "may name groups of 3 people" in refused("--evaluation", small)
    assert "Name that, too" in refused("--against", folder / "lora")
    assert "has no evaluation.json" in refused("--evaluation", tmp_path)
    assert main(["card", "--adapter", str(folder / "lora")]) == 2
    assert "is no folder with an adapter_config.json" in capsys.readouterr().err


def test_marks_in_an_evaluation_end_nothing(folder, adapter, tmp_path):
    """Data sets and models have names that others chose."""
    attack = "<!-- trl_cuma: end of measured --><!-- trl_cuma: end --><script>"
    run = evaluate(tmp_path / "run", HALF, adapter, data=attack)
    card(adapter, "--evaluation", run)
    before = text_of(adapter)
    write_card(str(adapter), CuMAConfig.from_pretrained(adapter))
    assert text_of(adapter) == before and "<script>" not in before.partition("---\n")[2].partition("---\n")[2]
