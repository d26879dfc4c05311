# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The stand-in of the Hub, and fresh processes that know no other: `huggingface_hub` reads `HF_ENDPOINT` at import."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .server import TOKEN, HubServer

HERE = Path(__file__).parent


class Published(NamedTuple):
    """What `publish.py` left: on the server, in its folder, and what it found out."""

    server: HubServer
    folder: Path
    found: dict[str, Any]


def refuse(method: str, path: str) -> tuple[int, str] | None:
    """Two repositories to which nothing can be written."""
    if path == "/api/models/org/refused/commit/main":
        return 403, "You don't have the rights to commit here."
    if path == "/org/full.git/info/lfs/objects/batch":
        return 403, "Your storage is full."
    return None


def run(script: str, server: HubServer, folder: Path) -> dict[str, Any]:
    """Run a script of this folder in a new process with an empty cache; it writes what it found into a JSON file."""
    environment = os.environ | {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # the stand-in speaks LFS
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(folder / f"{script}-home"),
        "HF_TOKEN": TOKEN,
        "PYTHONPATH": str(HERE.parents[1]),
        "CUDA_VISIBLE_DEVICES": "",
        "NO_PROXY": "*",
    }
    command = [sys.executable, str(HERE / script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / f"{script}.json").read_text())


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    server, folder = HubServer(), tmp_path_factory.mktemp("hub")
    server.fails = refuse
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Published(server, folder, run("publish.py", server, folder))
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def fetched(published: Published) -> dict[str, Any]:
    return run("fetch.py", published.server, published.folder)
