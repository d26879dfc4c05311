# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
API = ROOT / "docs" / "api"


@pytest.fixture(scope="module")
def build():
    pytest.importorskip("griffe", reason="needs the extra trl_cuma[test]")
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(build):
    return build.build()


def test_the_committed_pages_are_what_the_docstrings_say(pages):
    committed = {path.name: path.read_text() for path in API.glob("*.md")}
    stale = sorted(name for name in pages.keys() | committed.keys() if pages.get(name) != committed.get(name))
    assert not stale, (
        f"{stale} in docs/api differ from the docstrings: run `python docs/build.py` and commit the diff."
    )


def test_every_exported_name_has_a_place_and_every_link_leads_to_one(pages):
    import trl_cuma

    headings = {name: set(re.findall(r"^## `(.+)`$", text, re.MULTILINE)) for name, text in pages.items()}
    assert set(trl_cuma.__all__) <= headings["trl_cuma.md"]
    links = [(name, *link) for name, text in pages.items() for link in re.findall(r"\]\(([\w.]*)#(\w+)\)", text)]
    assert links
    for name, file, anchor in links:
        assert anchor in {heading.lower() for heading in headings[file or name]}, f"{name}: {file}#{anchor}"


def test_a_docstring_becomes_markdown(build):
    docstring = """Multiply.

Args:
    a, b (`int`): factors, of which
        the second may be [`Big`].
    **rest: left out.

Returns:
    the product.

Example:

    multiply(2, 3)

The end."""
    assert build.markdown(docstring) == (
        "Multiply.\n\n**Args**\n\n- `a`, `b` (`int`): factors, of which\n  the second may be [`Big`].\n"
        "- `**rest`: left out.\n\n**Returns**\n\nthe product.\n\n**Example**\n\n"
        "```python\nmultiply(2, 3)\n```\n\nThe end."
    )
