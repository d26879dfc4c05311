# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from openai import OpenAI

from trl_cuma import DemographicProfile
from trl_cuma.rewards import JUDGE_TEMPLATE, ProfileJudge

from .conftest import KEY, Response, section

BRAZIL, JAPAN = {"country": "Brazil", "age": None}, {"country": "Japan", "age": None}


def test_a_completion_wins_where_both_orders_prefer_it_for_this_person(server, make_judge):
    judge = make_judge()
    rewards = judge(
        prompts=["Where is it?"] * 4,
        completions=["in Brazil", "in Brazil", "in Peru", "it is in Japan"],
        completion_ids=[[1]] * 4,
        demographic=[BRAZIL, JAPAN, BRAZIL, "country: Japan"],
        reference=["in Japan", "in Japan", "in Chile", "in Brazil"],
    )
    assert rewards == [1.0, 0.0, 0.5, 1.0]
    stats = judge.stats
    assert (stats.wins, stats.losses, stats.ties, stats.order_disagreements, stats.dropped) == (2, 1, 1, 0, 0)
    assert stats.requests == len(server.bodies) == 8  # two orders of four rows
    assert stats.tokens == 80
    assert not stats.failures
    orders = {(section(q, "answer_a"), section(q, "answer_b")) for q in server.questions}
    assert orders >= {
        ("in Brazil", "in Japan"),
        ("in Japan", "in Brazil"),
        ("in Peru", "in Chile"),
        ("in Chile", "in Peru"),
    }
    assert {section(q, "person") for q in server.questions} == {"country: Brazil", "country: Japan"}


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_judge_that_looks_at_the_position_only_gives_ties(server, make_judge, letter):
    server.respond = lambda question: f"[[{letter}]]"
    judge = make_judge()
    assert judge(["q"] * 3, ["x", "y", "z"], demographic=[BRAZIL] * 3, reference=["r"] * 3) == [0.5] * 3
    assert (judge.stats.ties, judge.stats.order_disagreements) == (3, 3)


def test_a_tie_in_one_order_only_is_a_tie_and_a_disagreement(server, make_judge):
    server.respond = lambda question: "[[C]]" if section(question, "answer_a") == "x" else "[[B]]"
    judge = make_judge()
    assert judge(["q"], ["x"], demographic=[BRAZIL], reference=["r"]) == [0.5]
    assert judge.stats.order_disagreements == 1


def test_equal_answers_are_a_tie_without_a_request_and_equal_questions_are_asked_once(server, make_judge):
    judge = make_judge()
    assert judge(["q"], [" same\n"], demographic=[BRAZIL], reference=["same"]) == [0.5]
    assert (judge.stats.requests, judge.stats.order_disagreements) == (0, 0)
    judge(["q"] * 4, ["x"] * 4, demographic=[BRAZIL] * 4, reference=["r"] * 4)
    assert judge.stats.requests == len(server.bodies) == 2


def test_conversations_and_reasoning_are_shown_as_the_person_saw_them(server, make_judge):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is it?"}]
    completion = [{"role": "assistant", "content": "<think>Japan or Brazil?</think>\nin {Brazil}"}]
    reference = [{"role": "assistant", "content": "in Japan"}]
    profile = DemographicProfile.from_value(BRAZIL)
    judge = make_judge()
    assert judge([prompt], [completion], demographic=[profile], reference=[reference]) == [1.0]
    assert section(server.questions[0], "conversation") == "system: Be brief.\n\nuser: Where is it?"
    assert {section(q, "answer_a") for q in server.questions} == {"in {Brazil}", "in Japan"}


def test_the_request_is_what_the_settings_say(server, make_judge):
    judge = make_judge("m-1", template="{profile}|{prompt}|{answer_a}|{answer_b} [[A]]?")
    server.respond = lambda question: "[[A]]"
    judge(["q"], ["x"], who=[BRAZIL], best=["r"], **{"demographic": [JAPAN], "reference": ["s"]})
    assert sorted(server.questions) == ["country: Japan|q|s|x [[A]]?", "country: Japan|q|x|s [[A]]?"]
    assert server.authorizations == [f"Bearer {KEY}"] * 2
    assert {key: server.bodies[0][key] for key in ("model", "temperature")} == {"model": "m-1", "temperature": 0.0}

    other = make_judge(
        sampling={"seed": 3, "extra_body": {"top_k": 1}}, demographic_column="who", reference_column="best"
    )
    other(["q"], ["x"], who=[BRAZIL], best=["r"])
    assert (server.bodies[-1]["seed"], server.bodies[-1]["top_k"]) == (3, 1)
    assert "temperature" not in server.bodies[-1]
    assert section(server.questions[-1], "person") == "country: Brazil"


