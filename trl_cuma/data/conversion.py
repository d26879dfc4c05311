# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""From a source's rows to TRL's columns: in memory, or streamed to a folder that `load_dataset` reads."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets.table import InMemoryTable

from .report import Report

MESSAGES = List({"role": Value("string"), "content": Value("string")})
"""The feature of a conversation's messages."""

TASK_COLUMNS = {
    "sft": ("prompt", "completion"),
    "dpo": ("prompt", "chosen", "rejected"),
    "choice": ("prompt", "completion"),
}
"""TRL's columns of each task, all conversational."""

REPORT = "report.json"
WRITTEN_BY = "trl-cuma prepare"
ROWS_PER_FILE = 2_000_000


def row_features(task: str, fields: Sequence[str], extra: Mapping[str, Any], messages: bool = False) -> Features:
    """
    The columns of a task, in the order of every converter.

    Args:
        task (`str`): A key of `TASK_COLUMNS`.
        fields (`Sequence[str]`): The profile's fields.
        extra (`Mapping[str, Any]`): What follows `demographic` and `person_id`: names and features.
        messages (`bool`): Whether SFT rows hold `messages` instead of `prompt` and `completion`.
    """
    columns = ("messages",) if messages else TASK_COLUMNS[task]
    return Features(
        dict.fromkeys(columns, MESSAGES)
        | {"demographic": {field: Value("string") for field in fields}, "person_id": Value("string")}
        | dict(extra)
    )


def check_task(task: str, tasks: Sequence[str], messages: bool) -> None:
    """Raise a `ValueError` for a task that the source doesn't have, or a format that the task doesn't have."""
    if task not in tasks:
        raise ValueError(f"`task` is {task!r}, expected one of {list(tasks)}.")
    if messages and task != "sft":
        raise ValueError(f"`messages` is for the task 'sft' only, not {task!r}. Leave it out.")


