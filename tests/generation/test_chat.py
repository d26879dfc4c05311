# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""`trl-cuma chat` as it is scripted, as it is typed, and what it says of input that it can't use."""

import contextlib
import io
import itertools
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from trl_cuma.cli import main
from trl_cuma.generation.answering import Question, Sampling
from trl_cuma.generation.chat import Chat, chat_parser
from trl_cuma.generation.chat_view import make_view

KENYA, JAPAN = {"country": "Kenya", "age": "18"}, {"country": "Korea, South"}
PROFILES = ["--profile", "country=Kenya,age=18", "--profile", json.dumps(JAPAN)]


@pytest.fixture
def chat(saved_adapter, answerer, capsys):  # the answerer has imported what writes to the output when it is imported
    """Run `trl-cuma chat` on the saved adapter; returns code, output and error output."""

    def run(*args, **adapter):
        code = main(["chat", "--adapter", str(saved_adapter(**adapter)), "--max_new_tokens", "6", *args])
        return code, *capsys.readouterr()

    return run


def expected(answerer, turns, profile, **settings):
    (reply,) = answerer.answer([Question(answerer.encode(turns), profile, Sampling(6, **settings))])
    return reply.text


def user(text):
    return {"role": "user", "content": text}


# ---------------------------------------------------------------------- scripted
def test_each_profile_has_its_own_answer_and_its_own_history(chat, answerer):
    code, out, err = chat(*PROFILES, "--prompt", "Tea or coffee ?", "--prompt", "Why ?")
    assert code == 0
    blocks = []
    first = [expected(answerer, [user("Tea or coffee ?")], who) for who in (KENYA, JAPAN)]
    assert first[0] != first[1]
    then = [
        expected(answerer, [user("Tea or coffee ?"), {"role": "assistant", "content": said}, user("Why ?")], who)
        for who, said in zip((KENYA, JAPAN), first, strict=True)
    ]
    for kenya, japan in (first, then):
        blocks.append(f"[profile 1: age, country]\n{kenya}\n\n[profile 2: country]\n{japan}\n\n")
    assert out == "".join(blocks)
    assert "cut off at `--max_new_tokens` 6" in err
    assert "Kenya" not in out + err and "Korea" not in out + err  # the output may be a file


def test_lines_of_the_standard_input_are_turns(chat, answerer, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Tea or coffee ?\n\n  \n"))
    code, out, _ = chat(*PROFILES[:2])
    assert (code, out) == (0, expected(answerer, [user("Tea or coffee ?")], KENYA) + "\n")  # of one, the answer alone


def test_settings_reach_the_model(chat, answerer):
    _, out, _ = chat(
        *PROFILES[:2], "--prompt", "a", "--prompt", "b", "--temperature", "1.2", "--top_p", "0.9", "--seed", "7"
    )
    said = expected(answerer, [user("a")], KENYA, temperature=1.2, top_p=0.9, seed=7)
    turns = [user("a"), {"role": "assistant", "content": said}, user("b")]
    then = expected(answerer, turns, KENYA, temperature=1.2, top_p=0.9, seed=8)  # each turn draws anew
    assert out == f"{said}\n{then}\n"
    _, out, _ = chat(*PROFILES[:2], "--prompt", "a", "--system", "money")
    assert out == expected(answerer, [{"role": "system", "content": "money"}, user("a")], KENYA) + "\n"


def test_without_a_chat_template_prompts_are_continued_as_they_are(chat):
    code, out, err = chat(*PROFILES[:2], "--prompt", "Tea or", "--prompt", "Tea or", chat=False)
    first, second = out.splitlines()
    assert code == 0 and first == second  # no history
    assert "no chat template: each prompt is continued as plain text" in err
    code, _, err = chat("--profile", "country=Japan", "--prompt", "Tea", "--system", "x", chat=False)
    assert code == 2 and "`--system` needs a conversation" in err


def test_what_the_adapter_does_not_know_is_said_with_what_it_knows(chat):
    code, _, err = chat("--profile", "country=Zanzibar,age=18,planet=Zanzibar", "--prompt", "a")
    assert code == 0
    assert "Warning: The profile has the field planet, which the adapter doesn't know" in err
    assert "field country that the adapter doesn't know; it counts as not given. It knows Japan; Kenya; Kor" in err
    assert "Zanzibar" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--profile", "planet=Zanzibar"],
            "The profile has no field that the adapter knows. It knows the fields",
        ),
        ([], "The profile is missing or says nothing, and the adapter needs one. It knows the fields age, country."),
        (["--profile", "country=Korea, South"], "`--profile` number 1: part 2, between commas, is no `field=value`"),
        (["--profile", "age=18", "--temperature", "-1"], "`temperature` is -1.0"),
        (["--profile", "age=18", "--top_p", "0.5"], "`top_p` needs a `temperature` above 0"),
        (["--profile", "age=18", "--max_new_tokens", "100000"], "more than the model's context"),
        (["--profile", "age=18", "--model", "./nowhere"], "`--model` is './nowhere', and there is no such file"),
        (["--profile", "age=18", "--adapter", "./nowhere"], "`--adapter` is './nowhere', and there is no such file"),
    ],
)
def test_input_that_cannot_be_used_is_one_line(chat, arguments, message):
    code, out, err = chat("--prompt", "a", *arguments)
    assert code == 2 and out == ""
    assert err.splitlines()[-1].startswith("trl-cuma chat: error: ") and message in err and "Zanzibar" not in err


