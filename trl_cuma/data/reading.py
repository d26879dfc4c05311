# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Tables of a published data set, from the Hub or a local copy, row by row and only the columns asked for."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
ROWS_PER_READ = 1000
CSV_MISSING = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"]
    + ["<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"]
)
"""Cells of a CSV file that say that there is none: pandas' markers, by which the Hub's data sets are read, too."""
CSV_CELL = 2**31 - 1  # characters; the module's own limit of 131,072 is less than a long answer
NO_TABLE = ("dataset_info.json", "dataset_infos.json", "state.json")  # what `datasets` writes beside the data

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SHARD = re.compile(r"(?:^|[-_])\d+(?:-of-\d+)?$")  # "train-00000-of-00002", "0000"


@dataclass(frozen=True, slots=True)
class Row:
    """
    One row of a table. Its errors name file, row and column, never what the cell holds.

    Args:
        file (`str`): The file, or the id of the data set.
        number (`int`): From 1: the line of a JSON Lines file, else the row without the header.
        cells (`dict[str, Any]`): By column; `"religion.simplified"` is an entry of the nested column `religion`.
    """

    file: str
    number: int
    cells: dict[str, Any]

    def error(self, column: str, problem: str) -> ValueError:
        """The error for a cell that is not as it should be."""
        return ValueError(f"{self.file}, row {self.number}, column `{column}`: {problem}")

    def checked_text(self, column: str, value: Any) -> str | None:
        """`value` without outer blanks; `None` where it is missing or blank."""
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        if not isinstance(value, str):
            raise self.error(column, f"expected text, got {type(value).__name__}.")
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise self.error(column, "has half of a surrogate pair, which is no text.") from None
        return value.strip() or None

    def text(self, column: str) -> str | None:
        """The cell as text without outer blanks; `None` where it is missing or blank."""
        return self.checked_text(column, self.cells[column])

    def identifier(self, column: str) -> str:
        """The cell as an id: a text or a whole number."""
        value = self.cells[column]
        if isinstance(value, float) and value.is_integer():  # integers of a column that has gaps elsewhere
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        text = self.checked_text(column, value)
        if text is None:
            raise self.error(column, "is missing.")
        return text

    def flag(self, column: str) -> bool:
        """The cell as true or false, also written as 1 or 0; a missing one is false."""
        value = self.cells[column]
        if isinstance(value, int | float) and value in (0, 1):
            return bool(value)
        text = (self.checked_text(column, value) or "false").lower()
        if text not in ("true", "false", "1", "0", "1.0", "0.0"):
            raise self.error(column, "expected true or false, got another text.")
        return text in ("true", "1", "1.0")


class Table:
    """
    A table that can be read as often as needed.

    Args:
        pieces (`Sequence[Dataset | Path]`): Data sets and files, one after the other.
        name (`str`): What errors call a data set; files go by their path.
    """

    def __init__(self, pieces: Sequence[Dataset | Path], name: str) -> None:
        self.pieces = list(pieces)
        self.name = name

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """
        The rows, with these columns and no other.

        Raises:
            `ValueError`: A column is missing, or a row is no row.
        """
        for piece in self.pieces:
            file = str(piece) if isinstance(piece, Path) else self.name
            for number, cells in _read(piece, file, columns):
                yield Row(file, number, cells)


