# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
PEFT's own tests: where they come from, and how they are pointed at another PEFT method.

PEFT's wheel has no tests, its sdist does. The sdist of the installed version is downloaded by pip, once, into a cache
folder. Environment variables:

- `CUMA_PEFT_SDIST`: an unpacked sdist to use instead (the folder that holds `tests`), for a machine without network.
- `CUMA_PEFT_CACHE`: the cache folder (default: `~/.cache/trl_cuma/peft-sdist`).
"""

import functools
import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest

# Not `tests`, which is the name of our own folder.
PACKAGE = "peft_upstream_tests"

# For the summary: class → its tests that would do nothing for the method under test, with the reason.
left_out: dict[str, dict[str, str]] = {}


class UpstreamUnavailableError(Exception):
    """PEFT's tests can't be had here; the message says why."""


def sdist_folder() -> Path:
    """
    The unpacked sdist of the installed PEFT, downloaded if need be.

    Raises:
        UpstreamUnavailableError: if pip can't download it, e.g. without network.
        ValueError: if `CUMA_PEFT_SDIST` names something else.
    """
    if given := os.environ.get("CUMA_PEFT_SDIST"):
        info = Path(given, "PKG-INFO")
        if not info.is_file() or f"\nVersion: {peft.__version__}\n" not in info.read_text():
            raise ValueError(
                f"CUMA_PEFT_SDIST={given} is not the unpacked sdist of PEFT {peft.__version__}, which is installed. "
                "Name the folder that holds its PKG-INFO and tests, or unset the variable to download it."
            )
        return Path(given)
    cache = Path(os.environ.get("CUMA_PEFT_CACHE", Path.home() / ".cache" / "trl_cuma" / "peft-sdist"))
    folder = cache / f"peft-{peft.__version__}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        # pip reads the package's metadata even for a download: with the setuptools that torch brings along
        # (`--no-build-isolation`), so that nothing but PEFT is downloaded.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", "peft", "--retries", "1", "--dest", work, f"peft=={peft.__version__}"]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise UpstreamUnavailableError(f"pip could not download PEFT {peft.__version__}'s sdist: {lines[-1]}")
        (archive,) = Path(work).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(work, filter="data")
        try:
            (Path(work) / folder.name).rename(folder)  # atomic: another process sees all of it or nothing
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


@functools.cache
def _open_package() -> str | None:
    """Make the sdist's `tests` importable as `PACKAGE`; returns what is wrong, if anything."""
    try:
        folder = sdist_folder() / "tests"
    except UpstreamUnavailableError as error:
        return str(error)
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    pytest.register_assert_rewrite(PACKAGE)
    sys.modules[PACKAGE] = package
    return None


def upstream_module(name: str) -> ModuleType:
    """
    Import a module of PEFT's tests, e.g. `"test_config"`. Called while a test module is collected: where PEFT's tests
    or a package that they need are missing, that module is skipped, with the reason.
    """
    problem = _open_package()
    if problem is None:
        try:
            return importlib.import_module(f"{PACKAGE}.{name}")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in ("peft", PACKAGE):
                raise
            problem = f"PEFT's tests need the package {error.name}: pip install 'trl_cuma[test]'"
    pytest.skip(problem, allow_module_level=True)


def reparametrize(
    cls: type,
    arguments: Mapping[str, Iterable[Any]],
    *,
    minimum: int,
    skip: Mapping[str, str] | None = None,
    leave_out: Mapping[str, str] | None = None,
    without: Mapping[str, Callable[[Any], bool]] | None = None,
    also: Iterable[str] = (),
    **namespace: Any,
) -> type:
    """
    A subclass of an upstream test class whose tests run on other arguments. Nothing upstream is changed.

    Tests that take none of `arguments` are about another method: the subclass doesn't have them.

    Args:
        cls (`type`): the upstream class.
        arguments (`Mapping`): argument names, as written in upstream's `parametrize`, → values.
        minimum (`int`): how many tests the class must have at least, so that a rename upstream can't empty it.
        skip (`Mapping`, *optional*): test → reason, for tests that apply to the method but can't run.
        leave_out (`Mapping`, *optional*): test → reason, for tests that would do nothing for the method under test.
        without (`Mapping`, *optional*): test → predicate on a case, for cases that would do nothing in that test.
        also (`Iterable`, *optional*): tests to keep though they take no arguments: they go through all methods.
        namespace: further attributes of the subclass.

    Raises:
        RuntimeError: if upstream no longer has what is named here, or too few tests remain.
    """
    skip, leave_out, without = dict(skip or {}), dict(leave_out or {}), dict(without or {})
    unused = {*arguments, *skip, *without, *also}
    tests: dict[str, Any] = {}
    for name in [name for name in dir(cls) if name.startswith("test_")]:
        function = getattr(cls, name)
        if name in also:
            unused.discard(name)
            tests[name] = function
            continue
        tests[name] = None  # hides the inherited test
        marks = list(getattr(function, "pytestmark", []))
        ours = [mark for mark in marks if mark.name == "parametrize" and mark.args[0] in arguments]
        unused -= {mark.args[0] for mark in ours}
        if not ours:
            continue
        unused.discard(name)
        if name in leave_out:
            left_out.setdefault(cls.__name__, {})[name] = leave_out[name]
            continue
        marks = [mark for mark in marks if mark not in ours]
        for mark in ours:
            cases = [case for case in arguments[mark.args[0]] if name not in without or not without[name](case)]
            marks.append(pytest.mark.parametrize(mark.args[0], cases).mark)
        if name in skip:
            marks.append(pytest.mark.skip(reason=skip[name]).mark)
        copy = types.FunctionType(
            function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
        )
        copy.__kwdefaults__ = function.__kwdefaults__
        copy.__dict__.update(function.__dict__, pytestmark=marks)
        tests[name] = copy
    if unused:
        raise RuntimeError(f"PEFT {peft.__version__}'s {cls.__name__} has no test or argument {sorted(unused)}.")
    count = sum(test is not None for test in tests.values())
    if count < minimum:
        raise RuntimeError(
            f"PEFT {peft.__version__}'s {cls.__name__} gives {count} tests for CuMA, but {minimum} were expected. "
            "Look for renamed tests or arguments."
        )
    return type(cls.__name__, (cls,), {**tests, **namespace})
