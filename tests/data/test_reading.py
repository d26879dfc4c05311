# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Every form in which a data set may lie on a disk, and what is said where it is broken."""

import json

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Json, List, load_dataset

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
        ("flag", 2, "expected text, got int"),
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
        ("flag", 1, True),
        ("flag", 0, False),
        ("flag", 1.0, True),  # of a column that has gaps elsewhere
        ("flag", float("nan"), False),
        ("flag", "1", True),
        ("flag", "0.0", False),
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
    with pytest.raises(ValueError, match=r"several files that could be meant: a\.csv, b\.jsonl"):
        open_table(tmp_path)
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"no split 'test', only \['train'\]"):
        open_table(tmp_path / "saved", split="test")


def test_json_in_a_column_reads_as_from_the_file_itself(tmp_path):
    """`datasets` keeps objects that have not all the same keys as JSON; so the Hub serves JSON Lines."""
    rows = [
        {"id": 1, "talk": [{"role": "user"}, {"role": "model", "score": 7, "more": {"a": None}}], "place": {"x": "a"}},
        {"id": 2, "talk": None, "place": None},
        {"id": 3, "talk": [], "place": {"x": "b", "y": [1]}},
    ]
    path = write_lines(tmp_path / "a.jsonl", rows)
    data = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert data.features["talk"] == List(Json())  # else this test tries nothing
    places = [row["place"] and json.dumps(row["place"]) for row in rows]
    data = data.remove_columns("place").add_column("place", places, feature=Json())
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "saved")
    expected = [{"id": row["id"], "talk": row["talk"], "place.x": row["place"] and row["place"]["x"]} for row in rows]
    for source in (path, data, tmp_path / "a.parquet", tmp_path / "saved"):
        assert [row.cells for row in open_table(source).rows(["id", "talk", "place.x"])] == expected


def test_what_is_missing_in_csv_is_missing_as_the_hub_reads_it(tmp_path):
    texts = ["None", "NA", "null", "nan", "N/A", "", "none", "Nothing", "-"]
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + "".join(f"{number},{text}\n" for number, text in enumerate(texts)))
    loaded = load_dataset("csv", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    local = [row.text("text") for row in open_table(path).rows(["text"])]
    assert local == [None] * 6 + ["none", "Nothing", "-"]
    assert local == [row.text("text") for row in open_table(loaded).rows(["text"])]


def test_a_long_cell_and_a_mark_of_the_byte_order(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfid,text,note\n1," + b"y" * 140_000 + b",\n")
    assert [len(row.text("text")) for row in open_table(path).rows(["id", "text"])] == [140_000]


def layout(folder, *names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"id": number, "text": None}
        Dataset.from_list([row]).to_parquet(path) if path.suffix == ".parquet" else write_lines(path, [row])
    return folder


@pytest.mark.parametrize(
    ("names", "options", "ids"),
    [
        (["default/filtered/0000.parquet", "default/train/0000.parquet", "default/train/0001.parquet"], {}, "12"),
        (["default/filtered/0000.parquet", "default/train/0000.parquet"], {"split": "filtered"}, "0"),
        (["a/train/0000.parquet", "b/train/0000.parquet"], {"config": "b"}, "1"),
        (["data/filtered_rows.jsonl", "data/full_rows.jsonl"], {"split": "full"}, "1"),
        (["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "test.parquet"], {}, "01"),
        (["rows-0.parquet", "rows-1.parquet"], {}, "01"),
        (["rows.jsonl"], {}, "0"),
        # beside the data: what describes it
        (["rows.jsonl", "dataset_infos.json", "dataset_info.json"], {}, "0"),
    ],
)
def test_the_files_of_a_folder_that_are_meant(tmp_path, names, options, ids):
    assert "".join(row[1] for row in read(layout(tmp_path, *names), **options)) == ids


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["data/filtered_rows.jsonl", "data/full_rows.jsonl"], {}, "several files .*filtered_rows.*full_rows"),
        (["a/train/0000.parquet", "b/train/0000.parquet"], {}, "several files .*a/train/0000.*b/train/0000"),
        (["rows.jsonl"], {"split": "filtered"}, "no file of split 'filtered', only rows"),
        (["unfiltered.jsonl"], {"split": "filtered"}, "no file of split 'filtered'"),
        (["train.jsonl"], {"config": "benchmark"}, "no file of config 'benchmark', only train"),
    ],
)
def test_a_folder_in_which_it_is_not_clear_what_is_meant(tmp_path, names, options, message):
    with pytest.raises(ValueError, match=message):
        open_table(layout(tmp_path, *names), **options)


def test_a_split_of_a_loaded_data_set():
    data = DatasetDict({"train": Dataset.from_list(ROWS), "other": Dataset.from_list(ROWS[:1])})
    assert read(data) == EXPECTED
    assert read(data, split="other") == EXPECTED[:1]
    with pytest.raises(ValueError, match=r"no split 'test', only \['train', 'other'\]"):
        open_table(data, split="test")


@pytest.mark.parametrize("error", [FileNotFoundError, ConnectionError, ValueError])
def test_what_is_neither_here_nor_on_the_hub(monkeypatch, error):
    def fail(*names, **options):
        raise error("no such thing")

    monkeypatch.setattr(reading, "load_dataset", fail)
    kind = ValueError if error is ValueError else OSError
    with pytest.raises(kind, match="data/prism is no file or folder here, and could not .* Hub: no such thing"):
        open_table("data/prism")


def test_columns_that_are_not_asked_for_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    Dataset.from_list([{"id": 1, "text": "a", "place": {"kept": "k", "own_words": "w"}, "note": "n"}]).to_parquet(path)
    content = bytearray(path.read_bytes())
    group = pq.ParquetFile(path).metadata.row_group(0)
    for column in map(group.column, range(group.num_columns)):
        if column.path_in_schema in ("note", "place.own_words"):
            start = column.dictionary_page_offset or column.data_page_offset
            content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    columns = ["id", "text", "place.kept"]
    assert [row.cells for row in open_table(path).rows(columns)] == [{"id": 1, "text": "a", "place.kept": "k"}]
    with pytest.raises(OSError):
        list(open_table(path).rows(["note"]))

    asked = []
    formatted = Dataset.with_format
    monkeypatch.setattr(
        Dataset, "with_format", lambda data, *args: asked.append(data.column_names) or formatted(data, *args)
    )
    assert read(Dataset.from_list(ROWS)) == EXPECTED
    assert asked == [["id", "text"]]
