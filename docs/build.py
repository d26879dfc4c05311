# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
`python docs/build.py [FOLDER]`: writes the reference of the public API, by default to `docs/api`, from signatures and
docstrings. Nothing is imported; griffe reads the source.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]

# The pages, in the order of reading: what a module exports by `__all__` is its public API. What several export is
# described where it comes first.
PAGES = (
    "trl_cuma",
    "trl_cuma.demographics",
    "trl_cuma.data",
    "trl_cuma.evaluation",
    "trl_cuma.evaluation.metrics",
    "trl_cuma.export",
    "trl_cuma.rewards",
    "trl_cuma.planning",
    "trl_cuma.quickstart",
    "trl_cuma.bench",
    "trl_cuma.integrations.axolotl",
    "trl_cuma.testing",
)
# Bases that the exported trainers and their arguments refer to.
ALSO = {"trl_cuma": ("trl_cuma.trainers.mixin.CuMATrainerMixin", "trl_cuma.trainers.config.CuMATrainingArguments")}

WIDTH = 100  # of a signature
LONGEST_VALUE = 200  # of a constant that is shown
SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|Example|Examples):$")
ITEM = re.compile(r"(?P<names>\*{0,2}`?[\w.]+`?(?:, \*{0,2}`?[\w.]+`?)*)(?P<type> \(.*?\))?:(?= |$)(?P<text>.*)")
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?!\()")


class Reference:
    """What is described on which page: path of the object → (page, heading)."""

    def __init__(self, package: griffe.Object) -> None:
        self.package = package
        self.pages: dict[str, list[tuple[str, griffe.Object]]] = {}
        self.places: dict[str, tuple[str, str]] = {}
        for page in PAGES:
            module = self.find(page)
            exported = [(name, self.target(module[name])) for name in module.exports or ()]
            exported += [(path.rpartition(".")[2], self.find(path)) for path in ALSO.get(page, ())]
            self.pages[page] = sorted(exported, key=lambda entry: entry[0].lower())
            for name, thing in self.pages[page]:
                self.places.setdefault(thing.path, (page, name))

    def find(self, path: str) -> griffe.Object:
        """The object at a dotted path."""
        inside = path.partition(".")[2]
        return self.target(self.package[inside] if inside else self.package)

    @staticmethod
    def target(thing: griffe.Object | griffe.Alias) -> griffe.Object:
        """What a re-exported name stands for."""
        return thing.final_target if isinstance(thing, griffe.Alias) else thing

    def link(self, name: str, page: str) -> str:
        """Markdown for a name in a docstring: a link, where exactly one described object is meant."""
        shown = name.rpartition(".")[2]
        places = {place for place in self.places.values() if place[1] == shown}
        if len(places) != 1:
            return f"`{name}`"
        ((target, heading),) = places
        file = "" if target == page else f"{target}.md"
        return f"[`{shown}`]({file}#{heading.lower()})"

    # ------------------------------------------------------------------ pages
    def index(self) -> str:
        """The page that lists the others."""
        lines = [
            "# API",
            "",
            "Written by `python docs/build.py` from the docstrings.",
            "",
            "| module | |",
            "|---|---|",
        ]
        lines += [f"| [`{page}`]({page}.md) | {first_sentence(self.find(page))} |" for page in PAGES]
        return "\n".join(lines) + "\n"

    def page(self, page: str) -> str:
        """A module's page."""
        parts = [f"# `{page}`", text(self.find(page)), "| name | |\n|---|---|"]
        own = []
        for name, thing in self.pages[page]:
            parts[-1] += f"\n| {self.link(name, page)} | {in_cell(first_sentence(thing))} |"
            if self.places[thing.path] == (page, name):
                own.append((name, thing))
        for name, thing in own:
            parts += [f"## `{name}`", *self.describe(name, thing, page)]
        return REFERENCE.sub(lambda match: self.link(match[1], page), "\n\n".join(filter(None, parts))) + "\n"

    def describe(self, name: str, thing: griffe.Object, page: str) -> list[str]:
        """Signature, docstring, and of a class its public methods and properties."""
        if thing.is_attribute:
            value = str(thing.value)
            shown = f"```python\n{name} = {value}\n```" if len(value) <= LONGEST_VALUE else ""
            return [shown, text(thing)]
        parts = [signature(name, thing), text(thing)]
        if not thing.is_class:
            return parts
        # Bases of ours that are no part of the public API tell nothing here.
        bases = [base for base in thing.bases if self.is_known(base)]
        if bases:
            parts.insert(0, "Extends " + ", ".join(f"[`{base}`]" for base in bases) + ".")
        for member_name, member in thing.members.items():
            if member_name.startswith("_") and member_name != "__call__" or member.is_alias or not member.docstring:
                continue
            if member.is_function:
                parts += [f"### `{name}.{member_name}`", signature(member_name, member), text(member)]
            elif "property" in member.labels:
                parts += [f"### `{name}.{member_name}`", f"*property* → `{member.annotation}`", text(member)]
        return parts

    def is_known(self, base: str | griffe.Expr) -> bool:
        """Whether a base class is described here, or is another library's."""
        path = base.canonical_path if isinstance(base, griffe.Expr) else base
        return not path.startswith("trl_cuma.") or self.find(path).path in self.places