def open_table(
    source: str | os.PathLike[str] | Dataset | DatasetDict, *, config: str | None = None, split: str | None = None
) -> Table:
    """
    Open a table.

    Args:
        source (`str`, `PathLike`, `Dataset` or `DatasetDict`): A `.parquet`, `.jsonl`, `.json` or `.csv` file; a
            folder of such files; what `save_to_disk` wrote; the id of a data set on the Hub (`owner/name`); or a
            loaded data set.
        config (`str`, *optional*): The configuration on the Hub; of a folder, the files that have this word in their
            name or in a folder's.
        split (`str`, *optional*): The split on the Hub or of a `DatasetDict`, "train" if not given. Of a folder, the
            files that have this word in their name or in a folder's; if not given, those of "train", or else the only
            file, which may be in several numbered pieces. A file or a `Dataset` is taken whole.

    Raises:
        `FileNotFoundError`: There is nothing at `source`, or no file in the folder.
        `OSError`: The data set could not be loaded from the Hub.
        `ValueError`: The folder has no such split, or several files that could be meant; or the file is of none of
            these kinds.
    """
    if isinstance(source, DatasetDict):
        return Table([_split_of(source, split, "the data set")], "the data set")
    if isinstance(source, Dataset):
        return Table([source], "the data set")
    path = Path(source)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} is none of {', '.join(SUFFIXES)}. Name such a file.")
        return Table([path], str(path))
    if path.is_dir():
        return _open_folder(path, config, split)
    if path.suffix not in SUFFIXES and isinstance(source, str) and _HUB_ID.fullmatch(source):
        try:
            data = load_dataset(source, config, split=split or "train")
        except (OSError, ValueError) as error:
            kind = next(each for each in (ValueError, FileNotFoundError, OSError) if isinstance(error, each))
            raise kind(f"{source} is no file or folder here, and could not be loaded from the Hub: {error}") from error
        return Table([data], " ".join(filter(None, [source, config])))
    raise FileNotFoundError(
        f"{source} is neither a file, nor a folder, nor the id of a data set on the Hub (owner/name)."
    )


def _split_of(data: DatasetDict, split: str | None, name: str) -> Dataset:
    if (split or "train") not in data:
        raise ValueError(f"{name} has no split {split or 'train'!r}, only {list(data)}. Name one of these.")
    return data[split or "train"]


def _open_folder(folder: Path, config: str | None, split: str | None) -> Table:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        data = load_from_disk(str(folder))
        if isinstance(data, DatasetDict):
            data = _split_of(data, split, str(folder))
        return Table([data], str(folder))
    there = sorted(
        path.relative_to(folder) for path in folder.rglob("*") if path.suffix in SUFFIXES and path.name not in NO_TABLE
    )
    there = [path for path in there if not any(part.startswith(".") for part in path.parts)]
    if not there:
        raise FileNotFoundError(f"{folder} holds no file of {', '.join(SUFFIXES)}.")
    files = there
    for name, word in (("config", config), ("split", split)):
        files = [path for path in files if word is None or _has_word(path, word)]
        if not files:
            raise ValueError(f"{folder} has no file of {name} {word!r}, only {_listed(there)}. Name one of these.")
    if split is None:
        files = [path for path in files if _has_word(path, "train")] or files
    if len({(path.parent, _SHARD.sub("", path.stem), path.suffix) for path in files}) > 1:
        raise ValueError(f"{folder} holds several files that could be meant: {_listed(files)}. Name one, or a split.")
    return Table([folder / path for path in files], str(folder))


def _has_word(path: Path, word: str) -> bool:
    """Whether a folder or the file has this word in its name: "train" in "default/train/0000" and "train-0", too."""
    between = re.compile(rf"(?:^|[-_.]){re.escape(word)}(?:$|[-_.])")
    return any(between.search(part) for part in (*path.parent.parts, path.stem))


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths[:10])) + (f" and {len(paths) - 10} more" if len(paths) > 10 else "")


