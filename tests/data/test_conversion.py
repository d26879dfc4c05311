# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import os
import stat
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Value, load_dataset

from trl_cuma.data import conversion
from trl_cuma.data.conversion import Conversion, check_task, row_features
from trl_cuma.data.licenses import prepared_license

FEATURES = row_features("sft", ["country"], {"turn": Value("int32")})


def rows(*numbers):
    message = [[{"role": "user", "content": f"question {number}"}] for number in numbers]
    return pa.table(
        {
            "prompt": message,
            "completion": message,
            "demographic": [{"country": "Ruritania"} for _ in numbers],
            "person_id": [f"p{number}" for number in numbers],
            "turn": list(numbers),
        },
        schema=FEATURES.arrow_schema,
    )


def make(batches, splits=("train",)):
    def run(report):
        for split, table in batches:
            report.read("answers", len(table))
            yield split, table

    return Conversion(FEATURES, run, "Some survey, sft", splits, "cc-by-nc-4.0")


@pytest.fixture
def two_splits():
    return make([("train", rows(0, 1)), ("test", rows(2)), ("train", rows(3)), ("test", rows())], ("train", "test"))


def test_the_folder_and_memory_hold_the_same(two_splits, tmp_path):
    in_memory = two_splits.datasets()
    report = two_splits.save(tmp_path / "made" / "out")
    loaded = load_dataset(str(tmp_path / "made" / "out"), cache_dir=str(tmp_path / "cache"))
    assert list(in_memory) == list(loaded) == ["train", "test"]
    for split, turns in {"train": [0, 1, 3], "test": [2]}.items():
        assert in_memory[split].features == loaded[split].features == FEATURES
        assert in_memory[split].to_list() == loaded[split].to_list()
        assert loaded[split]["turn"][:] == turns
    assert report.to_dict() == two_splits.report.to_dict()
    assert report.rows == {"train": 3, "test": 1} and report.kept("answers") == 4


def test_big_splits_are_several_files(two_splits, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "ROWS_PER_FILE", 2)
    two_splits.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "data").iterdir()) == [
        "test-00000-of-00001.parquet",
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]
    loaded = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"]["turn"][:] == [0, 1, 3]


def test_only_the_owner_can_read_it(two_splits, tmp_path):
    old = os.umask(0)
    try:
        two_splits.save(tmp_path / "out")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700


def test_an_error_on_the_way_leaves_nothing(tmp_path):
    def batches():
        yield "train", rows(0)
        raise ValueError("line 7 is malformed")

    with pytest.raises(ValueError, match="line 7"):
        make(batches()).save(tmp_path / "made" / "for" / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_error_on_the_way_leaves_what_was_there(two_splits, tmp_path):
    two_splits.save(tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="No row is left"):
        make([]).save(tmp_path / "out", overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_there_is_replaced_only_where_asked(two_splits, tmp_path):
    two_splits.save(tmp_path / "out")
    with pytest.raises(FileExistsError, match="holds a prepared data set"):
        two_splits.save(tmp_path / "out")
    make([("train", rows(9))]).save(tmp_path / "out", overwrite=True)
    assert load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]["turn"][:] == [9]
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["out"]


def test_what_somebody_else_wrote_is_never_replaced(two_splits, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="Name another folder"):
        two_splits.save(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_a_report_of_another_program_is_no_licence_to_replace(two_splits, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text("{}")
    with pytest.raises(FileExistsError, match="Name another folder"):
        two_splits.save(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "report.json").read_text() == "{}"


def test_a_link_stays_a_link(two_splits, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    two_splits.save(tmp_path / "out")
    two_splits.save(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "report.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_the_working_folder_is_refused_at_once(two_splits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="the folder that this runs in"):
        two_splits.save(".")
    assert two_splits.report is None


def test_an_interrupted_exchange_of_folders_is_undone(two_splits, tmp_path, monkeypatch):
    two_splits.save(tmp_path / "out")
    rename = Path.rename

    def interrupt(self, target):
        if target == tmp_path / "out" and "earlier" not in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make([("train", rows(9))]).save(tmp_path / "out", overwrite=True)
    loaded = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"]["turn"][:] == [0, 1, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out"]


def test_an_empty_folder_will_do(two_splits, tmp_path):
    (tmp_path / "out").mkdir()
    two_splits.save(tmp_path / "out")
    assert (tmp_path / "out" / "report.json").is_file()


def test_the_sources_terms_go_along(two_splits, tmp_path):
    assert {split.info.license for split in two_splits.datasets().values()} == {"cc-by-nc-4.0"}
    two_splits.save(tmp_path / "out")
    assert prepared_license(tmp_path / "out") == "cc-by-nc-4.0"
    assert "Terms: cc-by-nc-4.0." in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "report.json").write_text("[1]")
    assert prepared_license(tmp_path) is prepared_license("org/data") is prepared_license(None) is None


@pytest.mark.parametrize("method", ["datasets", "save"])
def test_a_split_that_was_asked_for_and_got_no_row_is_an_error(method, tmp_path):
    one_sided = make([("train", rows(0))], ("train", "test"))
    with pytest.raises(ValueError, match=r"No row is left for the splits \['test'\]"):
        one_sided.save(tmp_path / "out") if method == "save" else one_sided.datasets()


def test_the_card_tells_counts_and_no_value(two_splits, tmp_path):
    two_splits.save(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "rows of split train" in card and "Ruritania" not in card


def test_tasks():
    with pytest.raises(ValueError, match="`task` is 'kto'"):
        check_task("kto", ("sft", "dpo"), False)
    with pytest.raises(ValueError, match="for the task 'sft' only"):
        check_task("dpo", ("sft", "dpo"), True)
    check_task("sft", ("sft", "dpo"), True)
