# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""An adapter that doesn't fit is refused, and what was there before is as it was."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from trl_cuma import CuMAConfig
from trl_cuma.testing import tiny_model

WEIGHTS = "adapter_model.safetensors"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def base(architecture: str = "qwen3", **fields):
    return tiny_model(architecture, vocab_size=50, **fields)


@pytest.fixture
def saved(make_model, tmp_path) -> Path:
    make_model(demographic_projection=3).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


DAMAGES = {
    "missing": (
        lambda tensors: tensors.pop(f"{Q_PROJ}.cuma_experts.weight_a"),
        r"1 of its tensors are missing \(.*q_proj.cuma_experts.[a-z]+.weight_a\)",
    ),
    "missing-projection": (
        lambda tensors: tensors.pop("base_model.cuma_demographic.weight"),
        r"1 of its tensors are missing \(base_model.cuma_demographic",
    ),
    "all-missing": (lambda tensors: tensors.clear(), r"29 of its tensors are missing \(.*; …\)"),
    "unknown": (
        lambda tensors: tensors.update({f"{Q_PROJ}.cuma_experts.weight_c": torch.zeros(2)}),
        r"1 of its tensors have no place in this model \(.*weight_c\)",
    ),
    "reshaped": (
        lambda tensors: tensors.update({f"{Q_PROJ}.cuma_experts.weight_a": torch.zeros(2, 64)}),
        r"1 of its tensors have another shape \(.*weight_a has shape \(2, 64\), here \(16, 64\)\)",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_that_does_not_fit_is_refused_and_removed(
    make_model, make_batch, saved, damage, message, low_cpu_mem_usage
) -> None:
    edit(saved, damage)
    model, batch = make_model(), make_batch()
    expected = model(**batch).logits
    with pytest.raises(ValueError, match=message + ".*'other' was removed again") as error:
        model.load_adapter(saved, "other", low_cpu_mem_usage=low_cpu_mem_usage)
    assert "base model" in str(error.value)
    assert list(model.peft_config) == ["default"] and model.active_adapter == "default"
    assert not any(".other." in name for name, _ in model.named_parameters())
    assert torch.equal(model(**batch).logits, expected)
    with pytest.raises(ValueError, match=message + ".*reload the base model"):
        PeftModel.from_pretrained(base(), saved, low_cpu_mem_usage=low_cpu_mem_usage)


def test_weights_for_an_adapter_in_place_are_refused_and_it_stays(make_model, make_batch, saved) -> None:
    """As `Trainer` resumes: the adapter is there, only its weights are loaded."""
    model, batch = make_model(num_experts=2), make_batch()
    expected = model(**batch).logits
    with pytest.raises(ValueError, match="have another shape") as error:
        model.load_adapter(saved, "default", is_trainable=True)
    assert "removed" not in str(error.value) and "reload" not in str(error.value)
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("fields", [{"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_size": 32}])
def test_a_base_of_another_size_is_refused(saved, fields) -> None:
    with pytest.raises(ValueError, match="does not fit: .*Load it on the base model that it was trained on"):
        PeftModel.from_pretrained(base(**fields), saved)


def test_a_base_of_another_type_is_refused_before_it_is_touched(make_batch, saved) -> None:
    """Mistral's projections have the names and shapes of Qwen3's: every tensor would fit."""
    other, batch = base("mistral"), make_batch()
    profiles = batch.pop("demographic_embeds")
    expected = other(**batch).logits
    with pytest.raises(ValueError, match="for a base model of type 'qwen3', not 'mistral'"):
        PeftModel.from_pretrained(other, saved)
    assert torch.equal(other(**batch).logits, expected)
    assert all(parameter.requires_grad for parameter in other.parameters())
    config = CuMAConfig.from_pretrained(saved)
    config.base_model_type = None  # the way round it, for one who knows
    PeftModel.from_pretrained(other, saved, config=config)(**batch, demographic_embeds=profiles)


@pytest.mark.parametrize("kept", [5, 0.5, 0.999])
def test_a_file_that_was_cut_off_is_refused_before_anything_is_touched(make_model, make_batch, saved, kept) -> None:
    content = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    model = make_model()
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged or was not written to its end"):
        model.load_adapter(saved, "other")
    assert list(model.peft_config) == ["default"]
    untouched = base()
    with pytest.raises(ValueError, match="is damaged"):
        PeftModel.from_pretrained(untouched, saved)
    assert not any("cuma" in name for name, _ in untouched.named_modules())


def test_a_pickle_is_not_loaded(make_model, tmp_path) -> None:
    make_model().save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    with pytest.raises(ValueError, match="adapter_model.bin, a pickle.*safe_serialization=True"):
        PeftModel.from_pretrained(base(), tmp_path)


def test_a_newer_format_is_refused(saved) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 3, "of_the_future": True}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of the unknown key
        with pytest.raises(ValueError, match="format_version=3.*newer than this trl_cuma reads.*Upgrade"):
            PeftModel.from_pretrained(base(), saved)


def test_a_loaded_adapter_is_one_like_any_other(make_batch, saved, tmp_path) -> None:
    """Its folder may go, and its configuration may serve another adapter, as TRL's reference."""
    model, batch = PeftModel.from_pretrained(base(), saved), make_batch()
    for file in saved.iterdir():
        file.unlink()
    model.add_adapter("ref", model.peft_config["default"])
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(base(), tmp_path / "again")
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    again.load_adapter(tmp_path / "again" / "ref", "ref")


def test_saved_embeddings_are_no_unknown_tensors(make_model, make_batch, tmp_path) -> None:
    model, batch = make_model("llama"), make_batch()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed_tokens" in key for key in load_file(tmp_path / WEIGHTS))
    assert torch.equal(PeftModel.from_pretrained(base("llama"), tmp_path)(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("vocab_size", [40, 60])
def test_embeddings_of_another_vocabulary_are_refused(make_model, tmp_path, vocab_size) -> None:
    make_model("llama").save_pretrained(tmp_path, save_embedding_layers=True)
    resized = base("llama")
    resized.resize_token_embeddings(vocab_size)
    message = rf"another shape \(.*embed_tokens.weight has shape \(50, 64\), here \({vocab_size}, 64\)"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(resized, tmp_path)


@pytest.mark.parametrize(
    ("fields", "lost", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head", "no tensor of 'lm_head', which `modules_to_save`"),
        ({"modules_to_save": ["lm_head", "norm"]}, ".norm.", "no tensor of 'norm', which `modules_to_save`"),
        ({"trainable_token_indices": [3, 4]}, "tokens", "no trained tokens, which `trainable_token_indices`"),
    ],
    ids=["modules_to_save", "one-of-modules_to_save", "trainable_token_indices"],
)
def test_a_file_without_what_its_configuration_names_is_refused(
    make_model, make_batch, tmp_path, fields, lost, message
) -> None:
    model, batch = make_model("llama", **fields), make_batch()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base("llama"), tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    edit(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if lost in key])
    untouched = base("llama")
    with pytest.raises(ValueError, match=f"{WEIGHTS} has {message} in its adapter_config.json"):
        PeftModel.from_pretrained(untouched, tmp_path)
    assert not any("cuma" in name or "modules_to_save" in name for name, _ in untouched.named_modules())
    with pytest.raises(ValueError, match=message):
        loaded.load_adapter(tmp_path, "other")
    assert list(loaded.peft_config) == ["default"]
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_the_configuration_of_a_saved_adapter_makes_a_new_one(make_batch, saved) -> None:
    """Which stays, and works, when weights that are loaded into it later don't fit."""
    model, batch = get_peft_model(base(), CuMAConfig.from_pretrained(saved)).eval(), make_batch()
    expected = model(**batch).logits
    edit(saved, DAMAGES["missing"][0])
    with pytest.raises(ValueError, match="1 of its tensors are missing"):
        model.load_adapter(saved, "default")
    assert model.active_adapter == "default" and list(model.peft_config) == ["default"]
    assert torch.equal(model(**batch).logits, expected)


def test_weights_that_do_not_fit_such_a_new_adapter_need_no_other_base(saved) -> None:
    model = get_peft_model(base(), CuMAConfig.from_pretrained(saved))
    edit(saved, DAMAGES["missing"][0])
    with pytest.raises(
        ValueError, match="1 of its tensors are missing.*If `PeftModel.from_pretrained` was loading it"
    ):
        model.load_adapter(saved, "default")


# ---------------------------------------------------------------------- adapters on the Hub, without a network
@pytest.fixture
def cached(saved, tmp_path) -> Callable[..., dict]:
    """The adapter `someone/adapter` in the Hub's cache, with these files; returns the arguments that load it."""

    def make(*files: str) -> dict:
        repository = tmp_path / "cache" / "models--someone--adapter"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
        for file in files:
            shutil.copy(saved / file, repository / "snapshots" / ("0" * 40) / file)
        return {"model_id": "someone/adapter", "cache_dir": str(tmp_path / "cache")}

    return make


def test_an_adapter_from_the_hub_is_checked_like_one_in_a_folder(make_batch, saved, cached) -> None:
    batch = make_batch()
    arguments = cached("adapter_config.json", WEIGHTS)
    expected = PeftModel.from_pretrained(base(), saved)(**batch).logits
    assert torch.equal(PeftModel.from_pretrained(base(), **arguments)(**batch).logits, expected)
    with pytest.raises(ValueError, match="for a base model of type 'qwen3', not 'mistral'"):
        PeftModel.from_pretrained(base("mistral"), **arguments)
    file = next(Path(arguments["cache_dir"]).rglob(WEIGHTS))
    file.write_bytes(file.read_bytes()[:-1])
    untouched = base()
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged"):
        PeftModel.from_pretrained(untouched, **arguments)
    assert not any("cuma" in name for name, _ in untouched.named_modules())


def test_without_a_network_the_hubs_own_error_is_raised(cached) -> None:
    """Not that the adapter has no safetensors: nobody knows."""
    with pytest.raises(LocalEntryNotFoundError):
        PeftModel.from_pretrained(base(), **cached("adapter_config.json"))


def test_a_pickle_on_the_hub_is_not_loaded(cached, monkeypatch) -> None:
    asked = []

    def download(**arguments) -> str:
        asked.append(arguments)
        raise EntryNotFoundError("404")  # as a server that has the repository, but not the file

    monkeypatch.setattr("trl_cuma.adapter.loading.hf_hub_download", download)
    with pytest.raises(ValueError, match="The adapter at someone/adapter has no .*adapter_model.bin, a pickle"):
        PeftModel.from_pretrained(base(), **cached("adapter_config.json"))
    assert (asked[0]["repo_id"], asked[0]["filename"]) == ("someone/adapter", WEIGHTS)


def test_a_classifier_comes_back_with_its_head(make_config, make_batch, tmp_path) -> None:
    """PEFT names `classifier` and `score` in `modules_to_save`, of which a model has one."""

    def classifier(seed: int):
        torch.manual_seed(seed)
        config = base().config
        config.num_labels = 1
        return AutoModelForSequenceClassification.from_config(config).eval()

    batch = make_batch()
    model = get_peft_model(classifier(0), make_config(task_type="SEQ_CLS")).eval()
    model.save_pretrained(tmp_path)
    assert any("score" in key for key in load_file(tmp_path / WEIGHTS))
    other = classifier(0)
    other.score.weight.data.zero_()
    assert torch.equal(PeftModel.from_pretrained(other, tmp_path).eval()(**batch).logits, model(**batch).logits)
    edit(tmp_path, lambda tensors: [tensors.pop(key) for key in list(tensors) if "score" in key])
    with pytest.raises(ValueError, match="no tensor of 'score'"):
        PeftModel.from_pretrained(classifier(0), tmp_path)