class Conversion:
    """
    A source that is ready to be converted. Nothing is read twice at once, and nothing is kept: each call reads anew.

    Args:
        features (`Features`): The rows' columns.
        batches (`Callable[[Report], Iterator[tuple[str, pa.Table]]]`): Yields pieces of a split, and counts what it
            reads and drops. Their texts may be dictionary-encoded, in all pieces alike.
        title (`str`): What is converted to what; the head of the report.
        splits (`Sequence[str]`): Splits that must get rows.
        license (`str`, *optional*): The source's terms, which also hold for what is made of it.

    Attributes:
        report (`Report`, *optional*): Of the last call.
    """

    def __init__(
        self,
        features: Features,
        batches: Callable[[Report], Iterator[tuple[str, pa.Table]]],
        title: str,
        splits: Sequence[str] = ("train",),
        license: str | None = None,
    ) -> None:
        self.features = features
        self.title = title
        self.splits = tuple(splits)
        self.license = license
        self.report: Report | None = None
        self._batches = batches

    def datasets(self) -> DatasetDict:
        """
        Convert in memory.

        Returns:
            `DatasetDict`: The splits that got rows.

        Raises:
            `ValueError`: A row of the source is malformed, or a split would be empty.
        """
        schema = self.features.arrow_schema
        tables: dict[str, list[pa.Table]] = {}
        for split, table in self._run():
            tables.setdefault(split, []).append(table.cast(schema))
        order = [*self.splits, *(name for name in tables if name not in self.splits)]
        made = {name: Dataset(InMemoryTable(pa.concat_tables(tables[name]))) for name in order}
        for dataset in made.values():
            dataset.info.license = self.license or ""
        return DatasetDict(made)

    def save(self, output: str | os.PathLike[str], *, overwrite: bool = False) -> Report:
        """
        Convert to a folder of Parquet files, which `load_dataset(output)` and every `dataset_name` read. Batch by
        batch, so that memory does not grow with the rows.

        The folder appears when it is whole. It is readable by its owner alone, since it holds profiles.

        Args:
            output (`str` or `PathLike`): A folder that is not there yet, or is empty.
            overwrite (`bool`, defaults to `False`): Replace what an earlier call wrote there.

        Returns:
            `Report`: Also in the folder, as `report.json`.

        Raises:
            `ValueError`: A row of the source is malformed, or a split would be empty. Nothing is written.
            `FileExistsError`: `output` is there: something else, or without `overwrite`. It stays as it is.
        """
        output = Path(output).expanduser().resolve()  # a link keeps pointing to where its data is
        _check_output(output, overwrite)
        new_parents = [parent for parent in output.parents if not parent.exists()]
        output.parent.mkdir(parents=True, exist_ok=True)
        # Beside the output, so that the rename stays within one file system. Made by mkdtemp: the owner's alone.
        staging = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-incomplete-"))
        try:
            with _Shards(staging / "data", self.features.arrow_schema) as shards:
                for split, table in self._run():
                    shards.write(split, table)
            assert self.report is not None
            report = {"written_by": WRITTEN_BY, "license": self.license} | self.report.to_dict()
            (staging / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            (staging / "README.md").write_text(_card(self.report, shards.splits, self.license), encoding="utf-8")
            _check_output(output, overwrite)
            _replace(output, staging)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            for parent in new_parents:
                parent.rmdir()
            raise
        return self.report

    def _run(self) -> Iterator[tuple[str, pa.Table]]:
        self.report = report = Report(self.title)
        for split, table in self._batches(report):
            if len(table):
                report.wrote(split, len(table))
                yield split, table
        empty = [name for name in self.splits if not report.rows[name]]
        if empty:
            raise ValueError(
                f"No row is left for the splits {empty}. A row is kept where its person and its prompt fall on the "
                f"same side: raise the shares, or split by one of the two. What was counted:\n{report}"
            )


class _Shards:
    """Parquet files of at most `ROWS_PER_FILE` rows or one batch more, named as the Hub names them."""

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder = folder
        self.schema = schema
        self.files: dict[str, list[Path]] = {}
        self.writers: dict[str, pq.ParquetWriter] = {}
        self.rows: dict[str, int] = {}

    @property
    def splits(self) -> list[str]:
        return list(self.files)

    def __enter__(self) -> _Shards:
        self.folder.mkdir()
        return self

    def __exit__(self, error: type[BaseException] | None, *details: Any) -> None:
        for writer in self.writers.values():
            writer.close()
        if error is not None:
            return
        for split, files in self.files.items():
            for index, path in enumerate(files):
                path.rename(self.folder / f"{split}-{index:05d}-of-{len(files):05d}.parquet")

    def write(self, split: str, table: pa.Table) -> None:
        if split not in self.writers:
            files = self.files.setdefault(split, [])
            files.append(self.folder / f"{split}-{len(files):05d}.parquet")
            # Texts are written as the dictionaries that they come in, and read as texts.
            self.writers[split] = pq.ParquetWriter(files[-1], table.schema, compression="zstd", store_schema=False)
            self.writers[split].add_key_value_metadata(self.schema.metadata)
            self.rows[split] = 0
        self.writers[split].write_table(table)
        self.rows[split] += len(table)
        if self.rows[split] >= ROWS_PER_FILE:
            self.writers.pop(split).close()


def _check_output(output: Path, overwrite: bool) -> None:
    if output == Path.cwd():
        raise FileExistsError(f"{output} is the folder that this runs in. Name another folder.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not _is_ours(output):
        raise FileExistsError(f"{output} is there and is no data set of `trl-cuma prepare`. Name another folder.")
    if not overwrite:
        raise FileExistsError(f"{output} holds a prepared data set. Name another folder, or say `overwrite`.")


def _is_ours(output: Path) -> bool:
    try:
        return json.loads((output / REPORT).read_text(encoding="utf-8")).get("written_by") == WRITTEN_BY
    except (OSError, ValueError, AttributeError):
        return False


def _replace(output: Path, staging: Path) -> None:
    """Put `staging` in the place of `output`; where that fails, what was there stays."""
    earlier = staging.with_name(f"{staging.name}-earlier")
    if output.exists():
        output.rename(earlier)
    try:
        staging.rename(output)
    except BaseException:
        if earlier.exists():
            earlier.rename(output)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _card(report: Report, splits: Sequence[str], license: str | None) -> str:
    files = "\n".join(f"  - split: {name}\n    path: data/{name}-*.parquet" for name in splits)
    terms = f" Terms: {license}." if license else ""
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}\n---\n\n# {report.title}\n\n"
        "Written by `trl-cuma prepare`. It holds people's answers and demographic profiles under the terms of their\n"
        f"source: keep it to those who may have them.{terms}\n\n```\n{report}\n```\n"
    )
