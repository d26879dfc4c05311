# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""
What it costs to turn WorldValuesBench into TRL's columns: rows per second and memory, in one Markdown table.

    python benchmarks/data.py                                          # full size, 65,294 training people
    python benchmarks/data.py --people 5000 --rowloop_people 200 --rounds 2      # does it run? Not a measurement

The input is simulated in the real files' layout (`write_worldvaluesbench`): 239 questions, so many training people,
and test people in the real proportion. The task is SFT with the default splits, by person and by question; each format
of the prompt is measured: the profile nowhere, and in a system message.

*Full size* is `convert_worldvaluesbench(...).save(...)`, once. The *row loop* is what one would write with pandas and
datasets: over people, over questions, a dict per row, a `Dataset` of them, its `to_parquet`. What rows share (a
question's text, a person's opening) is made once there, too. Both convert the same smaller input, and what they wrote
is compared row for row before anything is printed. They run in turn, in changing order; the ratio is the median over
rounds of (ours / row loop) rows per second, with its quartiles.

Each run has a process of its own. Its seconds go from the files to the finished folder, without imports. *Peak* is the
most memory that it held (`ru_maxrss`), *imports* what it held before it began: most of that is torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from time import perf_counter
from typing import Any

from machine import processor

# The libraries are imported by the processes that convert: a process starts with its parent's peak as its own, so this
# one has to stay small.

FIELDS = {
    "country": "B_COUNTRY",
    "age": "X003R",
    "gender": "Q260",
    "education": "Q275",
    "marital_status": "Q273",
    "religion": "Q289",
    "ethnicity": "Q290",
    "employment": "Q279",
}
FORMATS = ("none", "system")  # PromptFormat.demographics
QUESTIONS = 239
MIN_COUNT = 30
MEMORY_GOAL, RATIO_GOAL = 4e9, 20  # bytes; ours ÷ row loop
GIB = 2**30


@dataclass
class Run:
    """One conversion: rows by split, seconds, and bytes held before it and at most."""

    rows: dict[str, int]
    seconds: float
    before: int
    peak: int

    @property
    def rate(self) -> float:
        return sum(self.rows.values()) / self.seconds


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call it in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def measure(
    convert: Callable[[Path, Path, str], dict[str, int]], source: Path, output: Path, demographics: str
) -> Run:
    """Call a converter, with what the libraries take apart."""
    import datasets

    import trl_cuma.data.worldvaluesbench  # noqa: F401

    datasets.disable_progress_bars()
    before, start = _peak(), perf_counter()
    rows = convert(source, output, demographics)
    return Run(rows, perf_counter() - start, before, _peak())


def _peak() -> int:
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write(folder: Path, people: int) -> None:
    """The simulated input, with people in the real proportion."""
    from trl_cuma.testing_surveys import write_worldvaluesbench

    others = int(people * 0.15 / 0.7)
    parts = {"train": people, "valid": others, "test": others}
    write_worldvaluesbench(folder, num_people=parts, num_questions=QUESTIONS)


# -------------------------------------------------------------------------------------------------- converters
def ours(source: Path, output: Path, demographics: str) -> dict[str, int]:
    """The package's converter."""
    from trl_cuma.data.prompts import PromptFormat
    from trl_cuma.data.worldvaluesbench import convert_worldvaluesbench

    report = convert_worldvaluesbench(source, prompts=PromptFormat(demographics=demographics)).save(output)
    return dict(report.rows)


