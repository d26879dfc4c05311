# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A judge's verdicts on disk: hashed questions and one letter each, nothing in clear."""

import hmac
import os
import secrets
import sqlite3
import warnings
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path


class VerdictCache:
    """
    Verdicts by key in an SQLite file, which threads and processes may use at once.

    A cache that cannot be read or written costs requests, no results: then it warns.

    The file has a random salt, without which nobody can tell which keys are in it.

    Args:
        path (`str` or `os.PathLike`): The file; made, with its folder, if it is not there, for its owner only.

    Raises:
        ValueError: The file is not such a cache.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(self.path, os.O_CREAT, 0o600))  # SQLite would let others read it
            with closing(self._connect()) as database, database:
                database.execute("CREATE TABLE IF NOT EXISTS verdicts (key BLOB PRIMARY KEY, verdict TEXT NOT NULL)")
                database.execute("SELECT key, verdict FROM verdicts LIMIT 1")
                database.execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BLOB NOT NULL)")
                # Of processes that start at once the first one's salt stays, and all read that one.
                database.execute("INSERT OR IGNORE INTO meta VALUES ('salt', ?)", (secrets.token_bytes(32),))
                (self._salt,) = database.execute("SELECT value FROM meta WHERE name = 'salt'").fetchone()
        except (OSError, sqlite3.Error) as error:
            raise ValueError(
                f"`cache_path` {self.path} cannot be used as a cache: {error}. Remove the file, or name another."
            ) from None

    def read(self, keys: Iterable[bytes]) -> dict[bytes, str]:
        """The verdicts that are known among `keys`."""
        found = {}
        try:
            with closing(self._connect()) as database:
                for key in keys:
                    salted = (self._salted(key),)
                    row = database.execute("SELECT verdict FROM verdicts WHERE key = ?", salted).fetchone()
                    if row is not None:
                        found[key] = row[0]
        except sqlite3.Error as error:
            warnings.warn(f"The judge's cache {self.path} could not be read: {error}", stacklevel=2)
        return found

    def write(self, key: bytes, verdict: str) -> None:
        """Keep a verdict. The first one stays, so that processes that asked the same at once agree from then on."""
        try:
            with closing(self._connect()) as database, database:
                database.execute("INSERT OR IGNORE INTO verdicts VALUES (?, ?)", (self._salted(key), verdict))
        except sqlite3.Error as error:
            warnings.warn(f"The judge's cache {self.path} could not be written: {error}", stacklevel=2)

    def _salted(self, key: bytes) -> bytes:
        return hmac.digest(self._salt, key, "sha256")

    def _connect(self) -> sqlite3.Connection:
        # A connection for each use: one that is kept open may not cross a fork or a thread.
        return sqlite3.connect(self.path, timeout=60)