def _read(piece: Dataset | Path, file: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    top = list(dict.fromkeys(column.split(".")[0] for column in columns))
    if isinstance(piece, Dataset):
        _check_columns(file, top, piece.column_names)
        batches = piece.select_columns(top).with_format("arrow").iter(ROWS_PER_READ)
        return _arrow_rows(batches, file, columns)
    if piece.suffix == ".parquet":
        return _arrow_rows(_parquet_batches(piece, file, columns, top), file, columns)
    if piece.suffix == ".csv":
        return _csv_rows(piece, file, columns)
    return _json_rows(piece, file, columns)


def _check_columns(file: str, columns: Iterable[str], there: Iterable[str]) -> None:
    missing = sorted(set(columns) - set(there))
    if missing:
        raise ValueError(
            f"{file}, row 1, column `{missing[0]}`: there is no such column ({len(missing)} are missing)."
        )


def _parquet_batches(path: Path, file: str, columns: Sequence[str], top: Sequence[str]) -> Iterator[pa.Table]:
    try:
        parquet = pq.ParquetFile(path)
    except pa.ArrowInvalid:
        raise ValueError(f"{file} is no Parquet file.") from None
    with parquet:
        _check_columns(file, top, parquet.schema_arrow.names)
        # Of a struct, the parts asked for alone; JSON in a text has no parts.
        is_struct = {field.name: pa.types.is_struct(field.type) for field in parquet.schema_arrow}
        named = [column if is_struct[column.split(".")[0]] else column.split(".")[0] for column in columns]
        for batch in parquet.iter_batches(ROWS_PER_READ, columns=named):
            yield pa.Table.from_batches([batch])


def _arrow_rows(
    batches: Iterable[pa.Table], file: str, columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for batch in batches:
        types = {field.name: field.type for field in batch.schema}
        for record in batch.to_pylist():
            number += 1
            try:
                record = {name: _decoded(cell, types[name]) for name, cell in record.items()}
            except ValueError:
                raise ValueError(f"{file}, row {number}: a cell of a JSON column is no JSON.") from None
            yield number, _picked(record, file, number, columns)


def _decoded(cell: Any, kind: pa.DataType) -> Any:
    """A cell with what is JSON in it decoded: so `datasets` keeps objects that have not all the same keys."""
    if cell is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(cell)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_decoded(entry, kind.value_type) for entry in cell]
    if pa.types.is_struct(kind):
        return {field.name: _decoded(cell.get(field.name), field.type) for field in kind}
    return cell


def _csv_rows(path: Path, file: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    csv.field_size_limit(CSV_CELL)  # of the whole process: the module has no other
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            _check_columns(file, columns, header)
            places = [(column, header.index(column)) for column in columns]
            for number, cells in enumerate(filter(None, reader), start=1):
                if len(cells) != len(header):
                    raise ValueError(f"{file}, row {number}: {len(cells)} cells, but {len(header)} in the header.")
                texts = ((column, cells[place]) for column, place in places)
                yield number, {column: None if text in CSV_MISSING else text for column, text in texts}
        except (csv.Error, UnicodeDecodeError):
            raise ValueError(f"{file}, row {number + 1}: is no row of CSV in UTF-8.") from None


def _json_rows(path: Path, file: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, record in _json_records(path, file):
        if not isinstance(record, dict):
            raise ValueError(f"{file}, row {number}: expected an object, got {type(record).__name__}.")
        yield number, _picked(record, file, number, columns)


def _picked(record: dict[str, Any], file: str, number: int, columns: Sequence[str]) -> dict[str, Any]:
    """The cells of these columns, with the parts of nested ones."""
    cells = {}
    for column in columns:
        cell: Any = record
        for key in column.split("."):
            if cell is None:  # a nested column that is null
                break
            if not isinstance(cell, dict) or key not in cell:
                raise ValueError(f"{file}, row {number}, column `{column}`: there is no such column in this row.")
            cell = cell[key]
        cells[column] = cell
    return cells


def _json_records(path: Path, file: str) -> Iterator[tuple[int, Any]]:
    """The objects of a JSON Lines file, or of one array."""
    # Bytes, cut at \n alone: a text may hold other characters that end a line.
    with path.open("rb") as stream:
        is_array = path.suffix == ".json" and stream.read(4096).lstrip()[:1] == b"["
        stream.seek(0)
        if is_array:
            try:
                records = json.loads(stream.read())
            except ValueError as error:
                raise ValueError(f"{file}: is no JSON ({_where(error)}).") from None
            yield from enumerate(records, start=1)
            return
        for number, line in enumerate(stream, start=1):
            if line.strip():
                try:
                    record = json.loads(line.rstrip())
                except ValueError as error:
                    raise ValueError(f"{file}, row {number}: is no JSON ({_where(error)}).") from None
                yield number, record


def _where(error: ValueError) -> str:
    """Where JSON is broken, without the text around it."""
    if isinstance(error, json.JSONDecodeError):
        return f"line {error.lineno}, character {error.colno} of it"
    return "it is not UTF-8"
