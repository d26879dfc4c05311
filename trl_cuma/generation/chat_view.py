# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""How answers are shown: growing side by side in a terminal, or one below the other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..demographics import DemographicProfile


class Plain:
    """One answer as it comes; of several, each with its label when all are there."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = labels
        self.texts = ["" for _ in labels]

    def add(self, row: int, text: str) -> None:
        """The next piece of an answer."""
        self.texts[row] += text
        if len(self.labels) == 1:
            print(text, end="", flush=True)

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if len(self.labels) == 1:
            if kind is None or self.texts[0]:
                print(flush=True)
        elif kind is None:
            blocks = (f"[{label}]\n{text}\n" for label, text in zip(self.labels, self.texts, strict=True))
            print("\n".join(blocks), flush=True)


class Columns:
    """A column for each profile. They grow in a live display of the terminal's height, and stay whole below it."""

    def __init__(self, labels: Sequence[str], console: Console) -> None:
        self.labels = labels
        self.texts = [Text() for _ in labels]
        self.console = console
        self.live = Live(console=console, transient=True, vertical_overflow="ellipsis", get_renderable=self._table)

    def add(self, row: int, text: str) -> None:
        """The next piece of an answer."""
        self.texts[row].append(text)

    def _table(self) -> Table:
        table = Table(expand=True, show_lines=False)
        for label in self.labels:
            table.add_column(Text(label), ratio=1, overflow="fold")
        table.add_row(*self.texts)
        return table

    def __enter__(self) -> Columns:
        self.live.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.live.stop()
        self.console.print(self._table())


def make_view(profiles: Sequence[Any], console: Console | None = None) -> Plain | Columns:
    """
    What shows the answers for `profiles`. Their values stand above the columns of a terminal, where they were typed;
    anything else may be a file, and gets the fields' names.
    """
    console = console or Console(file=sys.stdout)
    if len(profiles) > 1 and console.is_terminal:
        return Columns([_label(number, profile) for number, profile in enumerate(profiles, start=1)], console)
    return Plain([_label(number, profile, values=False) for number, profile in enumerate(profiles, start=1)])


def _label(number: int, value: Any, *, values: bool = True) -> str:
    profile = DemographicProfile.from_value(value)
    if values:
        what = ", ".join(f"{name}={text}" for name, text in profile.fields.items()) or profile.text
    else:
        what = ", ".join(sorted(profile.names)) or ("plain text" if profile.text else "")
    return f"profile {number}: {what}" if what else f"profile {number}"
