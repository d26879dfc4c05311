# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Generated answers on disk, so that a run that was killed goes on where it was; and what tells two models apart."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

# What a configuration says of where a model came from, not of what it computes.
_ORIGIN = {"_name_or_path", "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
_ORIGIN |= {"transformers_version"}


class Answer(NamedTuple):
    """
    Attributes:
        text (`str`): What the model wrote, without special tokens.
        num_tokens (`int`): Its length in tokens, with the one that ends it.
        finished (`bool`): Whether the model ended it, rather than `max_new_tokens`.
    """

    text: str
    num_tokens: int
    finished: bool


class AnswerStore:
    """
    Answers by key in an SQLite file, which processes may use at once. Made for its owner only.

    A batch is there as a whole or not at all, also after a kill or a loss of power while it was written: SQLite rolls
    the half of it back when the file is next opened.

    Answers are kept in clear, prompts and profiles only as a hash, together with everything else that decides the
    answer. That is no anonymisation: an answer may repeat what its prompt said, and who has the file *and* the model
    can try prompts and profiles that they guess. Protect the file as you protect the data.

    Args:
        path (`str` or `os.PathLike`): The file; made, with its folder, if it is not there.

    Raises:
        ValueError: The file is not such a store, or cannot be written.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self.path, os.O_CREAT, 0o600))  # SQLite would let others read it
            with closing(self._connect()) as database, database:
                database.execute(
                    "CREATE TABLE IF NOT EXISTS answers "
                    "(key BLOB PRIMARY KEY, text TEXT NOT NULL, tokens INTEGER NOT NULL, finished INTEGER NOT NULL)"
                )
                database.execute("SELECT key, text, tokens, finished FROM answers LIMIT 1")
        except (OSError, sqlite3.Error) as error:
            raise ValueError(
                f"`cache_path` {self.path} cannot be used to keep answers: {error}. Remove the file, or name another."
            ) from None

    def read(self, keys: Iterable[bytes]) -> dict[bytes, Answer]:
        """The answers that are known among `keys`."""
        found = {}
        with closing(self._connect()) as database:
            for key in keys:
                query = "SELECT text, tokens, finished FROM answers WHERE key = ?"
                row = database.execute(query, (key,)).fetchone()
                if row is not None:
                    found[key] = Answer(row[0], row[1], bool(row[2]))
        return found

    def write(self, answers: Mapping[bytes, Answer]) -> None:
        """Keep a batch in one transaction. What is there already stays."""
        with closing(self._connect()) as database, database:
            database.executemany(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?)", ((key, *answers[key]) for key in answers)
            )

    def _connect(self) -> sqlite3.Connection:
        # A connection for each use: one that is kept open may not cross a fork. Others' transactions are waited for.
        return sqlite3.connect(self.path, timeout=60)


def model_fingerprint(model: torch.nn.Module) -> str:
    """
    A hash of all that a model computes with: every weight, its configuration, and its adapters with their settings and
    which of them are active. Where the weights were loaded from has no part in it.

    Reads each weight once: some seconds for a model of 8 billion parameters.

    Raises:
        ValueError: A weight is not there to be read (offloaded to disk).
    """
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        for part in _tensors(value):
            if part.is_meta:
                raise ValueError(
                    f"The weight `{name}` is not in memory, so the model has no fingerprint. Load the model without "
                    "offloading to disk, or pass a `fingerprint` of your own that changes whenever the model does."
                )
            digest.update(f"{name} {part.dtype} {tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    facts = {"config": _settings(getattr(model, "config", None))}
    if isinstance(model, PeftModel):
        facts["adapters"] = {name: _settings(config) for name, config in model.peft_config.items()}
    facts["layers"] = [
        [name, module.disable_adapters, module.active_adapters]
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    digest.update(json.dumps(facts, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()


def _settings(config: Any) -> dict[str, Any] | None:
    if config is None:
        return None
    return {name: value for name, value in config.to_dict().items() if name not in _ORIGIN}


def _plain(value: Any) -> Any:
    # A set's order changes from process to process.
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The plain tensors of an entry of a state dict: a quantized weight holds several."""
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter) and hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            for name in names:
                yield from _tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, Mapping):
        for name in sorted(value, key=str):
            yield from _tensors(value[name])
