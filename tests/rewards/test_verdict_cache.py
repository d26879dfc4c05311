# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import hashlib
import sqlite3
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


def test_many_writers_at_once_lose_nothing(tmp_path):
    caches = [VerdictCache(tmp_path / "verdicts.sqlite") for _ in range(8)]  # as each process has its own

    def write(worker: int) -> None:
        for number in range(20):
            caches[worker].write(key(100 * worker + number), "ABC"[number % 3])

    threads = [threading.Thread(target=write, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = [key(100 * worker + number) for worker in range(8) for number in range(20)]
    assert caches[0].read(keys) == dict(zip(keys, [*"ABCABCABCABCABCABCAB"] * 8, strict=True))


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
