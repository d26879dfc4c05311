# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What goes to the Hub, up to the upload; `tests/hub` has the rest."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, ModelCardData
from transformers.utils import PushToHubMixin

from trl_cuma.adapter.card import write_card
from trl_cuma.adapter.hub import upload_adapter


@pytest.fixture
def uploaded(monkeypatch):
    """Folders' files as `push_to_hub` or `upload_folder` would upload them, by repository."""
    found = {}

    def keep(self, folder, repo_id, *args, **kwargs):
        found[repo_id] = {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: type("Url", (), {"repo_id": repo_id}))
    description = "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card"
    template = ModelCard.from_template(ModelCardData(), model_description=f"{description} has been generated.")
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: template)
    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", keep)
    return found


def test_a_pushed_model_has_its_card(make_model, uploaded):
    """Fails where transformers renames the step of `push_to_hub` that is extended."""
    make_model().push_to_hub("org/cuma")
    text = uploaded["org/cuma"]["README.md"].decode()
    assert "# A CuMA adapter" in text and "More Information Needed" not in text


def test_a_pushed_configuration_has_no_empty_card(make_config, uploaded):
    make_config().push_to_hub("org/config")
    assert uploaded["org/config"].keys() == {"adapter_config.json"}


def test_a_folder_without_an_adapter_is_not_uploaded(make_model, tmp_path):
    model = make_model()
    model.peft_config["default"].save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors: there is no adapter to upload"):
        upload_adapter(tmp_path, "org/cuma")


def test_the_card_of_a_folder_without_weights_has_no_measures(make_config, tmp_path):
    with pytest.raises(ValueError, match="that something could be measured on"):
        write_card(str(tmp_path), make_config(), measured="It answers well.")
