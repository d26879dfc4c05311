# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from trl_cuma.extras import needs_extra

ROOT = Path(__file__).parents[1]

# Hides packages as if they were not installed. An entry `None` in `sys.modules` would not do: transformers looks for
# packages before it imports them.
HIDE = """
import runpy, sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

HIDDEN = set(sys.argv[2].split(","))
sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def optional_packages() -> set[str]:
    """The import names of what the extras bring and the core doesn't, of what is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {re.split(r"[<>=\[]", line)[0] for lines in project["optional-dependencies"].values() for line in lines}
    names = {extra.lower().replace("_", "-") for extra in extras - {"trl_cuma"}}
    found = packages_distributions().items()
    return {module for module, owners in found if names & {owner.lower().replace("_", "-") for owner in owners}}


@pytest.mark.slow
def test_every_module_imports_with_the_core_alone_or_names_its_extra():
    hidden = optional_packages()
    assert hidden  # else nothing is shown
    script = ROOT / "tests" / "release" / "modules.py"
    done = subprocess.run(
        [sys.executable, "-c", HIDE, str(script), ",".join(hidden)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if "scipy" in hidden:
        assert "trl_cuma.evaluation.winrate: A win-rate needs scipy, which is not installed: run `pip" in done.stdout


def test_a_package_that_is_there_and_broken_raises_its_own_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_package.py").write_text("raise ImportError('libbroken.so: no such file')")
    with pytest.raises(ImportError, match="^libbroken.so: no such file$"):
        with needs_extra("evaluation", "The table"):
            import broken_package  # noqa: F401
    with pytest.raises(ImportError, match=r"The table needs nothing_there, .*pip install 'trl_cuma\[evaluation\]'"):
        with needs_extra("evaluation", "The table"):
            import nothing_there  # noqa: F401
