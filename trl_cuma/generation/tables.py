# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Tables that people write: of profiles, or of prompts. No error repeats what stands in them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any


def read_table(path: Path, option: str) -> list[dict[str, Any]]:
    """
    The rows of a .csv with a header, or of a .jsonl with an object on each line.

    Args:
        path (`Path`): The file.
        option (`str`): Which names it, for errors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of another kind, or a row can't be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`{option}` {path} is no file.")
    if path.suffix.lower() == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, strict=True))
        wrong = [number for number, row in enumerate(rows, 1) if None in row or None in row.values()]
        if wrong:
            raise ValueError(f"`{option}` {path}: row {wrong[0]} has more or fewer values than the header.")
        return rows
    if path.suffix.lower() != ".jsonl":
        raise ValueError(f"`{option}` {path} is neither a .csv nor a .jsonl.")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise ValueError(f"`{option}` {path}: line {number} is no JSON object.") from None
    return rows
