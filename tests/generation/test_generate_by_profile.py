# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The example: prompts × profiles in, JSON lines out, whole or not at all."""

import importlib.util
import json
import stat
from pathlib import Path

import pytest

from trl_cuma.generation.answering import Question, Sampling

ROOT = Path(__file__).parents[2]
KENYA, KOREA = {"country": "Kenya", "age": "18"}, {"country": "Korea, South", "age": "70"}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "generate_by_profile.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(example, saved_adapter, tmp_path):
    def main(*args):
        example.main(["--adapter", str(saved_adapter()), "--output", str(tmp_path / "out.jsonl"), *args])
        return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]

    return main


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_every_prompt_for_every_profile(run, answerer, tmp_path, capsys, kind):
    people, prompts = tmp_path / f"people.{kind}", tmp_path / "prompts.jsonl"
    rows = {
        "csv": 'country,age\nKenya,18\n"Korea, South",70\n',
        "jsonl": f"{json.dumps(KENYA)}\n\n{json.dumps(KOREA)}\n",
    }
    people.write_text(rows[kind])
    turns = [{"role": "user", "content": "What makes a good life ?"}]
    prompts.write_text(json.dumps({"prompt": turns}))
    rows = run("--profiles", str(people), "--prompt", "a", "--prompts", str(prompts), "--max_new_tokens", "5")
    assert [(row["prompt_number"], row["profile_number"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    asked = [[{"role": "user", "content": "a"}], turns]
    for row in rows:
        question = Question(
            answerer.encode(asked[row["prompt_number"] - 1]), [KENYA, KOREA][row["profile_number"] - 1], Sampling(5)
        )
        (reply,) = answerer.answer([question])
        assert (row["answer"], row["tokens"], row["finished"]) == (reply.text, 5, False)
        assert row["prompt"] == asked[row["prompt_number"] - 1]
    assert len({row["answer"] for row in rows}) > 2
    out = tmp_path / "out.jsonl"
    assert "Korea" not in out.read_text() + "".join(capsys.readouterr())
    assert stat.S_IMODE(out.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("people", "arguments", "message"),
    [
        ("country,age\nKenya\n", [], "row 1 has more or fewer values"),
        ("planet\nZanzibar\n", [], "Profile 1 of `--profiles` has no field that the adapter knows"),
        ("country\nJapan\n", ["--prompt", ""], "A prompt is missing or no text"),
        ("country\nJapan\n", ["--prompts", "people.jsonl"], "people.jsonl: line 2 is no JSON object"),
        ("country\nJapan\n", ["--prompts", "numbers.jsonl"], "A prompt is missing or no text"),
        ("country\nJapan\n", ["--batch_size", "0"], "`batch_size` is 0"),
        ("country\nJapan\n", ["--output", "people.csv"], "`--output` people.csv is there already"),
    ],
)
def test_what_cannot_be_used_writes_nothing(run, tmp_path, monkeypatch, people, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("people.csv").write_text(people)
    Path("people.jsonl").write_text('{"prompt": "a"}\n[1\n')
    Path("numbers.jsonl").write_text('{"prompt": 3}\n')
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError)) as caught:
        run("--profiles", "people.csv", *(arguments if "--prompt" in arguments else ["--prompt", "a", *arguments]))
    assert message in str(caught.value) and "Zanzibar" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