def row_loop(source: Path, output: Path, demographics: str) -> dict[str, int]:
    """The same rows, one by one. It reads files, adjusts answers and groups rare values with code of its own."""
    import datasets
    import pandas as pd

    from trl_cuma.data.prompts import PromptFormat
    from trl_cuma.data.splits import DROPPED, SPLITS, SplitOptions, split_people, split_prompts, split_rows

    prompts, options = PromptFormat(demographics=demographics), SplitOptions()
    questions = _questions(source, prompts)
    table = pd.concat([_people(source, split) for split in ("train", "test")])
    profiles = _profiles(table)
    person_split = split_people(profiles, options, table["split"])
    prompt_split = split_prompts([question["prompt_group"] for question in questions.values()], options)
    split_of = split_rows(person_split[:, None], prompt_split[None])

    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for number, (person_id, person) in enumerate(table.iterrows()):
        profile = profiles.loc[person_id].to_dict()
        language = profile.pop("language")
        opening = prompts.opening(profile, "survey")
        system = [{"role": "system", "content": opening.system}] if opening.system is not None else []
        for column, (name, question) in enumerate(questions.items()):
            answer, split = person[name], split_of[number, column]
            if pd.isna(answer) or split == DROPPED:
                continue
            letter = "ABCDEFGHIJK"[int(answer) - question["low"]]
            row = {
                "prompt": [*system, {"role": "user", "content": opening.prefix + question["text"]}],
                "completion": [{"role": "assistant", "content": letter}],
                "demographic": profile,
                "person_id": person_id,
                "question_id": name,
                "prompt_group": question["prompt_group"],
                "language": language,
                "num_options": question["num_options"],
            }
            rows[SPLITS[split]].append(row)

    text = datasets.Value("string")
    messages = datasets.List({"role": text, "content": text})
    features = {"prompt": messages, "completion": messages, "demographic": dict.fromkeys(FIELDS, text)}
    features |= dict.fromkeys(("person_id", "question_id", "prompt_group", "language"), text)
    features = datasets.Features(features | {"num_options": datasets.Value("int32")})
    (output / "data").mkdir(parents=True)
    for split in rows:
        dataset = datasets.Dataset.from_list(rows[split], features=features)
        dataset.to_parquet(output / "data" / f"{split}-00000-of-00001.parquet")
    return {split: len(some) for split, some in rows.items()}


def _people(source: Path, split: str) -> Any:
    """Both tables of a split as one, by the person's id as text."""
    import pandas as pd

    files = [source / "WorldValuesBench" / split / f"{split}_{kind}_qa.tsv" for kind in ("demographic", "value")]
    demographics, values = (pd.read_csv(file, sep="\t", low_memory=False) for file in files)
    table = demographics.merge(values, on="D_INTERVIEW").set_index("D_INTERVIEW")
    table.index = table.index.astype(str)
    return table.copy().assign(split=split)  # a copy is in one piece, and faster to walk


def _profiles(table: Any) -> Any:
    """Known values, those of too few people as "Other"."""
    import pandas as pd

    columns = {}
    for field, name in [*FIELDS.items(), ("language", "S_INTLANGUAGE")]:
        values = table[name].map(_known)
        values = values.where(values.isna() | (values.map(values.value_counts()) >= MIN_COUNT), "Other")
        if (values == "Other").sum() < MIN_COUNT:
            values = values.replace("Other", None)
        columns[field] = [None if pd.isna(value) else value for value in values]
    return pd.DataFrame(columns, index=table.index, dtype=object)


def _known(value: Any) -> str | None:
    """A label, or `None` where a cell is empty, says nothing, or holds a bare code."""
    nothing = ("Don't know", "Don´t know", "No answer", "Not asked", "Missing; Not available")
    return None if not isinstance(value, str) or value in nothing or value.isdigit() else value


def _questions(source: Path, prompts: Any) -> dict[str, dict[str, Any]]:
    """By id: the prompt's text, its group, how many options, and the lowest answer."""
    from trl_cuma.data.duplicates import near_duplicate_groups
    from trl_cuma.data.survey import Question

    names = ("question_metadata", "codebook", "answer_adjustment")
    files = [source / "dataset_construction" / f"{name}.json" for name in names]
    metadata, codebook, adjustment = (json.loads(file.read_text("utf-8")) for file in files)
    metadata = {name: entry for name, entry in metadata.items() if entry["use_case"] == "value"}
    groups = near_duplicate_groups([entry["question"] for entry in metadata.values()], list(metadata))
    questions = {}
    for (name, entry), group in zip(metadata.items(), groups, strict=True):
        low, high = entry["answer_scale_min"], entry["answer_scale_max"]
        moved = adjustment.get(name, {})
        labels = {}
        for code, label in codebook[name]["choices"].items():
            into_another = code in moved and moved[code] in codebook[name]["choices"] and moved[code] not in moved
            if int(code) >= 0 and moved.get(code) != "" and not into_another:
                labels[int(moved.get(code, code))] = label
        # On a scale of 1 to 4, 1 meaning 'Daily' and 4 meaning 'Never', how often ...?
        first, rest = entry["question"].removeprefix(f"On a scale of {low} to {high}, ").split("' and ", 1)
        last, text = rest.split("', ", 1)
        labels |= {low: first.split("'", 1)[1], high: last.split("'", 1)[1]}
        question = Question(name, text[0].upper() + text[1:], tuple(labels[i] for i in range(low, high + 1)))
        texts = {"text": prompts.question(question), "prompt_group": group}
        questions[name] = texts | {"num_options": high - low + 1, "low": low}
    return questions


