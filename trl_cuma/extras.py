# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What a missing optional package says."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """
    Around the imports of an optional package: if it isn't there, the error says which extra brings it. A package that
    is there and broken raises its own error.

    Args:
        extra (`str`): the extra of pyproject.toml, such as `"evaluation"`.
        what (`str`): what needs the package; the error starts with it.

    Raises:
        ImportError: if a package that is imported inside is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{what} needs {error.name}, which is not installed: run `pip install 'trl_cuma[{extra}]'`.",
            name=error.name,
        ) from error
