# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""From a trained adapter to the Hub and back, over HTTP, by the libraries' own code."""

import json

import pytest

from .server import ARGUMENT, TOKEN

pytestmark = pytest.mark.slow  # two processes that import everything

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


def files(published, repo, revision="main"):
    return {name: content for name, content in published.server.files(repo, revision).items() if content}


def card(published, repo, revision="main"):
    return files(published, repo, revision)["README.md"].decode()


@pytest.mark.parametrize("what", ["main", "auto", "v2", "trained", "tokenizer"])
def test_a_fresh_process_answers_as_before(fetched, what):
    assert fetched[what]
    assert not fetched["v2 as main"]


def test_what_is_not_there_is_named(fetched):
    assert "org/cuma" in fetched["no such revision"]  # PEFT's words, which don't name the revision
    assert "org/nowhere" in fetched["no such repository"]


def test_a_pushed_model_has_its_card(published):
    """transformers puts an empty template in its place; PEFT has no hook."""
    assert files(published, "org/cuma").keys() == ADAPTER
    text = card(published, "org/cuma")
    assert text.count("# A CuMA adapter") == 1 and "| num_experts | 4 |" in text
    assert "More Information Needed" not in text and "library_name: peft" in text
    assert "pipeline_tag: text-generation" in text


def test_words_written_on_the_hub_stay(published):
    for revision in ("main", "v2"):
        assert "Written on the Hub." in card(published, "org/cuma", revision)


def test_a_configuration_leaves_the_card(published):
    assert card(published, "org/cuma", "v2").count("# A CuMA adapter") == 1
    assert files(published, "org/config").keys() == {"adapter_config.json"}


def test_other_methods_are_published_as_ever(published):
    assert "CuMA" not in card(published, "org/lora") and "More Information Needed" in card(published, "org/lora")


def test_only_the_adapter_is_uploaded(published):
    assert files(published, "org/saved").keys() == ADAPTER
    of_checkpoint = {name for name in files(published, "org/trained") if name.startswith("last-checkpoint/")}
    assert files(published, "org/trained").keys() - of_checkpoint == ADAPTER | TOKENIZER
    assert "last-checkpoint/optimizer.pt" in of_checkpoint
    assert not [name for name in of_checkpoint if name.endswith("training_args.bin")]


def test_no_secret_no_person_and_no_rare_value_is_uploaded(published):
    server = published.server
    for repo in server.branches:
        for name, content in files(published, repo).items():
            for word in (TOKEN, ARGUMENT, "what people asked", "Zzyzx"):
                assert word.encode() not in content, (repo, name)
            # Loading needs the base's place, in PEFT's configuration alone.
            if name.rpartition("/")[2] != "adapter_config.json" and repo != "org/lora":
                assert str(published.folder).encode() not in content, (repo, name)
    config = json.loads(files(published, "org/trained")["adapter_config.json"])
    assert config["demographic_encoder"]["vocabulary"] == {"age": ["old", "young"], "country": ["Arvenia", "Bosk"]}


def test_the_trainers_card_goes_along(published):
    text = card(published, "org/trained")
    assert "| trainer | CuMASFTTrainer |" in text and "| dataset | org/survey |" in text
    assert "| country | Arvenia, Bosk |" in text


def test_what_was_measured_goes_with_its_weights_alone(published):
    assert "It answers well." in card(published, "org/saved")
    for repo in ("org/stale", "org/remeasure"):
        assert "It answers well." not in card(published, repo) and "Not measured" in card(published, repo)


@pytest.mark.parametrize(
    ("repo", "reason"), [("org/refused", "rights to commit"), ("org/full", "storage is full"), ("trainer", "rights")]
)
def test_a_refused_upload_says_why_and_leaves_the_folder(published, repo, reason):
    assert reason in published.found[repo]
    assert published.found.get(f"{repo} intact", True)
    assert {path.name for path in (published.folder / "run").iterdir()} >= ADAPTER
