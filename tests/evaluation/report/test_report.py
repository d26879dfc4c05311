# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as ElementTree
from html import unescape

import numpy as np
import pytest

from trl_cuma.evaluation.report import write_report
from trl_cuma.evaluation.report.figures import collapse, distributions
from trl_cuma.evaluation.report.output import write_folder
from trl_cuma.evaluation.report.svg import DARK, INK, MARGINAL, MODEL, MUTED, PAPER, in_dark
from trl_cuma.evaluation.report.tables import (
    Table,
    bad_rows_table,
    counts_table,
    distribution_table,
    group_tables,
    inequity_table,
    metrics_table,
    stereotyping_table,
    topology_tables,
)
from trl_cuma.evaluation.report.text import clean, estimate, number, shorten

FIGURES = {
    "distributions",
    "collapse",
    "calibration",
    "topology-similarity",
    "topology-map",
    "topology-load",
    "topology-information",
    "topology-reference",
    "training",
}


def small(figure: bool = False) -> dict:
    metrics = {"emd": {"value": 0.1, "low": 0.09, "high": float("nan"), "n": np.int64(3), "unit": "question"}}
    bins = [{"mean_predicted": 0.2, "observed": 0.3, "n": 5}, {"mean_predicted": 0.8, "observed": 0.7, "n": 5}]
    split = {"metrics": metrics} | ({"calibration": {"bins": bins, "ece": 0.1}} if figure else {})
    return {"version": 1, "model": {"name": "base"}, "splits": {"test": split}}


def images(page: str) -> list[str]:
    return [base64.b64decode(data).decode() for data in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", page)]


def test_the_files_are_for_their_owner_alone(report):
    assert sorted(path.name for path in report.iterdir()) == ["evaluation.json", "report.html", "tables.md"]
    assert report.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in report.iterdir()} == {0o600}


def test_the_document_is_written_as_it_is(report, example):
    written = json.loads((report / "evaluation.json").read_text())
    assert written in [example.evaluation(*size) for size in example.SIZES.values()]


