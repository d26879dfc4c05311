# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import re

import pytest
from huggingface_hub import ModelCard, ModelCardData

from trl_cuma import CuMAConfig, FieldEncoder
from trl_cuma.adapter.card import BEGIN, END, write_card

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


def test_values_that_many_share_are_named(make_model, tmp_path) -> None:
    people = [{"country": "Wonderland <!-- trl_cuma: end -->"}] * 30 + [{"country": "Atlantis|*"}] * 31
    people += [{"country": "Zzyzx"}] * 29
    encoder = FieldEncoder(min_count=30).fit(people)
    model = make_model(demographic_dim=encoder.dim, demographic_encoder=encoder.state())
    model.save_pretrained(tmp_path)
    text = text_of(tmp_path)
    assert r"| country | Atlantis\|\*, Wonderland &lt;!-- trl\_cuma: end --> |" in text
    assert "At least 30 people share each value" in text and "Zzyzx" not in text
    model.save_pretrained(tmp_path)
    assert text_of(tmp_path) == text  # a value that looks like a mark is none


def test_it_says_what_it_is_for_and_what_not(make_model, tmp_path) -> None:
    make_model().save_pretrained(tmp_path)
    text = text_of(tmp_path)
    for words in ("inferring anybody's demographics", "impersonating a person", "decisions about people"):
        assert words in text.partition("It is **not** for")[2]
    for words in ("**Stereotyping.**", "**Gaps.**", "A profile is declared by the person, never inferred"):
        assert words in text


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


def test_words_in_pefts_template_stay(make_model, tmp_path) -> None:
    """Somebody has filled in one line of the template, and left the others."""
    template = str(ModelCard.from_template(ModelCardData()))
    (tmp_path / "README.md").write_text(template.replace("[More Information Needed]", "Made by Ada.", 1))
    make_model().save_pretrained(tmp_path)
    assert "Made by Ada." in text_of(tmp_path) and "# A CuMA adapter" in text_of(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        f"Before\n{END}\nbetween\n{BEGIN}\nafter",
        f"Before\n{END}\nafter",
        f"Before\n{BEGIN}\nafter",
        f"Before\n{BEGIN}\nold\n{END}\nafter\n{END}",
        f"Before\n{BEGIN}\nold\n{END}\nafter\n{BEGIN}",
    ],
    ids=["swapped", "end-alone", "begin-alone", "two-ends", "two-begins"],
)
def test_marks_out_of_place_lose_no_words(make_model, tmp_path, text) -> None:
    model = make_model()
    (tmp_path / "README.md").write_text(text)
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert all(word in text_of(tmp_path) for word in ("Before", *re.findall("between|after", text)))
        assert text_of(tmp_path).count("# A CuMA adapter") == 1


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/home/ada/models/base", "base"),
        ("./ada/base", "base"),
        ("ada/models/base/", "base"),
        ("~/base", "base"),
        ("C:\\ada\\base", "base"),
        ("gpt2", "gpt2"),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
    ],
)
def test_of_a_path_only_the_last_part_is_told(make_model, tmp_path, name, shown) -> None:
    training = [{"trainer": "CuMASFTTrainer"}]
    model = make_model(training=training, demographic_encoder={"type": "text", "model": name})
    base = model.base_model.model
    base.name_or_path = base.config._name_or_path = name
    model.save_pretrained(tmp_path)
    text, card = text_of(tmp_path), ModelCard.load(tmp_path / "README.md")
    assert f'from_pretrained("{shown}")' in text and f"| model | {shown} |" in text
    assert card.data.base_model == (shown if shown == name else None)
    assert (f"base_model:adapter:{name}" in card.data.tags) == (shown == name)
    assert shown == name or "ada" not in text.replace("adapter", "")


def test_a_cell_stays_in_its_column(make_model, tmp_path) -> None:
    """A regular expression has the character that ends a cell, a text template may have lines."""
    template = {"template": "a|b\nc"}
    make_model(target_modules=r".*\.(q_proj|v_proj)", demographic_encoder=template).save_pretrained(tmp_path)
    assert r"| target_modules | .*\.(q_proj\|v_proj) |" in text_of(tmp_path)
    assert r"| template | a\|b c |" in text_of(tmp_path)


@pytest.mark.parametrize("state", [{}, {"type": "of the future"}, {"type": "field"}, {"type": "text", "dim": None}])
def test_an_encoder_that_the_card_does_not_know_is_no_reason_not_to_save(make_model, tmp_path, state) -> None:
    make_model(demographic_encoder=state).save_pretrained(tmp_path)
    assert "## Demographic profiles" in text_of(tmp_path)
    assert "type" not in state or f"| type | {state['type']} |" in text_of(tmp_path)
    assert CuMAConfig.from_pretrained(tmp_path).demographic_encoder == state


def test_several_base_models_in_the_owners_card_are_no_reason_not_to_write(tmp_path) -> None:
    """The Hub takes a list, too; of the trainers' folder PEFT does not write the card first."""
    (tmp_path / "README.md").write_text("---\nbase_model:\n- Qwen/Qwen3-8B\n- Qwen/Qwen3-4B\n---\nMine\n")
    write_card(str(tmp_path), CuMAConfig())
    assert "Mine" in text_of(tmp_path) and "# A CuMA adapter" in text_of(tmp_path)
