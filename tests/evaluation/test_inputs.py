# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What `trl-cuma evaluate` is given and can't use: one line that names the option, before a model is loaded."""

from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict

from trl_cuma.cli import main
from trl_cuma.evaluation.evaluation_data import load_splits
from trl_cuma.evaluation.inputs import load_model, set_columns
from trl_cuma.testing import tiny_model, word_tokenizer

MAP = "name,x,y\n" + "".join(f"{name},{place},{place}\n" for place, name in enumerate("ABCDE"))
CONVERSATION = [{"role": "user", "content": "a b"}]


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The working directory: a model and an adapter that nobody gets to load, and maps."""
    monkeypatch.chdir(tmp_path)
    for folder, file in (("base", "config.json"), ("runs/cuma", "adapter_config.json"), ("rows", "rows.jsonl")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / file).write_text("{}")
    for name, text in (("good", MAP), ("bad", MAP.replace("3,3", "3")), ("few", "name,x,y\nA,1,2\n"), ("empty", "")):
        (tmp_path / f"{name}.csv").write_text(text)
    (tmp_path / "image.csv").write_bytes(b"\x89PNG\xff")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "./typo"], "`--data` is './typo', and there is no such file or folder"),
        (["--data", "some/where/else"], "`--data` is 'some/where/else', and there is no such file or folder"),
        (["--model", "./typo"], "`--model` is './typo', and there is no such file or folder"),
        (["--adapter", "/no/cuma"], "`--adapter` is '/no/cuma', and there is no such file or folder"),
        (["--judge", "j", "--against", "./typo"], "`--against` is './typo', and there is no such file or folder"),
        (["--model", "runs/cuma"], "`--model` is 'runs/cuma', the folder of an adapter. Pass it as `--adapter`"),
        (["--adapter", "base"], "`--adapter` is 'base', a folder without adapter_config.json"),
        (["--reference_map", "bad.csv"], "`--reference_map` bad.csv can't be read as a map: Line 5 of bad.csv"),
        (["--reference_map", "image.csv"], "`--reference_map` image.csv can't be read as a map: "),
        (["--reference_map", "few.csv"], "`--reference_map` few.csv has 1 groups; it takes 5"),
        (["--reference_map", "empty.csv"], "`--reference_map` empty.csv has 0 groups; it takes 5"),
        (["--reference_map", "typo.csv"], "`--reference_map` typo.csv is no file"),
        (["--neutral", "typo.jsonl"], "`--neutral` typo.jsonl is no file"),
        (["--neutral", "bad.csv"], "`--neutral`: bad.csv, line 1 is no JSON"),
        (["--reference_map", "good.csv", "--topology_prompts", "0"], "`--topology_prompts` is 0"),
        (["--max_bad_share", "5"], "`--max_bad_share` is 5.0, expected a share from 0 to 1"),
        (["--max_bad_share", "nan"], "`--max_bad_share` is nan, expected a share from 0 to 1"),
    ],
)
def test_an_error_names_the_option(there, capsys, arguments, message):
    given = {"--adapter": "runs/cuma", "--data": "rows", "--output_dir": "out"}
    given |= dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert main(["evaluate", *(text for pair in given.items() for text in pair)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("trl-cuma evaluate: error: ") and message in said


def test_a_column_that_was_named_must_be_there():
    splits = {"test": Dataset.from_list([{"prompt": "a", "who": "p"}])}
    args = SimpleNamespace(demographic_column=None, person_column="who")
    set_columns(args, splits)
    assert (args.demographic_column, args.person_column) == ("demographic", "who")  # by default it may be absent
    for name in ("demographic_column", "person_column"):
        args = SimpleNamespace(demographic_column=None, person_column=None)
        setattr(args, name, "whom")
        with pytest.raises(ValueError, match=f"`--{name}` is 'whom'.*split 'test'.*'prompt', 'who'"):
            set_columns(args, splits)


def test_a_single_data_set_is_the_test_split(tmp_path):
    rows = Dataset.from_list([{"prompt": "a"}])
    rows.save_to_disk(str(tmp_path / "alone"))
    splits, train = load_splits(str(tmp_path / "alone"), None, ["test"], "train")
    assert splits["test"]["prompt"][:] == ["a"] and train is None
    with pytest.raises(ValueError, match=r"'dev', but the data has the splits \['test'\]"):
        load_splits(str(tmp_path / "alone"), None, ["dev"], "train")
    # A split of a whole data set may be the one that was trained on.
    DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "whole"))
    with pytest.raises(ValueError, match=f"one split of {tmp_path}/whole. Pass that folder.*`--split train`"):
        load_splits(str(tmp_path / "whole" / "train"), None, ["test"], "train")


def test_data_that_cannot_be_loaded(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"`--data` {tmp_path}/empty: "):
        load_splits(str(tmp_path / "empty"), None, ["test"], "train")


def test_conversations_need_a_chat_template(tmp_path):
    tokenizer = word_tokenizer(["a b A B"])
    tokenizer.save_pretrained(tmp_path)
    args = SimpleNamespace(dtype="auto", load_in_4bit=False, trust_remote_code=False)
    splits = {"test": Dataset.from_list([{"prompt": CONVERSATION}])}
    with pytest.raises(
        ValueError, match="split 'test' are conversations, and the tokenizer of .* has no chat template"
    ):
        load_model(args, str(tmp_path), None, splits)  # there are no weights yet: it is said before they are read
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    _, _, about = load_model(args, str(tmp_path), None, {"test": Dataset.from_list([{"prompt": "a b"}])})
    assert about == {"name": str(tmp_path), "adapter": None, "parameters_trained": None}
