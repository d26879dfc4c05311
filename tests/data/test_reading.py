# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Every form in which a data set may lie on a disk, and what is said where it is broken."""

import json

import pytest
from datasets import Dataset, DatasetDict

from trl_cuma.data import reading
from trl_cuma.data.reading import Row, open_table

ROWS = [{"id": 1, "text": 'Grüße, „Welt"\nzwei', "note": "x"}, {"id": 2, "text": None, "note": "y"}]


def read(source, columns=("id", "text"), **options):
    return [
        (row.number, row.identifier("id"), row.text("text")) for row in open_table(source, **options).rows(columns)
    ]


def write_csv(path, rows):
    Dataset.from_list(rows).to_csv(path)
    return path


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


EXPECTED = [(1, "1", 'Grüße, „Welt"\nzwei'), (2, "2", None)]


def test_every_form_of_a_local_copy_reads_the_same(tmp_path, monkeypatch):
    data = Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "array.json").write_text(json.dumps(ROWS))
    write_lines(tmp_path / "lines.json", ROWS)
    data.save_to_disk(tmp_path / "saved")
    DatasetDict({"train": data, "other": data.select([0])}).save_to_disk(tmp_path / "saved_dict")
    (tmp_path / "folder" / ".cache").mkdir(parents=True)
    for number, row in enumerate(ROWS):
        Dataset.from_list([row], features=data.features).to_parquet(tmp_path / "folder" / f"train-{number}.parquet")
        Dataset.from_list([row], features=data.features).to_parquet(tmp_path / "folder" / f"other-{number}.parquet")
    (tmp_path / "folder" / ".cache" / "train-9.parquet").write_bytes(b"")

    assert read(data) == EXPECTED
    assert read(write_csv(tmp_path / "a.csv", ROWS)) == EXPECTED
    assert read(write_lines(tmp_path / "a.jsonl", ROWS)) == EXPECTED
    for name in ("a.parquet", "array.json", "lines.json", "saved", "saved_dict"):
        assert read(str(tmp_path / name)) == EXPECTED
    assert read(tmp_path / "saved_dict", split="other") == EXPECTED[:1]
    # each file counts its rows anew
    assert read(tmp_path / "folder") == [(1, *EXPECTED[0][1:]), (1, *EXPECTED[1][1:])]

    asked = []
    monkeypatch.setattr(reading, "load_dataset", lambda *names, **options: asked.append((names, options)) or data)
    assert read("owner/name", config="benchmark", split="filtered") == EXPECTED
    assert asked == [(("owner/name", "benchmark"), {"split": "filtered"})]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "data"])
def test_only_the_named_part_of_a_nested_column_is_kept(tmp_path, form):
    rows = [{"id": 1, "religion": {"simplified": "x", "self_described": "SECRET"}}, {"id": 2, "religion": None}]
    source = Dataset.from_list(rows)
    if form == "jsonl":
        source = write_lines(tmp_path / "a.jsonl", rows)
    elif form == "parquet":
        source.to_parquet(tmp_path / "a.parquet")
        source = tmp_path / "a.parquet"
    cells = [row.cells for row in open_table(source).rows(["id", "religion.simplified"])]
    assert cells == [{"id": 1, "religion.simplified": "x"}, {"id": 2, "religion.simplified": None}]


def test_a_table_can_be_read_again():
    table = open_table(Dataset.from_list(ROWS))
    assert (
        [row.cells for row in table.rows(["id"])]
        == [row.cells for row in table.rows(["id"])]
        == [{"id": 1}, {"id": 2}]
    )


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "data"])
def test_a_missing_column_is_named(tmp_path, form):
    source = Dataset.from_list(ROWS)
    path = tmp_path / f"a.{form}"
    if form == "csv":
        source = write_csv(path, ROWS)
    elif form == "jsonl":
        source = write_lines(path, ROWS)
    elif form == "parquet":
        source.to_parquet(path)
        source = path
    with pytest.raises(ValueError, match=r"row 1, column `language`"):
        list(open_table(source).rows(["id", "language"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"id": 1}\n\n{"id": 2\n', r"a\.jsonl, row 3: is no JSON \(line 1, character"),
        ("a.jsonl", b'{"id": 1}\n[1]\n', r"row 2: expected an object, got list"),
        ("a.jsonl", b'{"id": 1}\n{"other": 1}\n', r"row 2, column `id`"),
        ("a.jsonl", b'{"id": "\xff"}\n', r"row 1: is no JSON \(it is not UTF-8\)"),
        ("a.json", b'[{"id": 1},\n {"id": }]', r"a\.json: is no JSON \(line 2, character 9"),
        ("a.csv", b"id,text\n1,a\n2\n", r"a\.csv, row 2: 1 cells, but 2 in the header"),
        ("a.csv", b'id,text\n1,a\n2,"b\n', r"a\.csv, row 2: is no row of CSV"),
        ("a.parquet", b"id", r"a\.parquet is no Parquet file"),
        ("a.txt", b"id", r"a\.txt is none of"),
    ],
)
def test_a_broken_file_names_the_row(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(open_table(tmp_path / name).rows(["id"]))


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("text", 3, "expected text, got int"),
        ("text", ["SECRET"], "expected text, got list"),
        ("text", "SECRET \ud83d", "half of a surrogate pair"),
        ("identifier", None, "is missing"),
        ("identifier", " ", "is missing"),
        ("identifier", True, "expected text, got bool"),
        ("identifier", 1.5, "expected text, got float"),
        ("flag", "SECRET", "expected true or false"),
    ],
)
def test_a_cell_of_another_type_is_named_and_not_shown(method, value, message):
    with pytest.raises(ValueError, match=rf"f\.csv, row 4, column `it`: .*{message}") as error:
        getattr(Row("f.csv", 4, {"it": value}), method)("it")
    assert "SECRET" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "value", "read_as"),
    [
        ("text", float("nan"), None),
        ("text", "  a ", "a"),
        ("identifier", 7, "7"),
        ("identifier", 7.0, "7"),
        ("identifier", " 7", "7"),
        ("flag", "True", True),
        ("flag", "false", False),
        ("flag", None, False),
        ("flag", True, True),
    ],
)
def test_cells_as_files_write_them(method, value, read_as):
    assert getattr(Row("f", 1, {"it": value}), method)("it") == read_as


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a file"):
        open_table("folder/missing.jsonl")
    with pytest.raises(FileNotFoundError, match="neither a file"):
        open_table(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="holds no file"):
        open_table(tmp_path)
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(ValueError, match="several kinds"):
        open_table(tmp_path)
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"no split 'test', only \['train'\]"):
        open_table(tmp_path / "saved", split="test")
