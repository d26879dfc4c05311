# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The page as a browser shows it, at the width of a desktop and of a phone, in light and dark."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "chrome")

FIGURES = """
() => Array.from(document.querySelectorAll("figure")).map(figure => {
  const img = figure.querySelector("img"), box = img.getBoundingClientRect();
  return {
    name: figure.id, loaded: img.complete, box: [box.width, box.height],
    natural: [img.naturalWidth, img.naturalHeight],
    left: box.left, right: box.right, visible: img.checkVisibility(), alt: img.alt.length,
    source: img.currentSrc,
  };
})
"""

# WCAG's contrast of every element that holds text of its own against the nearest background.
CONTRAST = """
() => {
  const parse = color => color.match(/[\\d.]+/g).map(Number);
  const luminance = rgb => {
    const [r, g, b] = rgb.slice(0, 3).map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = element => {
    for (; element; element = element.parentElement) {
      const color = parse(getComputedStyle(element).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    if (![...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())) continue;
    const [a, b] = [parse(getComputedStyle(element).color), background(element)].map(luminance);
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), element.tagName, element.textContent.slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0]);
}
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = os.environ.get("CUMA_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium: export CUMA_CHROMIUM=$(bash tests/get_chromium.sh), or install the package chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="drives the browser: pip install playwright")
    with playwright.sync_playwright() as driver:
        # As root Chromium runs without its sandbox only; the page is our own.
        started = driver.chromium.launch(executable_path=program, args=["--no-sandbox"] * (os.geteuid() == 0))
        yield started
        started.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_looks_right(browser: Any, report: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    requests, said = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto((report / "report.html").as_uri())

    figures = page.evaluate(FIGURES)
    assert len(figures) == 9
    for figure in figures:
        assert figure["loaded"] and figure["visible"] and min(figure["natural"]) > 0, figure["name"]
        assert figure["left"] >= 0 and figure["right"] <= width, figure["name"]
        assert figure["alt"] > 40, figure["name"]
        # The narrow drawing is 3.6 inches wide (346 px): its text of 9 points is at least 11.5 px on a phone.
        drawn = figure["box"][0] / figure["natural"][0]
        assert 0.96 <= drawn <= 1.2, figure["name"]
    assert len({figure["source"] for figure in figures}) == 9
    assert len([figure for figure in figures if figure["box"][0] < 600]) == (9 if width == 390 else 8)

    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    clipped = (
        "[...document.querySelectorAll('h1,h2,h3,p,dd,figcaption')].filter(e => e.scrollWidth > e.clientWidth + 1)"
    )
    assert page.evaluate(f"{clipped}.length") == 0
    page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")

    worst = page.evaluate(CONTRAST)[0]
    assert worst[0] >= 4.5, worst  # AA
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(255, 255, 255)" if scheme == "light" else "rgb(22, 27, 34)"
    )
    assert page.title() == "Evaluation of runs/cuma"  # no name in the data ran as a script
    assert said == []
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []
    context.close()


def test_the_themes_and_widths_show_four_different_drawings(browser: Any, report: Path) -> None:
    seen = []
    for width in (1280, 390):
        for scheme in ("light", "dark"):
            context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
            page = context.new_page()
            page.goto((report / "report.html").as_uri())
            seen.append(page.evaluate("document.querySelector('figure img').currentSrc"))
            context.close()
    assert len(set(seen)) == 4
