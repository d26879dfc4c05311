# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
PEFT's own test suite on `CuMAConfig`: `python -m pytest tests/conformance -q`.

It runs only where this folder (or a file in it) is named on the command line: collecting it may download PEFT's sdist
(see upstream.py). The plain `python -m pytest` says that it was left out.
"""

import re
import sys
from collections import Counter
from collections.abc import Generator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from trl_cuma import CuMAModel

from ..naming import is_named
from .cases import HUB, MERGING, ROUTINGS
from .upstream import PACKAGE, left_out

HERE = Path(__file__).parent
# Tests that must fail with a ValueError: pattern of the name → reason.
EXPECTED_FAILURES = {
    r"::test_save_pretrained(_selected_adapters)?_pickle\[": "pickle: CuMA unpickles nothing, and refuses such a file"
}
INJECTED = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "skipf: upstream's spelling of skipif in one place")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if is_named(config, HERE) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for pattern, reason in EXPECTED_FAILURES.items():
            if HERE in item.path.parents and re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.xfail(strict=True, raises=ValueError, reason=reason))


@pytest.fixture(autouse=True)
def upstream_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    """For one test, upstream's helpers skip what merges, and stay off the Hub even for a model id they don't know."""
    torch.manual_seed(0)
    replacements = {
        "_skip_if_merging_not_supported": lambda *_: pytest.skip(MERGING),
        "hub_online_once": lambda model_id: nullcontext(),
    }
    for module in [module for name, module in sys.modules.items() if name.startswith(f"{PACKAGE}.")]:
        for name in replacements.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, replacements[name])


@pytest.fixture(autouse=True)
def note_injection(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    inject = CuMAModel.inject_adapter

    def note(model: CuMAModel, *args: Any, **kwargs: Any) -> None:
        request.node.stash[INJECTED] = True
        inject(model, *args, **kwargs)

    monkeypatch.setattr(CuMAModel, "inject_adapter", note)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail what skips for another reason than ours, or passes without a CuMA adapter: upstream does both by name."""
    report = yield
    problem = None
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason not in (MERGING, HUB):
            problem = f"skipped upstream: {reason!r}. Leave the test out by name, with the reason."
    elif report.when == "call" and report.passed and not item.stash.get(INJECTED, False):
        # a config, and the refusal of `inject_adapter_in_model`, need no adapter
        if "test_config.py" not in item.nodeid and "inject" not in item.name:
            problem = "passed without any CuMA adapter in a model. Look for an early return upstream."
    if problem:
        report.outcome, report.longrepr = "failed", problem
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    write = terminalreporter.write_line
    if not is_named(config, HERE):
        write("tests/conformance (PEFT's own tests) was left out: python -m pytest tests/conformance -q")
        return
    counts: dict[str, Counter[str]] = {}
    reasons: Counter[str] = Counter()
    for outcome in ("passed", "skipped", "xfailed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            if outcome == "skipped":
                reasons["skipped: " + report.longrepr[2].removeprefix("Skipped: ")] += 1
            elif outcome == "xfailed":
                reasons["failed as expected: " + report.wasxfail.removeprefix("reason: ")] += 1
            parts = report.nodeid.split("::")
            if len(parts) > 2:  # else a module that was not collected
                routing = re.search("|".join(ROUTINGS), report.nodeid.partition("[")[2])
                counts.setdefault(parts[1], Counter())[f"{routing[0] if routing else 'any'} {outcome}"] += 1
    terminalreporter.section(f"PEFT {peft.__version__}'s tests on CuMAConfig")
    columns = (*ROUTINGS, "any")
    if counts:
        write(" " * 34 + "".join(f"{routing:<38}" for routing in columns).rstrip())
    for name, counter in sorted(counts.items()):
        cells = [
            ", ".join(f"{count} {key.split()[1]}" for key, count in counter.items() if key.startswith(routing))
            for routing in columns
        ]
        write((f"{name:<34}" + "".join(f"{cell:<38}" for cell in cells)).rstrip())
    for reason, count in reasons.most_common():
        write(f"{count:>5} {reason}")
    for reason, count in Counter(reason for tests in left_out.values() for reason in tests.values()).most_common():
        write(f"{count:>5} upstream tests left out: {reason}")
