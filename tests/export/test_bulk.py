# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Many profiles in one pass: what is there afterwards, and what isn't."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trl_cuma import export_profile, load_demographic_encoder
from trl_cuma.export import Distillation, export_profiles
from trl_cuma.generation.vectors import profile_vectors

KENYA, JAPAN, UNSEEN = {"country": "Kenya"}, {"country": "Japan"}, {"country": "Japan", "age": "18-29"}
HOW = Distillation(max_new_tokens=3, steps=10)


def test_each_profile_becomes_a_lora_that_answers_as_the_adapter_does(make_model, tokenizer, people, tmp_path):
    model = make_model(tmp_path / "base")
    profiles = {"kenya": KENYA, "japan": JAPAN, "unseen": UNSEEN, "again": dict(KENYA)}
    exports = export_profiles(model, tokenizer, profiles, tmp_path / "out", people=people, show_progress=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["exports.json", "japan", "kenya", "unseen"]
    ids = torch.randint(3, 40, (3, 6))
    for name in ("kenya", "japan", "unseen"):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        lora = PeftModel.from_pretrained(base, tmp_path / "out" / name).eval()
        embeds = profile_vectors(model, [profiles[name]])
        with torch.no_grad():
            expected = model(ids, demographic_embeds=embeds.expand(3, -1)).logits
            assert ((lora(ids).logits - expected).abs().max() / expected.abs().max()).item() < 1e-5
    index = json.loads((tmp_path / "out/exports.json").read_text())
    assert index == json.loads(json.dumps(exports.document()))
    assert [each["folder"] for each in index["exports"]] == ["kenya", "japan", "unseen", "kenya"]  # equal ones share
    assert [each["training_people"] for each in index["exports"]] == [120, 140, 0, 120]
    assert [each["combination_seen"] for each in index["exports"]] == [True, True, False, True]
    assert all(each["exact"] and each["mean_kl"] < 1e-6 for each in index["exports"])
    assert index["rank"] == 6 and index["vllm_max_lora_rank"] == 8


def test_the_folder_tells_nothing_of_this_machine_or_of_other_people(
    make_model, tokenizer, people, tmp_path, no_check_loads
):
    model = make_model(tmp_path / "base")
    export_profiles(model, tokenizer, {"kenya": KENYA}, tmp_path / "out", people=people, show_progress=False)
    files = {path.name: path for path in (tmp_path / "out/kenya").iterdir()}
    assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "export.json"]
    for name in ("README.md", "export.json"):
        text = files[name].read_text()
        assert "Kenya" in text and "Japan" not in text and str(tmp_path) not in text
    assert "120 training people had this profile" in files["README.md"].read_text()


def test_the_datas_licence_goes_with_the_export(make_model, tokenizer, people, tmp_path, no_check_loads):
    model = make_model(tmp_path / "base")
    runs = [("opinions", "cc-by-nc-sa-4.0"), ("opinions", "cc-by-nc-sa-4.0"), ("science", "mit"), ("own", None)]
    model.peft_config["default"].training = [
        {"trainer": "t", "dataset": name} | ({"dataset_license": licence} if licence else {}) for name, licence in runs
    ]
    exports = export_profiles(model, tokenizer, {"a": KENYA}, tmp_path / "out", people=people, show_progress=False)
    assert exports.document()["data"] == [
        {"dataset": "opinions", "dataset_license": "cc-by-nc-sa-4.0", "non_commercial": True},
        {"dataset": "science", "dataset_license": "mit", "non_commercial": False},
        {"dataset": "own"},
    ]
    assert json.loads((tmp_path / "out/a/export.json").read_text())["data"] == exports.data
    assert "training data: cc-by-nc-sa-4.0 (non-commercial), mit." in (tmp_path / "out/a/README.md").read_text()


