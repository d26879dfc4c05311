# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import hashlib
import os
import sqlite3
import stat
import threading

import pytest

from trl_cuma.rewards.verdict_cache import VerdictCache


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def test_a_verdict_is_found_again_and_the_first_one_stays(tmp_path):
    cache = VerdictCache(tmp_path / "a" / "b.sqlite")
    assert cache.read([key(1)]) == {}
    cache.write(key(1), "A")
    cache.write(key(1), "B")
    assert VerdictCache(tmp_path / "a" / "b.sqlite").read([key(1), key(2)]) == {key(1): "A"}


def test_many_threads_that_open_and_write_one_file_at_once_lose_nothing(tmp_path):
    start = threading.Barrier(8)

    def write(worker: int) -> None:
        start.wait(10)
        cache = VerdictCache(tmp_path / "verdicts.sqlite")  # each opens the new file: all get one salt
        for number in range(20):
            cache.write(key(100 * worker + number), "ABC"[number % 3])

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = [key(100 * worker + number) for worker in range(8) for number in range(20)]
    assert VerdictCache(tmp_path / "verdicts.sqlite").read(keys) == dict(
        zip(keys, [*"ABCABCABCABCABCABCAB"] * 8, strict=True)
    )


def test_a_new_file_is_its_owners_only(tmp_path):
    before = os.umask(0)  # keeps no permission back
    try:
        cache = VerdictCache(tmp_path / "verdicts.sqlite")
        cache.write(key(1), "A")
    finally:
        os.umask(before)
    assert stat.S_IMODE(cache.path.stat().st_mode) == 0o600


def test_keys_cannot_be_told_without_the_files_salt(tmp_path):
    stored = []
    for name in ("one.sqlite", "two.sqlite"):
        VerdictCache(tmp_path / name).write(key(1), "A")
        with sqlite3.connect(tmp_path / name) as database:
            stored += [row[0] for row in database.execute("SELECT key FROM verdicts")]
        database.close()
    assert len({*stored, key(1)}) == 3  # the same question: neither as it is, nor alike in both


def test_a_file_of_another_kind_is_refused_by_name_and_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("My notes. " * 200)
    with pytest.raises(ValueError, match="`cache_path` .*notes.txt cannot be used"):
        VerdictCache(path)
    assert path.read_text().startswith("My notes.")
    with sqlite3.connect(tmp_path / "other.sqlite") as database:
        database.execute("CREATE TABLE verdicts (id INTEGER)")
    database.close()
    with pytest.raises(ValueError, match="no such column"):
        VerdictCache(tmp_path / "other.sqlite")


def test_a_cache_that_breaks_on_the_way_warns_and_knows_nothing(tmp_path):
    cache = VerdictCache(tmp_path / "verdicts.sqlite")
    cache.path.write_bytes(b"x" * 5000)
    with pytest.warns(UserWarning, match="could not be written"):
        cache.write(key(1), "A")
    with pytest.warns(UserWarning, match="could not be read"):
        assert cache.read([key(1)]) == {}
