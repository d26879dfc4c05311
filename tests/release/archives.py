# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`python archives.py FILE …`: what a wheel and an sdist must hold, and must not."""

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
OF_PACKAGE = {".py", ".json", ".css", ".typed"}
OF_SDIST = OF_PACKAGE | {".md", ".yaml", ".sh", ".sbatch"}
LARGEST = 5 * 2**20
"""Bytes: code and text. Somebody's runs and data are more."""


def files_of(folder: str, pattern: str) -> set[str]:
    """The checkout's files of a folder, by their paths in the checkout."""
    found = (path for path in (ROOT / folder).rglob(pattern) if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(ROOT)) for path in found}


def problems(archive: Path) -> list[str]:
    """What is wrong with a wheel or an sdist, in words."""
    needed = files_of("trl_cuma", "*")
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            sizes = {info.filename: info.file_size for info in wheel.infolist() if ".dist-info/" not in info.filename}
        folders, suffixes = {"trl_cuma"}, OF_PACKAGE
    else:
        with tarfile.open(archive) as sdist:
            sizes = {member.name.partition("/")[2]: member.size for member in sdist if member.isfile()}
        sizes = {name: size for name, size in sizes.items() if "/" in name}  # beside pyproject.toml, README.md, …
        folders, suffixes = {"trl_cuma", "docs", "examples", "recipes", "tests"}, OF_SDIST
        needed |= files_of("recipes", "*.yaml")
    found = [f"lacks {name}" for name in sorted(needed - sizes.keys())]
    for name in sorted(sizes):
        if Path(name).parts[0] not in folders or Path(name).suffix not in suffixes:
            found.append(f"has {name}, which doesn't belong there")
    if sum(sizes.values()) > LARGEST:
        found.append(f"is {sum(sizes.values()):,} bytes unpacked, more than {LARGEST:,}")
    print(f"{archive.name}: {len(sizes)} files, {sum(sizes.values()):,} bytes unpacked")
    return found


if __name__ == "__main__":
    wrong = [f"{name}: {problem}" for name in sys.argv[1:] for problem in problems(Path(name))]
    sys.exit("\n".join(wrong) or 0)