def test_a_joint_routers_exports_are_measured_and_those_too_far_are_refused(
    make_model, tokenizer, people, prompts, tmp_path, no_check_loads
):
    model = make_model(tmp_path / "base", routing="joint")
    options = dict(people=people, prompts=prompts, how=HOW, show_progress=False)
    near = export_profiles(model, tokenizer, {"a": KENYA, "b": JAPAN}, tmp_path / "all", max_kl=9.0, **options)
    kls = {record.name: record.distance.mean_kl for record in near.records}
    assert near.document()["worst_group"]["name"] == max(kls, key=kls.get)
    assert all(record.averaged is not None and not record.exact for record in near.records)
    limit = sum(kls.values()) / 2
    some = export_profiles(model, tokenizer, {"a": KENYA, "b": JAPAN}, tmp_path / "some", max_kl=limit, **options)
    worst = max(kls, key=kls.get)
    assert [record.name for record in some.refused] == [worst] and not (tmp_path / "some" / worst).exists()
    with pytest.raises(ValueError, match="Every export is farther from the routed model than `max_kl=0` nats"):
        export_profiles(model, tokenizer, {"a": KENYA}, tmp_path / "none", max_kl=0.0, **options)
    assert not list(tmp_path.glob("*none*")) and not list(tmp_path.glob(".*"))  # nothing is left
    forced = export_profiles(model, tokenizer, {"a": KENYA}, tmp_path / "f", max_kl=0.0, force=True, **options)
    assert not forced.refused and (tmp_path / "f/a").is_dir()


@pytest.mark.parametrize(
    ("profiles", "message"),
    [
        ({"a": {"country": "Narnia"}}, "has a value of the field country that the adapter doesn't know"),
        ({"a": {"planet": "Earth"}}, "no field that the adapter knows"),
        ({"a": {"country": "Kenya", "planet": "Earth"}}, "has the field planet, which the adapter doesn't know"),
        ({"a": {}}, "is missing or says nothing"),
        ({"../a": KENYA}, "'../a' can't be a folder's"),
        ({"a": "Kenya"}, "is a str, expected a mapping"),
        ({}, "`profiles` is empty"),
        ({"a": {"country": "Peru"}}, "fewer training people have all of it for a"),
    ],
)
def test_nothing_is_exported_for_nobody_or_a_few(make_model, tokenizer, people, tmp_path, profiles, message):
    with pytest.raises(ValueError, match=message) as error:
        export_profiles(make_model(), tokenizer, profiles, tmp_path / "out", people=people, show_progress=False)
    assert "Narnia" not in str(error.value) and not (tmp_path / "out").exists()


def test_people_must_be_counted_or_waived(make_model, tokenizer, tmp_path, no_check_loads):
    model = make_model(tmp_path / "base")
    with pytest.raises(ValueError, match="`min_people` is 100 and `people` was not given"):
        export_profiles(model, tokenizer, {"a": KENYA}, tmp_path / "out", show_progress=False)
    found = export_profiles(model, tokenizer, {"a": KENYA}, tmp_path / "out", min_people=0, show_progress=False)
    assert found.document()["exports"][0]["training_people"] is None
    with pytest.raises(FileExistsError, match="is there"):
        export_profiles(model, tokenizer, {"a": KENYA}, tmp_path / "out", min_people=0, show_progress=False)


def test_one_profile_goes_into_a_folder_of_its_own(make_model, tokenizer, people, tmp_path, no_check_loads):
    model = make_model(tmp_path / "base")
    record = export_profile(model, tokenizer, KENYA, tmp_path / "loras/kenya", people=people)
    assert record.exact and record.training_people.people == 120
    assert json.loads((tmp_path / "loras/kenya/export.json").read_text())["profile"] == KENYA
    assert [path.name for path in (tmp_path / "loras").iterdir()] == ["kenya"]
    with pytest.raises(FileExistsError, match="is there"):
        export_profile(model, tokenizer, KENYA, tmp_path / "loras/kenya", people=people)


def test_a_process_without_trl_cuma_loads_it(make_model, tokenizer, people, tmp_path, no_check_loads):
    model = make_model(tmp_path / "base")
    export_profiles(model, tokenizer, {"kenya": KENYA}, tmp_path / "out", people=people, show_progress=False)
    script = (
        "import sys; sys.modules['trl_cuma'] = None\n"  # an import of it would fail
        "from peft import AutoPeftModelForCausalLM\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(tmp_path / 'out/kenya')!r})\n"
        "print(model.peft_config['default'].r)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "6", done.stderr
    with pytest.raises(ValueError):  # it is no CuMA adapter any more: nobody can ask it for another profile
        load_demographic_encoder(tmp_path / "out/kenya")
