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
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


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
        """The cell as true or false; a missing one is false."""
        value = self.cells[column]
        if isinstance(value, bool):
            return value
        text = (self.checked_text(column, value) or "false").lower()
        if text not in ("true", "false"):
            raise self.error(column, "expected true or false, got another text.")
        return text == "true"


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


def open_table(source: str | os.PathLike[str] | Dataset, *, config: str | None = None, split: str = "train") -> Table:
    """
    Open a table.

    Args:
        source (`str`, `PathLike` or `Dataset`): A `.parquet`, `.jsonl`, `.json` or `.csv` file; a folder of such files
            of one kind; what `save_to_disk` wrote; the id of a data set on the Hub (`owner/name`); or a loaded data
            set.
        config (`str`, *optional*): The configuration on the Hub.
        split (`str`, defaults to `"train"`): The split on the Hub or of a `DatasetDict` on disk. Of a folder of files,
            those whose name begins with it, and all where there are none.

    Raises:
        `FileNotFoundError`: There is nothing at `source`, or no file in the folder.
        `ValueError`: The folder's files are not of one kind, or the file is of none of these kinds.
    """
    if isinstance(source, Dataset):
        return Table([source], "the data set")
    path = Path(source)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path} is none of {', '.join(SUFFIXES)}. Name such a file.")
        return Table([path], str(path))
    if path.is_dir():
        return _open_folder(path, split)
    if path.suffix not in SUFFIXES and isinstance(source, str) and _HUB_ID.fullmatch(source):
        return Table([load_dataset(source, config, split=split)], " ".join(filter(None, [source, config])))
    raise FileNotFoundError(
        f"{source} is neither a file, nor a folder, nor the id of a data set on the Hub (owner/name)."
    )


def _open_folder(folder: Path, split: str) -> Table:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        data = load_from_disk(str(folder))
        if isinstance(data, DatasetDict):
            if split not in data:
                raise ValueError(f"{folder} has no split {split!r}, only {list(data)}. Name one of these.")
            data = data[split]
        return Table([data], str(folder))
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in SUFFIXES and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    files = [path for path in files if path.name.startswith(split)] or files
    if not files:
        raise FileNotFoundError(f"{folder} holds no file of {', '.join(SUFFIXES)}.")
    kinds = sorted({path.suffix for path in files})
    if len(kinds) > 1:
        raise ValueError(f"{folder} holds files of several kinds ({', '.join(kinds)}). Name the file that is meant.")
    return Table(files, str(folder))


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
        for batch in parquet.iter_batches(ROWS_PER_READ, columns=list(columns)):
            yield pa.Table.from_batches([batch])


def _arrow_rows(
    batches: Iterable[pa.Table], file: str, columns: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for batch in batches:
        if any("." in column for column in columns):
            batch = batch.flatten()
        _check_columns(file, columns, batch.column_names)
        for cells in batch.select(list(columns)).to_pylist():
            number += 1
            yield number, cells


def _csv_rows(path: Path, file: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with path.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            _check_columns(file, columns, header)
            places = [(column, header.index(column)) for column in columns]
            for number, cells in enumerate(filter(None, reader), start=1):
                if len(cells) != len(header):
                    raise ValueError(f"{file}, row {number}: {len(cells)} cells, but {len(header)} in the header.")
                yield number, {column: cells[place] for column, place in places}
        except (csv.Error, UnicodeDecodeError):
            raise ValueError(f"{file}, row {number + 1}: is no row of CSV in UTF-8.") from None


def _json_rows(path: Path, file: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, record in _json_records(path, file):
        if not isinstance(record, dict):
            raise ValueError(f"{file}, row {number}: expected an object, got {type(record).__name__}.")
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
        yield number, cells


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