def test_no_more_requests_at_a_time_than_allowed(server, make_judge):
    together = threading.Barrier(3)

    def respond(question: str) -> str:
        together.wait(10)  # breaks, and fails the request, unless three come at once
        time.sleep(0.02)  # for a fourth to show itself
        return "[[C]]"

    server.respond = respond
    judge = make_judge(concurrency=3)
    # 18 questions: six full waves
    assert judge(["q"] * 9, list("abcdefghi"), demographic=[BRAZIL] * 9, reference=["r"] * 9) == [0.5] * 9
    assert server.most_active == 3


def test_metrics_reach_trls_log(make_judge):
    logged: dict[str, float] = {}
    judge = make_judge(missing_demographics="drop")
    judge(
        ["q"] * 4,
        ["in Brazil", "in Japan", "in Peru", "in Brazil"],
        demographic=[BRAZIL, BRAZIL, BRAZIL, None],
        reference=["in Japan", "in Brazil", "in Chile", "in Japan"],
        log_metric=logged.__setitem__,
    )
    third = pytest.approx(1 / 3)
    assert logged == {
        "profile_judge/win_rate": third,
        "profile_judge/tie_rate": third,
        "profile_judge/order_disagreement_rate": 0.0,
        "profile_judge/dropped_rate": 0.25,
        "profile_judge/cache_hit_rate": 0.0,
    }


def test_two_judges_of_one_training_log_under_their_own_names(make_judge):
    logged: dict[str, float] = {}
    for judge in (make_judge(), make_judge(name="strict_judge")):
        judge(["q"], ["in Brazil"], demographic=[BRAZIL], reference=["in Japan"], log_metric=logged.__setitem__)
    assert judge.__name__ == "strict_judge"
    assert {key for key in logged if key.endswith("/win_rate")} == {"profile_judge/win_rate", "strict_judge/win_rate"}


# ---------------------------------------------------------------------- the cache
ROW = {"prompts": ["Where is it?"], "completions": ["in Brazil"], "demographic": [BRAZIL], "reference": ["in Japan"]}


def test_the_cache_answers_a_second_time_also_for_another_object(server, make_judge, tmp_path):
    path = tmp_path / "deep" / "verdicts.sqlite"
    first = make_judge(cache_path=path)
    assert first(**ROW) == first(**ROW) == [1.0]
    assert (first.stats.requests, first.stats.cache_hits) == (2, 2)
    again = make_judge(cache_path=path, api_key="another key", concurrency=1, timeout=3.0)
    assert again(**ROW) == [1.0]
    assert (again.stats.requests, again.stats.cache_hits) == (0, 2)
    assert len(server.bodies) == 2


@pytest.mark.slow  # a fresh process imports everything
def test_the_cache_answers_in_another_process(server, make_judge, tmp_path):
    path = tmp_path / "verdicts.sqlite"
    make_judge(cache_path=path)(**ROW)
    script = f"""
from trl_cuma.rewards import ProfileJudge
judge = ProfileJudge("judge", base_url={server.url!r}, api_key="another key", cache_path={str(path)!r})
print(judge(**{ROW!r}), judge.stats.requests)
"""
    again = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True
    )
    assert again.stdout.split() == ["[1.0]", "0"]
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {"demographic": [JAPAN]}),
        ({}, {"prompts": ["Where was it?"]}),
        ({}, {"completions": ["in Brasil"]}),
        ({}, {"reference": ["in Tokyo"]}),
        ({"model": "another"}, {}),
        ({"sampling": {"temperature": 0.5}}, {}),
        ({"template": JUDGE_TEMPLATE + " "}, {}),
    ],
)
def test_the_cache_knows_what_decides_a_verdict(server, make_judge, tmp_path, settings, changes):
    path = tmp_path / "verdicts.sqlite"
    make_judge(cache_path=path)(**ROW)
    make_judge(cache_path=path, **settings)(**(ROW | changes))
    assert len(server.bodies) == 4


def test_the_cache_knows_the_endpoint(server, make_judge, tmp_path):
    path = tmp_path / "verdicts.sqlite"
    make_judge(cache_path=path)(**ROW)
    make_judge(cache_path=path, base_url=server.url.replace("/v1", "/other/v1"))(**ROW)
    assert len(server.bodies) == 4