def test_something_must_be_named(capsys):
    assert main(["chat", "--profile", "a=b"]) == 2
    assert "Name an adapter with `--adapter`" in capsys.readouterr().err


# ---------------------------------------------------------------------- typed
@pytest.fixture
def typed(monkeypatch, capsys, answerer):
    """A chat in which these lines are typed; returns what was said."""

    def run(*lines, profiles=(KENYA,)):
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        script = iter(lines)

        def read(_):
            try:
                return next(script)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)
        args = chat_parser().parse_args(["--max_new_tokens", "6"])
        assert Chat(answerer, profiles, args).run() == 0
        return capsys.readouterr()

    return run


def test_clear_forgets_and_errors_do_not_end_it(typed, answerer):
    context = answerer.model.config.max_position_embeddings
    said = typed("a", "/clear", "a", "b " * context, "/what", "/exit", "never asked")
    once = expected(answerer, [user("a")], KENYA)
    assert said.out.strip("\n").split("\n") == [once, once]
    assert "Error: The prompt has" in said.err
    assert said.err.count("/clear forgets") == 2  # at the start, and at what it doesn't know


def test_an_interrupted_answer_is_forgotten(typed, answerer, monkeypatch):
    answer, calls = answerer.answer, itertools.count()

    def interrupted(*args, **kwargs):
        if next(calls) == 0:
            raise KeyboardInterrupt
        return answer(*args, **kwargs)

    monkeypatch.setattr(answerer, "answer", interrupted)
    said = typed("b", "a")
    assert "Stopped; the turn is forgotten." in said.err
    monkeypatch.undo()
    assert said.out.strip("\n") == expected(answerer, [user("a")], KENYA)


def test_a_terminal_shows_columns_with_what_was_typed():
    console = Console(file=io.StringIO(), force_terminal=True, width=90, height=20)
    with make_view([KENYA, JAPAN], console) as view:
        view.add(0, "Tea, [b]of course[/b]")
        view.add(1, "Coffee")
    shown = console.file.getvalue()
    assert "age=18, country=Kenya" in shown and "country=Korea, South" in shown
    line = next(line for line in shown.splitlines()[::-1] if "Coffee" in line)
    assert line.index("Tea, [b]of course[/b]") < line.index("Coffee")  # side by side, and markup is text


@pytest.mark.slow  # a fresh process imports everything
def test_in_a_real_terminal(saved_adapter):
    terminal, inner = pty.openpty()
    arguments = ["chat", "--adapter", str(saved_adapter()), "--max_new_tokens", "4", *PROFILES]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "90", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [sys.executable, "-m", "trl_cuma.cli", *arguments],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        env=environment,
        start_new_session=True,
    )
    os.close(inner)
    os.write(terminal, b"Tea or coffee ?\n/exit\n")
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while piece := os.read(terminal, 4096):
            shown += piece
    os.close(terminal)
    assert process.wait() == 0, shown
    assert b"profile 1: age=18, country=Kenya" in shown and b"Each line is a turn." in shown
