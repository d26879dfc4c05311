# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What a conversion read, dropped and wrote: counts, never a value."""

from __future__ import annotations

from collections import Counter
from typing import Any


class Report:
    """
    The ledger of one conversion. Nothing but names and counts goes in, so it can be printed and kept anywhere.

    Units are plural nouns and go from wide to narrow (people, conversations, turns, pairs): of each, what was read
    equals what was kept and what was dropped, and the rows written are what was kept of the last one.

    Args:
        title (`str`): What was converted to what.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self.units: dict[str, int] = {}
        self.drops: dict[str, Counter[str]] = {}
        self.notes: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()

    def read(self, unit: str, count: int = 1) -> None:
        """Count what was read."""
        self.units[unit] = self.units.get(unit, 0) + int(count)

    def drop(self, unit: str, reason: str, count: int = 1) -> None:
        """Count what was read and left out, and why."""
        if count:
            self.drops.setdefault(unit, Counter())[reason] += int(count)

    def kept(self, unit: str) -> int:
        """What was read of a unit and not dropped."""
        return self.units.get(unit, 0) - sum(self.drops.get(unit, Counter()).values())

    def note(self, what: str, count: int = 1) -> None:
        """Count something that was changed and not dropped."""
        if count:
            self.notes[what] += int(count)

    def wrote(self, split: str, count: int) -> None:
        """Count rows that were written."""
        self.rows[split] += int(count)

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        units = {
            unit: {"read": count, "kept": self.kept(unit), "dropped": dict(self.drops.get(unit, {}))}
            for unit, count in self.units.items()
        }
        return {"title": self.title, "units": units, "notes": dict(self.notes), "rows": dict(self.rows)}

    def __str__(self) -> str:
        lines: list[tuple[str, int]] = []
        for unit, count in self.units.items():
            lines.append((f"{unit} read", count))
            lines += [(f"  dropped: {reason}", -dropped) for reason, dropped in self.drops.get(unit, {}).items()]
            lines.append((f"{unit} kept", self.kept(unit)))
        lines += [(f"note: {what}", count) for what, count in self.notes.items()]
        lines += [(f"rows of split {split}", count) for split, count in self.rows.items()]
        width = max((len(label) for label, _ in lines), default=0)
        return "\n".join([self.title, *(f"  {label:<{width}}  {count:>13,}" for label, count in lines)])