def test_what_is_not_a_number_is_null(tmp_path):
    folder = write_report(small(), tmp_path / "out", {"score": np.arange(3)})
    written = json.loads((folder / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert written["splits"]["test"]["metrics"]["emd"] == {
        "value": 0.1,
        "low": 0.09,
        "high": None,
        "n": 3,
        "unit": "question",
    }
    with np.load(folder / "cells.npz", allow_pickle=False) as cells:
        assert cells["score"].tolist() == [0, 1, 2]


def test_the_same_evaluation_gives_the_same_files(tmp_path):
    first, second = (write_report(small(figure=True), tmp_path / name, {"score": np.arange(3)}) for name in "ab")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        write_report(small(), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine.txt"]


def test_a_failure_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="version"):
        write_report(small() | {"version": 2}, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        write_folder({"whole.txt": b"text", "no/such/folder.txt": b"text"}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_every_figure_is_there_in_two_themes_and_two_widths(report):
    page = (report / "report.html").read_text()
    figures = re.findall(
        r'<figure id="s\d+-[a-z0-9-]*?(distributions|collapse|calibration|topology-[a-z]+|training)"', page
    )
    assert set(figures) == FIGURES
    drawn = images(page)
    assert len(drawn) == 4 * len(FIGURES)
    for svg in drawn:
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert sum(PAPER in svg for svg in drawn) == sum(DARK[PAPER] in svg for svg in drawn) == 2 * len(FIGURES)


def test_every_figure_says_what_it_shows(report):
    page = (report / "report.html").read_text()
    said = {name: unescape(alt) for name, alt in re.findall(r'<figure id="s\d+-([^"]+)".*?alt="([^"]+)"', page)}
    assert len(said) == len(FIGURES)
    # The example's scatter: predicted entropy is 0.7 true + 0.4, so above it wherever that is under 1.33.
    assert "1,500 cells" in said["split-test-collapse"]
    assert "expected calibration error 0.031" in said["split-test-calibration"]
    assert (
        "Arvenia, How important is family in your life?: the truth's most frequent option is 1 (0.64)"
        in (said["split-test-distributions"])
    )
    assert "least 0.621 at step 200" in said["training-training"]


def test_without_training_answers_figures_leave_the_marginal_out(example):
    split = example.evaluation()["splits"]["test"]
    panels = [panel | {"marginal": None} for panel in split["distributions"][:2]]
    points = {name: values[:10] for name, values in split["collapse"].items()} | {"marginal_entropy": None}
    for drawing in (distributions("d", panels), collapse("c", points)):
        assert "prediction" in drawing.wide and "training marginal" not in drawing.wide
        assert "n/a" in drawing.alt
    assert distribution_table(panels).rows[0][-1] == "n/a"


def test_the_figure_of_entropies_says_what_a_cell_is(example):
    points = {name: values[:10] for name, values in example.evaluation()["splits"]["test"]["collapse"].items()}
    of_answers = collapse("c", points, {"by": "country", "min_people": 30}).caption
    assert "question and group: the people of one country who answered it, 30 or more. On" in of_answers
    assert "question and country. On" in collapse("c", points, {"by": "country", "min_people": None}).caption


def test_values_that_the_encoder_does_not_know_are_counted(tmp_path):
    counts = {"rows": 9, "answers": 9, "people": 3, "unknown_values": {"country": 12, "<age>": 1}, "bad_rows": {}}
    split = {"counts": counts, "metrics": {}}
    folder = write_report({"version": 1, "model": {"name": "base"}, "splits": {"test": split}}, tmp_path / "out")
    text, page = (folder / "tables.md").read_text(), (folder / "report.html").read_text()
    assert "| Rows | Answers | People | Values unknown to the encoder |" in text
    assert "| 9 | 9 | 3 | country 12, \\<age\\> 1 |" in text and ">country 12, &lt;age&gt; 1<" in page
    assert "answered as if the field were missing" in text and "answered as if the field were missing" in page
    assert counts_table({"rows": 9}).note == "" and counts_table({"rows": 9}).columns == ["Rows"]


@pytest.mark.parametrize("least", [30, None])
def test_other_is_explained_where_it_is_shown(least):
    few = "fewer than 30" if least else "too few"
    said = f"Values with {few} people are together as “Other”, with the unknown."
    panel = {"question": "q", "truth": [1.0], "predicted": [1.0], "marginal": None}
    for other in ("Other", "Bosk"):
        groups = [{"group": name, "n": 90, "people": 40, "told_apart": 1.0} for name in ("Arvenia", other)]
        topology = {"groups": groups, "fields": ["country"], "mutual_information_mean": {}, "dead_experts": {}}
        tables = [
            *group_tables({"country": groups}, "people", least),
            inequity_table({"country": {"worst": other, "worst_value": 0.1}}, least),
            stereotyping_table("Stereotyping by group", {"Arvenia": {}, other: {}}, least),
            distribution_table([panel | entry for entry in groups], least),
            topology_tables(topology, least)[0],
        ]
        assert [said in table.note for table in tables] == [other == "Other"] * len(tables)


def test_data_of_countries_has_profiles_and_no_people(tmp_path, example):
    counts = {"rows": 12, "cells": 12, "answers": 0, "people": 0, "profiles": 4, "questions": 3, "bad_rows": {}}
    groups = {"country": [{"group": name, "n": 3, "emd": {"value": 0.1}} for name in ("Arvenia", "Other")]}
    split = {"counts": counts, "groups": groups, "metrics": {}}
    topology = example.evaluation()["topology"] | {"unit": "profiles", "reference": None}
    evaluation = {"version": 1, "model": {"name": "base"}, "min_group_size": 30, "splits": {"test": split}}
    folder = write_report(evaluation | {"topology": topology}, tmp_path / "out")
    text, page = (folder / "tables.md").read_text(), (folder / "report.html").read_text()
    assert "| Rows | Cells | Answers | Profiles | Questions |" in text
    assert "| none | 0 of 12 |" in text and "| Country | n | EMD ↓ |" in text
    assert "| Group | Profiles | Told apart |" in text and "What routing tells of profiles" in page
    # All that is left is where the intervals come from, and "Other" is a country's name.
    told = "people and questions, or countries and questions"
    assert not re.search("(?i)people", (text + unescape(page)).replace(told, "")) and "fewer than" not in text
    # Answers that were drawn from such shares are nobody's either.
    drawn = {"rows": 400, "answers": 400, "answers without a person": 400, "people": 1, "profiles": 1}
    assert "People" not in counts_table(drawn).columns
    assert "People" in counts_table(drawn | {"answers without a person": 399}).columns
    (table,) = group_tables({"country": [{"group": "Arvenia", "n": 400, "people": 1}]}, "profiles")
    assert table.columns == ["Country", "Profiles", "n"]


def test_bad_rows_are_summed_up():
    assert bad_rows_table({"why": 2, "other": 3}, 50).rows == [["why", "2"], ["other", "3"], ["in total", "5 of 50"]]


def test_names_are_text_and_never_markup(report, example):
    page = (report / "report.html").read_text()
    assert "<script" not in page and "<b>" not in page
    assert "&lt;b&gt;Cintra&lt;/b&gt;" in page and "$Delmar$" in page
    assert example.ATTACK in unescape(page)
    for svg in images(page):
        assert "<b>" not in svg
    assert any("$Delmar$" in svg for svg in images(page))


def test_the_page_loads_nothing(report):
    page = (report / "report.html").read_text()
    assert "default-src 'none'" in page
    targets = re.findall(r'(?:src|srcset|href)="([^"]{0,5})', page)
    assert targets and all(target.startswith(("data:", "#")) for target in targets)
    assert "url(" not in page and "@import" not in page
    for svg in images(page):
        links = re.findall(r'href="(.{0,10})', svg)
        assert all(link.startswith(("#", "data:image")) for link in links)


def test_a_missing_value_has_its_reason():
    metrics = {"collapse_index": {"value": None, "low": None, "high": None, "n": 4, "unit": "question", "note": "why"}}
    name, value, _, n, unit, about = metrics_table(metrics).rows[0]
    assert (value, n, unit) == ("n/a", "4", "question")
    assert about.startswith("why; ")


def test_people_s_choices_and_the_judge_s_verdicts_are_told_apart(report):
    text = (report / "tables.md").read_text()
    assert "| Pair accuracy ↑ | 0.571 [0.551, 0.591] | 0.553 [0.533, 0.573] | 0.588 [0.568, 0.608] | 0.500 |" in text
    assert "| Choice accuracy ↑ | 0.331 [0.311, 0.351] | 0.322 [0.302, 0.342] |  | 0.262 | 141 |" in text
    assert "| longer than the model's context | 19 |" in text
    assert text.index("## People's own choices") < text.index("## Answers: test")
    assert "| Win-rate ↑, a tie is half a win | 0.579 [0.519, 0.639] | 196 | comparison | Wilson's interval" in text
    assert "| At equal length ↑ | 0.552 [0.492, 0.612] | 141 | prompt × profile | what a logistic" in text
    assert "its effect of length is 0.41" in text
    assert "| the answers of both | 200 | 91 | 60 | 45 | 31 | 4 | 398 | 2 | timeout 3, unparsable 2 |" in text
    judge = text.index("| The judge ↑, a tie is half a hit | 0.622 [0.562, 0.682] | 141 |")
    assert judge < text.index("| Chance | 0.500 |") < text.index("| Another person, where one chose as well | n/a |")
    assert "| This model: runs/cuma | 1.082 [1.022, 1.142] | 50 |" in text
    assert "| The other: models/tiny-base | n/a | 0 | no profile is told |" in text
    page = (report / "report.html").read_text()
    for title in ("People&#x27;s own choices", "Does the judge agree with people?", "Variety between profiles"):
        assert title in page


def test_a_judge_that_gave_up_has_no_rate_and_says_why(tmp_path, example):
    found = example.evaluation()
    entry = found["generation"]["answers"]["test"]
    del entry["win_rate"], entry["agreement"]
    entry["note"] = "35% of the last 20 requests failed"
    evaluation = {"version": 1, "model": {"name": "base"}, "splits": {}, "generation": found["generation"]}
    text = (write_report(evaluation, tmp_path / "out") / "tables.md").read_text()
    assert "The judge gave up: 35% of the last 20 requests failed" in text and "Win-rate" not in text
    assert "| This model: runs/cuma | 200 | 200 | 212.4 | 7 | 0 |" in text


def test_a_field_without_information_says_why(report):
    text = (report / "tables.md").read_text()
    assert "| planet | n/a | n/a | n/a | all are in one group |" in text
    page = (report / "report.html").read_text()
    (alt,) = re.findall(r'topology-information".*?alt="([^"]+)"', page)
    assert "by 3 fields" in alt  # it is in no figure


def test_the_markdown_has_the_page_s_numbers(report):
    text = (report / "tables.md").read_text()
    assert "| test | 0.103 [0.091, 0.115] | 0.412 [0.371, 0.449] | 1.100 [1.050, 1.150] |" in text
    assert "\\<b\\>Cintra\\</b\\>" in text and not re.search(r"(?<!\\)<", text)


def test_a_table_keeps_its_columns_whatever_a_name_holds():
    table = Table("a | b", ["x|y", "n"], [["1 | 2\n[3](4)", "5"]])
    lines = table.markdown().splitlines()
    assert lines[0] == "**a \\| b**"
    assert lines[2:] == ["| x\\|y | n |", "| :--- | ---: |", "| 1 \\| 2 [3]\\(4) | 5 |"]


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"value": 0.10349, "low": 0.0912, "high": 0.1147}, "0.103 [0.091, 0.115]"),
        ({"value": 1, "low": None, "high": None}, "1.000"),
        ({"value": -0.0001, "low": -0.2, "high": 0.1}, "0.000 [-0.200, 0.100]"),
        ({"value": float("nan"), "low": 0.0, "high": 1.0}, "n/a"),
        ({"value": None}, "n/a"),
        (None, "n/a"),
    ],
)
def test_estimates_have_one_form(entry, text):
    assert estimate(entry) == text


def test_whole_numbers_are_counts():
    assert (number(12345), number(0.5), number(None)) == ("12,345", "0.500", "n/a")


def test_names_are_made_one_line():
    assert clean("a\x00b\n c\ud800") == "ab c"
    assert clean("می\u200cخواهم") == "می\u200cخواهم"  # a joiner that Persian needs
    assert shorten("The United Republic of Eastern Fenwick", 24) == "The United Republic of…"
    assert shorten("x" * 30, 10) == "x" * 9 + "…"


@pytest.mark.parametrize("dark", [False, True])
def test_colours_stand_out_from_the_background(dark):
    def luminance(color: str) -> float:  # WCAG 2.2, relative luminance
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for color in (INK, MUTED, MODEL, MARGINAL):
        pair = [luminance(DARK[each] if dark else each) for each in (color, PAPER)]
        assert (max(pair) + 0.05) / (min(pair) + 0.05) >= 4.5  # AA, normal text


def test_the_dark_theme_leaves_names_alone():
    assert in_dark(f'<text fill="{INK}">{INK}</text>') == f'<text fill="{DARK[INK]}">{INK}</text>'