def text(thing: griffe.Object) -> str:
    """The docstring as Markdown."""
    return "" if thing.docstring is None else markdown(inspect.cleandoc(thing.docstring.value))


def first_sentence(thing: griffe.Object) -> str:
    """The docstring's beginning: up to its first full stop."""
    if thing.docstring is None:
        return ""
    paragraph = " ".join(inspect.cleandoc(thing.docstring.value).split("\n\n")[0].split())
    return re.split(r"(?<=[^.]\.) ", paragraph)[0].rstrip(".")


def in_cell(words: str) -> str:
    """For a table's cell."""
    return words.replace("|", "\\|")


def signature(name: str, thing: griffe.Object) -> str:
    """A signature as code, on one line where it fits; "" for a class that callers don't make themselves."""
    parts: list[str] = []
    kinds = griffe.ParameterKind
    seen_star = False
    parameters = [p for p in thing.parameters if p.name not in ("self", "cls")]
    if thing.is_class and (not parameters or any(p.name.startswith("_") for p in parameters)):
        return ""
    for index, parameter in enumerate(parameters):
        if parameter.kind is kinds.keyword_only and not seen_star:
            parts.append("*")
            seen_star = True
        stars = {kinds.var_positional: "*", kinds.var_keyword: "**"}.get(parameter.kind, "")
        seen_star = seen_star or stars == "*"
        part = stars + parameter.name
        if parameter.annotation is not None:
            part += f": {parameter.annotation}"
        if parameter.default is not None and not stars:
            equals = " = " if parameter.annotation is not None else "="
            part += f"{equals}{parameter.default}"
        parts.append(part)
        following = parameters[index + 1].kind if index + 1 < len(parameters) else None
        if parameter.kind is kinds.positional_only and following is not kinds.positional_only:
            parts.append("/")
    returns = f" -> {thing.returns}" if thing.is_function and thing.returns is not None else ""
    line = f"{name}({', '.join(parts)}){returns}"
    if len(line) > WIDTH:
        line = f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){returns}"
    return f"```python\n{line}\n```"


def markdown(docstring: str) -> str:
    """
    A docstring in Hugging Face's style as Markdown: sections become bold headings, their entries lists.

    Args:
        docstring (`str`): without the indentation of the code around it.
    """
    out: list[str] = []
    lines = docstring.split("\n")
    row = 0
    while row < len(lines):
        match = SECTION.match(lines[row])
        if match is None:
            out.append(lines[row])
            row += 1
            continue
        end = row + 1
        while end < len(lines) and (not lines[end] or lines[end].startswith(" ")):
            end += 1
        body = inspect.cleandoc("\n".join(["", *lines[row + 1 : end]])).split("\n")
        out += [f"**{match[1]}**", ""]
        out += ["```python", *body, "```", ""] if match[1].startswith("Example") else [*entries(body), ""]
        row = end
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


def entries(body: list[str]) -> list[str]:
    """A section's entries as a list; a section that is a paragraph stays one."""
    out = []
    for line in body:
        match = None if line.startswith(" ") else ITEM.match(line)
        if match is not None:
            names = ", ".join(f"`{name.strip('`')}`" for name in match["names"].split(", "))
            out.append(f"- {names}{match['type'] or ''}:{match['text']}")
        elif line.startswith(" "):
            # the text of an entry, whose own indentation (of a list, say) is kept
            out.append("  " + line.removeprefix("    "))
        else:
            out.append(line)
    return out


def build() -> dict[str, str]:
    """The pages: file name → text."""
    loader = griffe.GriffeLoader(search_paths=[ROOT], allow_inspection=False)
    package = loader.load("trl_cuma")
    loader.resolve_aliases(implicit=True, external=False)
    reference = Reference(package)
    return {"README.md": reference.index()} | {f"{page}.md": reference.page(page) for page in PAGES}


def main(folder: Path) -> None:
    """Write the pages to a folder, and remove those that are no more."""
    pages = build()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.md"):
        if old.name not in pages:
            old.unlink()
    for name, text in pages.items():
        (folder / name).write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "docs" / "api")
