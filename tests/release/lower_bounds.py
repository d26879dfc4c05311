# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
`python lower_bounds.py`: each requirement of pyproject.toml pinned to its lower bound, extras included, as pip's
constraints. With `--installed`: those that are installed in another version.
"""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)(?:>=|==)(?P<bound>[\w.]+)")


def lower_bounds(pyproject: Path = PYPROJECT) -> dict[str, str]:
    """
    Name → least version, of all requirements.

    Raises:
        ValueError: for a requirement without a lower bound.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    lines = [
        *project["dependencies"],
        *(line for lines in project["optional-dependencies"].values() for line in lines),
    ]
    found = {}
    for line in lines:
        if line.startswith(project["name"] + "["):  # our own extras
            continue
        match = REQUIREMENT.match(line)
        if match is None:
            raise ValueError(f"The requirement {line!r} in pyproject.toml has no lower bound: write NAME>=VERSION.")
        found[match["name"]] = match["bound"]
    return found


if __name__ == "__main__":
    if "--installed" not in sys.argv:
        print(*(f"{name}=={bound}" for name, bound in sorted(lower_bounds().items())), sep="\n")
        sys.exit()
    from packaging.version import Version  # which a bare python3 may lack, and pip's packages bring

    for name, bound in sorted(lower_bounds().items()):
        try:
            installed = Version(version(name))
        except PackageNotFoundError:
            continue
        if Version(installed.public) != Version(bound):
            print(f"{name}: {installed}, lower bound {bound}")
