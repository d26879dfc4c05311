# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import re

import pytest
from huggingface_hub import ModelCard

from trl_cuma import CuMAConfig, FieldEncoder

PEOPLE = [{"country": "Wonderland", "age": "old"}] * 3 + [{"country": "Atlantis", "age": "young"}] * 3


@pytest.fixture
def encoder() -> FieldEncoder:
    return FieldEncoder(min_count=2).fit(PEOPLE)


def text_of(folder) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_says_how_to_load_what_it_is_and_what_it_cannot(make_model, encoder, tmp_path) -> None:
    make_model(demographic_dim=encoder.dim, demographic_encoder=encoder.state()).save_pretrained(tmp_path)
    text = text_of(tmp_path)
    assert "import trl_cuma" in text and "KeyError: 'CUMA'" in text
    assert 'load_demographic_encoder("' in text and '{"age": …, "country": …}' in text
    assert "| num_experts | 4 |" in text and "| target_modules | q_proj, v_proj |" in text
    assert "| fields (known values) | age (2), country (2) |" in text
    assert "cannot be merged" in text and "A call without a profile is an error" in text
    assert "[More Information Needed]" not in text
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft" and {"cuma", "trl"} <= set(card.data.tags)


def test_no_profile_value_and_no_folder_of_the_machine_is_in_it(make_model, encoder, tmp_path) -> None:
    model = make_model(demographic_dim=encoder.dim, demographic_encoder=encoder.state())
    model.base_model.model.name_or_path = str(tmp_path)
    model.base_model.model.config._name_or_path = str(tmp_path)
    model.save_pretrained(tmp_path)
    text = text_of(tmp_path)
    for word in ("Wonderland", "Atlantis", "old", "young", str(tmp_path)):
        assert not re.search(rf"\b{re.escape(word)}\b", text), word


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"routing": "semantic"}, "None: the router reads the token alone."),
        ({}, "Vectors of 6 entries that the data set brought along."),
        ({"missing_demographics": "zero"}, "A call without a profile means the zero vector"),
        ({"router_groups": [["q_proj", "v_proj"]]}, "| router_groups | ['q_proj', 'v_proj'] |"),
    ],
)
def test_it_follows_the_configuration(make_model, tmp_path, fields, sentence) -> None:
    make_model(**fields).save_pretrained(tmp_path)
    assert sentence in text_of(tmp_path)
    if fields.get("routing") == "semantic":
        assert "load_demographic_encoder" not in text_of(tmp_path)


def test_saving_again_replaces_our_part_and_keeps_the_owners_words(make_model, tmp_path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    own = text_of(tmp_path).replace("# A CuMA adapter", "# overwritten") + "\nMy own words.\n"
    path.write_text(own.replace("library_name: peft", "library_name: peft\nlicense: apache-2.0"))
    model.save_pretrained(tmp_path)
    text = text_of(tmp_path)
    assert "My own words." in text and "license: apache-2.0" in text
    assert "overwritten" not in text and text.count("# A CuMA adapter") == 1

    path.write_text("---\nlicense: mit\n---\n# Mine\n\nHand-written.\n")
    model.save_pretrained(tmp_path)
    assert text_of(tmp_path).index("Hand-written.") < text_of(tmp_path).index("# A CuMA adapter")
    assert not list(tmp_path.glob("*.tmp"))


def test_each_adapter_has_its_own_card(make_model, make_config, tmp_path) -> None:
    model = make_model()
    model.add_adapter("other", make_config(num_experts=2, top_k=2))
    model.save_pretrained(tmp_path)
    assert "| num_experts | 4 |" in text_of(tmp_path)
    assert "| num_experts | 2 |" in text_of(tmp_path / "other")


def test_a_configuration_alone_has_no_card(tmp_path) -> None:
    CuMAConfig().save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["adapter_config.json"]
