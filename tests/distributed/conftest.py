# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
Training in several processes, under every engine: `python -m pytest tests/distributed -q`, or a part of it, in three
minutes: `python -m pytest tests/distributed -q -m slice`.

Each engine is launched once, with all cells that the chosen tests read (their parameters `launch` and `cell`), when
the first of them needs it; the others read the files that it left. It runs only where this folder (or a file in it) is
named on the command line.
"""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from ..naming import is_named
from .cells import CELLS, CHECKPOINTING, ENGINES, reference
from .engines import LAUNCHES, launch

HERE = Path(__file__).parent
PLAN = pytest.StashKey[dict[str, list[str]]]()
Read = Callable[..., list[dict[str, Any]]]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slice: the part of tests/distributed that runs each time")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if is_named(config, HERE) else True


def pytest_collection_finish(session: pytest.Session) -> None:
    """Which cells each launch has to run, of those tests that were chosen."""
    wanted: dict[str, set[str]] = {}
    for item in session.items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if HERE in item.path.parents and "cell" in parameters:
            name, cell = parameters["launch"], parameters["cell"]
            wanted.setdefault(name, set()).add(cell)
            wanted.setdefault("single", set()).add(reference(cell))
            if CELLS[cell].resume is not None:  # what is resumed has to be trained
                wanted.setdefault(_source(cell) or name, set()).add("sft-none")
    session.config.stash[PLAN] = {name: [cell for cell in CELLS if cell in cells] for name, cells in wanted.items()}


def _source(cell: str) -> str | None:
    """The launch from whose checkpoint a cell of another launch goes on."""
    before = CELLS[cell].resume or ""
    return before.split("/")[1] if before.startswith("../") else None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one for each launch, which the processes of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if hasattr(request.config, "workerinput") else base


@pytest.fixture(scope="session")
def read(request: pytest.FixtureRequest, results: Path) -> Read:
    """
    `read("zero3", "sft-none")`: what each process of the launch found. The test fails if one of them did, unless with
    `fails=True`.
    """
    plan = request.config.stash[PLAN]

    def ensure(name: str) -> None:
        for source in {_source(cell) for cell in plan[name]} - {None}:
            ensure(source)
        # One process of pytest launches, the others wait; and two launches at most run at once.
        with _locked(results / f"{name}.lock"), _locked(results / f"{list(LAUNCHES).index(name) % 2}.lock"):
            if not (results / name).exists():
                launch(name, results / name, plan[name])

    def read_cell(name: str, cell: str, fails: bool = False) -> list[dict[str, Any]]:
        if any("zero" in text for text in (name, cell)) and find_spec("deepspeed") is None:
            pytest.skip("needs the extra trl_cuma[deepspeed]")
        if CELLS[cell].quantization is not None and find_spec("bitsandbytes") is None:
            pytest.skip("needs the extra trl_cuma[quantization]")
        ensure(name)
        folder = results / name
        paths = [folder / f"{cell}.{rank}.pt" for rank in range(LAUNCHES[name][1])]
        if not all(path.exists() for path in paths):
            log = (folder / "log.txt").read_text()
            pytest.fail(f"{name} did not come to the end of {cell}:\n{log[-4000:]}", pytrace=False)
        found = [torch.load(path) for path in paths]
        errors = [f"process {rank}: {r['error'][-2000:]}" for rank, r in enumerate(found) if "error" in r]
        if errors and not fails:
            pytest.fail(f"{name} failed in {cell}:\n" + "\n".join(errors), pytrace=False)
        return found

    return read_cell


@pytest.fixture
def record(launch: str, cell: str, record_property: Callable) -> Callable:
    """`record(text)` for the table at the end."""
    record_property("launch", launch)
    record_property("cell", cell)
    return lambda text: record_property("text", text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    write = terminalreporter.write_line
    if not is_named(config, HERE):
        write("tests/distributed (several processes) was left out: python -m pytest tests/distributed -q")
        return
    found: dict[tuple[str, str], str] = {}
    ended = []
    for outcome in ("passed", "failed", "error", "skipped", "xfailed"):
        for report in terminalreporter.stats.get(outcome, []):
            properties = dict(getattr(report, "user_properties", []))
            if "ended" in properties:
                ended.append(properties["ended"])
            if "cell" in properties:
                text = properties.get("text", outcome)
                found[properties["launch"], properties["cell"]] = text if outcome == "passed" else outcome
    if ended:
        write(f"a process whose partner was killed ended after: {', '.join(sorted(ended))}")
    if not found:
        return
    terminalreporter.section("largest deviation of weights, relative to how far training moved them")
    rows = {(engine, method) for engine, cell in found if engine in ENGINES for method in [cell.partition("-")[0]]}
    names = {cell.partition("-")[2] for engine, cell in found if engine in ENGINES}
    for columns in (CHECKPOINTING, *_chunks(sorted(names - {*CHECKPOINTING}), 5)):
        lines = []
        for engine, method in sorted(rows, key=lambda row: (ENGINES.index(row[0]), row[1] == "dpo")):
            cells = [found.pop((engine, f"{method}-{column}"), "") for column in columns]
            if any(cells):
                lines.append(f"{engine:<8}{method:<6}" + "".join(f"{text:<20}" for text in cells))
        for line in (" " * 14 + "".join(f"{column:<20}" for column in columns), *lines) if lines else ():
            write(line.rstrip())
    write("as reentrant: TRL forces it for adapters under ZeRO-3")
    write("not run: int8 under ZeRO-3 (each process keeps all of it) and FSDP2 (accelerate breaks on it)")
    for (name, cell), text in sorted(found.items()):
        engine, processes = LAUNCHES[name]
        write(f"resumed {cell:<20} on {processes} of {engine}: {text}")


def _chunks(names: list[str], size: int) -> list[list[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]
