# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What the converters make of rows written by hand, kept in files that a reader can check: one row per line."""

import json
import os
from pathlib import Path


def check_golden(name, made):
    """
    Compare with `golden/<name>.json`; with `CUMA_UPDATE_GOLDEN=1`, write it anew first.

    Args:
        name: Of the file.
        made: By task, the rows by split, and the report as a mapping.
    """
    path = Path(__file__).parent / "golden" / f"{name}.json"
    if os.environ.get("CUMA_UPDATE_GOLDEN"):
        tasks = [f" {json.dumps(task)}: {{\n{_parts(parts)}\n }}" for task, parts in made.items()]
        path.write_text("{\n" + ",\n".join(tasks) + "\n}\n", encoding="utf-8")
    assert made == json.loads(path.read_text(encoding="utf-8"))


def _parts(parts):
    return ",\n".join(f"  {json.dumps(name)}: {_lines(value)}" for name, value in parts.items())


def _lines(value):
    if not isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return "[\n   " + ",\n   ".join(json.dumps(row, ensure_ascii=False) for row in value) + "\n  ]"
