# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""examples/serve.py: what it refuses to start with, and that it serves."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from openai import APIConnectionError, OpenAI

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "serve.py"
KENYA = {"country": "Kenya", "age": "18"}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("serve", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name an adapter with `--adapter`"),
        (["--adapter", "./nowhere"], "`--adapter` is './nowhere', and there is no such file or folder"),
        (["--host", "0.0.0.0"], "`--host` is '0.0.0.0', which other machines can reach, and there is no key"),
        (["--host", "::"], "which other machines can reach"),
        (["--host", "example.org"], "which other machines can reach"),
        (["--max_batch", "0"], "`max_batch` is 0, expected at least 1"),
        (["--wait_ms", "-1"], "`wait_ms` is -1.0"),
    ],
)
def test_what_it_cannot_start_with(example, saved_adapter, monkeypatch, arguments, message):
    monkeypatch.delenv("CUMA_API_KEY", raising=False)
    pytest.importorskip("uvicorn")
    if arguments and "--adapter" not in arguments:
        arguments = ["--adapter", str(saved_adapter()), *arguments]
    with pytest.raises((ValueError, OSError)) as caught:
        example.main(arguments)
    assert message in str(caught.value)


def test_a_key_must_be_one(example, saved_adapter, monkeypatch):
    pytest.importorskip("uvicorn")
    monkeypatch.setenv("CUMA_API_KEY", "")
    with pytest.raises(ValueError, match="The API key is empty"):
        example.main(["--adapter", str(saved_adapter()), "--host", "0.0.0.0"])


@pytest.mark.slow  # a fresh process imports everything
def test_it_serves(saved_adapter):
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUMA_API_KEY": "geheim"}
    command = [sys.executable, str(SCRIPT), "--adapter", str(saved_adapter()), "--port", str(port)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="geheim", max_retries=0)
        for _ in range(600):
            try:
                (model,) = client.models.list()
                break
            except APIConnectionError:
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.2)
        assert model.id == "adapter"
        asked = [{"role": "user", "content": "Tea or coffee ?"}]
        said = client.chat.completions.create(model="adapter", messages=asked, metadata=KENYA, max_tokens=4)
        assert said.usage.completion_tokens == 4
    finally:
        process.terminate()
        shown = process.communicate(timeout=60)[0]
    assert f"Serving 'adapter' on http://127.0.0.1:{port}/v1, with a key." in shown
    assert "Kenya" not in shown and "coffee" not in shown and "geheim" not in shown