def test_the_cache_file_holds_no_text(make_judge, tmp_path):
    path = tmp_path / "verdicts.sqlite"
    make_judge(cache_path=path)(**ROW)
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir()).lower()
    assert b"verdicts" in content  # the table's name: this is the file
    for text in ("brazil", "japan", "country", "where", "prefer", "judge", "127.0.0.1", KEY):
        assert text.encode() not in content


def test_only_good_verdicts_are_kept(server, make_judge, tmp_path):
    path = tmp_path / "verdicts.sqlite"
    server.respond = lambda question: Response("[[A", finish_reason="stop")
    assert make_judge(cache_path=path)(**ROW) == [None]
    server.respond = lambda question: Response("[[A]]", finish_reason="length")
    assert make_judge(cache_path=path)(**ROW) == [None]
    server.respond = lambda question: "[[C]]"
    assert make_judge(cache_path=path)(**ROW) == [0.5]
    assert len(server.bodies) == 6


# ---------------------------------------------------------------------- settings and rows
@pytest.mark.parametrize("missing", [None, "", "Prefer not to say", {"country": None}, {}])
def test_a_row_without_a_profile_is_an_error_or_dropped(server, make_judge, missing):
    rows = {**ROW, "prompts": ["q"] * 2, "completions": ["in Brazil"] * 2, "reference": ["in Japan"] * 2}
    rows["demographic"] = [BRAZIL, missing]
    with pytest.raises(ValueError, match="Row 1 of the batch has no profile in the 'demographic' column"):
        make_judge()(**rows)
    assert not server.bodies
    judge = make_judge(missing_demographics="drop")
    assert judge(**rows) == [1.0, None]
    assert (judge.stats.missing_profiles, judge.stats.dropped, judge.stats.wins) == (1, 1, 1)


def test_errors_name_the_column_and_the_row(make_judge):
    judge = make_judge()
    with pytest.raises(
        ValueError, match=r"no 'reference' column; there are \['chosen', 'demographic'\].*reference_col"
    ):
        judge(["q"], ["x"], demographic=[BRAZIL], chosen=["r"], trainer_state=None)
    with pytest.raises(ValueError, match="no 'demographic' column"):
        judge(["q"], ["x"], reference=["r"])
    with pytest.raises(ValueError, match="Row 1 of the batch has no text in the 'reference' column"):
        judge(["q"] * 2, ["x"] * 2, demographic=[BRAZIL] * 2, reference=["r", None])
    with pytest.raises(TypeError, match="'demographic' column: Row 1: .*a vector, not a profile"):
        judge(["q"] * 2, ["x"] * 2, demographic=[BRAZIL, [0.5, 0.25]], reference=["r"] * 2)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("on_failure", "ignore"),
        ("on_budget", "ignore"),
        ("name", ""),
        ("missing_demographics", "zero"),
        ("concurrency", 0),
        ("max_retries", -1),
        ("max_requests", 0),
        ("max_tokens", 1.5),
        ("timeout", 0),
        ("max_failure_rate", 1.1),
        ("template", "{prompt}"),
        ("sampling", {"stream": True}),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(make_judge, setting, value):
    with pytest.raises(ValueError, match=f"`{setting}`"):
        make_judge(**{setting: value})


def test_the_key_comes_from_the_environment_or_is_asked_for(server, make_judge, monkeypatch):
    with pytest.raises(ValueError, match="pass `api_key` or set the environment variable OPENAI_API_KEY"):
        make_judge(api_key=None)
    monkeypatch.setenv("OPENAI_API_KEY", "key-of-the-environment")
    make_judge(api_key=None)(**ROW)
    assert set(server.authorizations) == {"Bearer key-of-the-environment"}


def test_without_the_client_the_error_says_how_to_get_it(make_judge, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r"The judge needs openai, .*pip install 'trl_cuma\[judge\]'"):
        make_judge()


def test_the_fake_server_speaks_what_the_client_expects(server):
    """The tests stand on it: a reply that the official client reads in full."""
    client = OpenAI(base_url=server.url, api_key=KEY, max_retries=0)
    completion = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "q"}])
    assert completion.choices[0].message.content == "They would say so.\n[[C]]"
    assert completion.usage.total_tokens == 10
    assert json.loads(completion.model_dump_json())["object"] == "chat.completion"


def test_it_has_a_name_for_trl_and_shows_no_key(make_judge):
    judge = make_judge()
    assert judge.__name__ == "profile_judge"
    assert repr(judge) == "ProfileJudge(model='judge')"
    assert isinstance(judge, ProfileJudge)
