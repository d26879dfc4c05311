# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A folder that appears when it is whole, for its owner alone."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def check_output_dir(output_dir: str | os.PathLike[str]) -> Path:
    """
    The folder's full path, if it is not there yet or empty. Ask before hours of work.

    Raises:
        `FileExistsError`: Something is there.
    """
    output = Path(output_dir).expanduser().resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"`output_dir` {output} is there and not an empty folder. Name another one.")
    return output


@contextmanager
def staged_folder(output_dir: str | os.PathLike[str]) -> Iterator[Path]:
    """
    A folder to write into, that becomes `output_dir` when the context is left, and is gone if it is left by an error.

    Raises:
        `FileExistsError`: Something is there.
    """
    output = check_output_dir(output_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    # Beside the output, so that the rename stays within one file system. Made by mkdtemp: the owner's alone.
    staging = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}-incomplete-"))
    try:
        yield staging
        staging.rename(check_output_dir(output))
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def write_folder(files: Mapping[str, bytes], output_dir: str | os.PathLike[str]) -> Path:
    """
    Write files to a new folder, all or none.

    Args:
        files (`Mapping[str, bytes]`): Name → content.
        output_dir (`str` or `PathLike`): A folder that is not there yet, or is empty.

    Returns:
        `Path`: The folder, in full.

    Raises:
        `FileExistsError`: Something is there.
    """
    with staged_folder(output_dir) as staging:
        for name, content in files.items():
            (staging / name).write_bytes(content)
            (staging / name).chmod(0o600)
    return Path(output_dir).expanduser().resolve()