def check_same(one: Path, other: Path) -> None:
    """Raise unless two converters' outputs hold the same rows in the same order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for split in ("train", "test"):
        tables = [
            pa.concat_tables([pq.read_table(file) for file in sorted((folder / "data").glob(f"{split}-*.parquet"))])
            for folder in (one, other)
        ]
        names = tables[0].column_names
        if sorted(names) != sorted(tables[1].column_names) or len(tables[0]) != len(tables[1]):
            raise AssertionError(f"{split}: {names} × {len(tables[0])}, {tables[1].column_names} × {len(tables[1])}.")
        for name in names:
            columns = [table[name].combine_chunks().cast(tables[0].schema.field(name).type) for table in tables]
            if not columns[0].equals(columns[1]):
                row = next(i for i, pair in enumerate(zip(*columns, strict=True)) if pair[0] != pair[1])
                raise AssertionError(f"the converters differ in {split}, row {row}, column {name}.")


# ------------------------------------------------------------------------------------------------------ table
class Bench:
    """The options of one run, its folder, and the rows of its table."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.lines: list[str] = []

    def compare(self) -> None:
        """Both converters on the smaller input, in turn."""
        source = self.folder / "small"
        in_process(write, source, self.options.rowloop_people)
        for demographics in FORMATS:
            runs: dict[Any, list[Run]] = {ours: [], row_loop: []}
            for number in range(self.options.rounds):
                outputs = {}
                for convert in list(runs)[:: 1 if number % 2 else -1]:
                    outputs[convert] = self.folder / f"{convert.__name__}-{demographics}-{number}"
                    self.progress(f"{convert.__name__}, {demographics}, round {number + 1}")
                    runs[convert].append(in_process(measure, convert, source, outputs[convert], demographics))
                in_process(check_same, *outputs.values())
            ratios = [a.rate / b.rate for a, b in zip(runs[ours], runs[row_loop], strict=True)]
            low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
            goal = f"≥ {RATIO_GOAL}: {'met' if median >= RATIO_GOAL else '**missed**'}"
            people = self.options.rowloop_people
            self.add("row loop", people, demographics, runs[row_loop], "1", "")
            self.add("ours", people, demographics, runs[ours], f"{median:.1f} ({low:.1f}–{high:.1f})", goal)

    def full_size(self) -> None:
        source = self.folder / "full"
        in_process(write, source, self.options.people)
        for demographics in FORMATS:
            self.progress(f"ours at full size, {demographics}")
            run = in_process(measure, ours, source, self.folder / f"full-{demographics}", demographics)
            goal = f"peak ≤ {MEMORY_GOAL / 1e9:g} GB: {'met' if run.peak <= MEMORY_GOAL else '**missed**'}"
            self.add("ours", self.options.people, demographics, [run], "–", goal)

    def add(self, name: str, people: int, demographics: str, runs: list[Run], ratio: str, goal: str) -> None:
        rows = runs[0].rows
        cells = [name, f"{people:,} × {QUESTIONS}", demographics, f"{rows['train']:,}", f"{rows['test']:,}"]
        cells += [f"{statistics.median(run.seconds for run in runs):.4g}"]
        cells += [f"{statistics.median(run.rate for run in runs):,.0f}"]
        cells += [f"{max(getattr(run, name) for run in runs) / GIB:.2f}" for name in ("peak", "before")]
        self.lines.append(f"| {' | '.join([*cells, ratio, goal])} |")

    def progress(self, text: str) -> None:
        print(f"[data] {text}", file=sys.stderr, flush=True)

    def table(self) -> str:
        head = ["converter", "training people × questions", "profile in prompt", "training rows", "test rows"]
        head += ["s", "rows/s", "peak GiB", "imports GiB", "ratio (quartiles)", "target"]
        rule = "|---|---:|---|" + "---:|" * 7 + "---|"
        return "\n".join([machine(self.options), "", f"| {' | '.join(head)} |", rule, *self.lines])


def machine(options: argparse.Namespace) -> str:
    """One line: what the numbers were made on and with."""
    parts = [processor()]
    parts += [f"{name} {version(name)}" for name in ("pyarrow", "pandas", "datasets")]
    return "; ".join([*parts, f"{options.rounds} rounds, full size once"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=65_294, help="training people at full size")
    parser.add_argument("--rowloop_people", type=int, default=2000, help="training people that the row loop gets, too")
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    parser.add_argument("--output", help="also write the table to this file")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}: quartiles need at least 2.")
    for name in ("people", "rowloop_people"):
        if getattr(options, name) < 100:
            parser.error(f"--{name} is {getattr(options, name)}: give at least 100.")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        bench.compare()
        bench.full_size()
    print(bench.table())
    if options.output:
        Path(options.output).write_text(bench.table() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
