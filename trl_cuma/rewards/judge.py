# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""A reward by an LLM judge: would the person with this profile prefer the completion to a reference answer?"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, Literal

from ..demographics.profile import DemographicProfile, read_profiles
from .batch import read_column, read_texts, strip_reasoning
from .endpoint import ChatEndpoint
from .judge_ledger import JudgeLedger, JudgeStats, format_failures
from .verdict import JUDGE_TEMPLATE, check_template, parse_verdict
from .verdict_cache import VerdictCache

logger = logging.getLogger(__name__)

_KEY_VERSION = "2"  # raise it when the parser reads replies differently
_SWAPPED = {"A": "B", "B": "A", "C": "C"}


class ProfileJudge:
    """
    A reward function for GRPO: 1.0 where the person with the row's profile would prefer the completion to the row's
    reference answer, 0.0 where the reference, 0.5 for a tie, `None` for a row that could not be judged.

    The judge is asked twice, with either answer in first place. A win needs both verdicts; where they differ, the row
    is a tie. `None` is TRL's value for "not scored". [`CuMAGRPOTrainer`] leaves a row out of the step if any reward is
    `None`; TRL's own `GRPOTrainer` only if all are, else it sums the others. TRL's also prints a row that no function
    scored, profile and all; [`CuMAGRPOTrainer`] does not.

    Profile, prompt and answers are sent to the endpoint: use one to which you may send them. A verdict is a language
    model's idea of what such a person prefers, so compare some with those of people before training on it.

    A failure never becomes a score. It is counted by kind ([`JudgeStats`]), logged as a warning with counts only, and
    then `on_failure` or, for a spent budget, `on_budget` decides. TRL logs the shares of wins, ties, order
    disagreements and dropped rows, and of cached verdicts, under `profile_judge/`, or the `name` given.

    With several processes each has its own `concurrency`, budget and failure rate; a cache is shared.

    Args:
        model (`str`): The judge's name at the endpoint.
        base_url (`str`, *optional*): The endpoint, e.g. `"http://localhost:8000/v1"`; by default `OPENAI_BASE_URL`
            from the environment, else OpenAI's.
        api_key (`str`, *optional*): By default `OPENAI_API_KEY` from the environment. It is neither shown nor kept in
            the cache.
        sampling (`Mapping[str, Any]`, *optional*): Arguments of the chat-completions call, by default
            `{"temperature": 0.0}`. More can be `seed`, `max_completion_tokens`, `reasoning_effort` or `extra_body`;
            `{}` suits a model that takes no temperature.
        template (`str`): The question, with `{profile}`, `{prompt}`, `{answer_a}` and `{answer_b}`. Its verdicts are
            `[[A]]`, `[[B]]` and, for a tie, `[[C]]`; see [`parse_verdict`].
        demographic_column (`str`): The column with each row's profile: text or a mapping from field to value.
        reference_column (`str`): The column with the answer to compare with, text or chat messages: a preferred
            answer, or the base model's.
        missing_demographics (`"error"` or `"drop"`): What to do with a row without a profile: stop, or not score it.
        concurrency (`int`): Requests at a time.
        timeout (`float`): Seconds to wait for the endpoint to connect, and again for its reply.
        max_retries (`int`): Retries of a request that met a time-out, a lost connection, or the status 408, 409, 429
            or 5xx; after `Retry-After`, or 0.5, 1, 2, … 8 seconds less a random part.
        cache_path (`str` or `os.PathLike`, *optional*): A file that keeps verdicts between runs, by a hash of the
            question and of everything else that decides the verdict, salted by the file. No text is in it, but who
            has the file can tell whether a question that they know or guess was asked: a new file is its owner's only.
        max_requests (`int`, *optional*): The budget in requests; a retry is no further request.
        max_tokens (`int`, *optional*): The budget in tokens of questions and replies. Requests under way when it is
            spent are still paid: `concurrency` of them at most. A reply without `usage` is then a failure.
        on_budget (`"stop"` or `"drop"`): Whether a question over the budget raises [`JudgeError`], or its row gets no
            score: with `"drop"` the training goes on without the judge.
        on_failure (`"drop"` or `"stop"`): Whether a failed row gets no score, or a failure raises [`JudgeError`].
        max_failure_rate (`float`): The share of the last 200 requests that may fail, from the 20th on; above it
            [`JudgeError`] is raised whatever `on_failure` says. Cached verdicts and a spent budget don't count.
        name (`str`): TRL's name for the reward in its logs. Give two judges of one training two names.

    Raises:
        ImportError: The `openai` package is not installed.
        ValueError: An argument is out of range, or there is no API key.

    Example:

        judge = ProfileJudge("my-judge", base_url="http://localhost:8000/v1", cache_path="verdicts.sqlite")
        trainer = CuMAGRPOTrainer(model, reward_funcs=[judge], args=args, train_dataset=dataset, peft_config=config)
    """

    none_drops_row = True  # read by CuMAGRPOTrainer

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        sampling: Mapping[str, Any] | None = None,
        template: str = JUDGE_TEMPLATE,
        demographic_column: str = "demographic",
        reference_column: str = "reference",
        missing_demographics: Literal["error", "drop"] = "error",
        concurrency: int = 8,
        timeout: float = 60.0,
        max_retries: int = 5,
        cache_path: str | os.PathLike | None = None,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        on_budget: Literal["stop", "drop"] = "stop",
        on_failure: Literal["drop", "stop"] = "drop",
        max_failure_rate: float = 0.2,
        name: str = "profile_judge",
    ) -> None:
        _check_choice("missing_demographics", missing_demographics, ("error", "drop"))
        _check_choice("on_budget", on_budget, ("stop", "drop"))
        _check_choice("on_failure", on_failure, ("drop", "stop"))
        if not isinstance(name, str) or not name:
            raise ValueError(f"`name` is {name!r}, expected a text for TRL's logs.")
        for argument, value, least in (
            ("concurrency", concurrency, 1),
            ("max_retries", max_retries, 0),
            ("max_requests", max_requests, 1),
            ("max_tokens", max_tokens, 1),
        ):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"`{argument}` is {value!r}, expected an integer of at least {least}.")
        if not timeout > 0:
            raise ValueError(f"`timeout` is {timeout!r}, expected seconds above 0.")
        if not 0 <= max_failure_rate <= 1:
            raise ValueError(f"`max_failure_rate` is {max_failure_rate!r}, expected a share between 0 and 1.")
        check_template(template)
        self.__name__ = name  # TRL's name for the reward in its logs
        self.template = template
        self.demographic_column = demographic_column
        self.reference_column = reference_column
        self.missing_demographics = missing_demographics
        self._endpoint = ChatEndpoint(
            model,
            base_url=base_url,
            api_key=api_key,
            timeout=timeout,
            max_retries=max_retries,
            sampling={"temperature": 0.0} if sampling is None else sampling,
        )
        self._cache = None if cache_path is None else VerdictCache(cache_path)
        self._executor = ThreadPoolExecutor(concurrency, thread_name_prefix="judge")
        self._counts_tokens = max_tokens is not None
        self._ledger = JudgeLedger(
            max_requests=max_requests,
            max_tokens=max_tokens,
            on_budget=on_budget,
            on_failure=on_failure,
            max_failure_rate=max_failure_rate,
        )

    def __repr__(self) -> str:
        return f"ProfileJudge(model={self._endpoint.model!r})"

    @property
    def stats(self) -> JudgeStats:
        """A copy of the counts so far."""
        return self._ledger.stats

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Args:
            prompts, completions (`list[str]` or `list[list[dict]]`): As TRL passes them, plain or conversational. Of
                completions and references the reasoning (`<think>…</think>`) is not shown to the judge.
            log_metric (`Callable`, *optional*): TRL's, for the trainer's log.
            columns: The data set's columns, and what else TRL passes.

        Returns:
            `list[float | None]`: One reward per completion.

        Raises:
            ValueError: A column is absent, or a row has no profile or no reference.
            TypeError: A row holds something that is neither text nor messages, or no profile.
            JudgeError: See `on_budget`, `on_failure` and `max_failure_rate`.
        """
        before = self.stats
        profiles = self._profiles(read_column(columns, self.demographic_column, "demographic_column"))
        references = read_column(columns, self.reference_column, "reference_column")
        asked = read_texts(prompts, "the prompt")
        answers = [strip_reasoning(text) for text in read_texts(completions, "the completion")]
        others = [strip_reasoning(text) for text in read_texts(references, f"the {self.reference_column!r} column")]

        rows = [
            None if profile.is_missing else self._questions(profile, *texts)
            for profile, *texts in zip(profiles, asked, answers, others, strict=True)
        ]
        verdicts = self._verdicts(question for row in rows if row is not None and row[0] != row[1] for question in row)
        rewards = [self._reward(row, verdicts) for row in rows]
        self._report(before, self.stats, len(rows), log_metric)
        return rewards

    def _profiles(self, values: Sequence[Any]) -> list[DemographicProfile]:
        try:
            profiles = read_profiles(values)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"The {self.demographic_column!r} column: {error} Name the column with the judge's profiles by "
                "`demographic_column`."
            ) from None
        missing = [row for row, profile in enumerate(profiles) if profile.is_missing]
        if missing and self.missing_demographics == "error":
            raise ValueError(
                f"Row {missing[0]} of the batch has no profile in the {self.demographic_column!r} column "
                f"({len(missing)} of {len(profiles)} rows), so there is no one to judge for. Leave such rows out "
                "of the data set, or set `missing_demographics='drop'` to leave them unscored."
            )
        return profiles

    def _questions(self, profile: DemographicProfile, prompt: str, answer: str, reference: str) -> tuple[str, str]:
        """The question with the answer as A and the reference as B, and the other way round."""
        first, second = (
            self.template.format(profile=profile.text, prompt=prompt, answer_a=a, answer_b=b)
            for a, b in ((answer, reference), (reference, answer))
        )
        return first, second

    # ------------------------------------------------------------------ verdicts
    def _verdicts(self, questions: Iterable[str]) -> dict[str, str]:
        """The verdict of each question, each asked once; a question that failed is absent."""
        keys = {question: self._key(question) for question in questions}
        known = {} if self._cache is None else self._cache.read(keys.values())
        verdicts = {question: known[key] for question, key in keys.items() if key in known}
        self._ledger.count(cache_hits=len(verdicts))
        futures = {
            self._executor.submit(self._ask, question, key): question
            for question, key in keys.items()
            if question not in verdicts
        }
        try:
            for future in as_completed(futures):
                verdict = future.result()
                if verdict is not None:
                    verdicts[futures[future]] = verdict
        finally:
            for future in futures:
                future.cancel()
        return verdicts

    def _key(self, question: str) -> bytes:
        content = json.dumps([_KEY_VERSION, self._endpoint.identity, question])
        return hashlib.sha256(content.encode()).digest()

    def _ask(self, question: str, key: bytes) -> str | None:
        """One request, counted; `None` if it failed. Runs in the executor's threads."""
        if not self._ledger.begin_request():
            return None
        reply = self._endpoint.ask(question)
        verdict, failure = None, reply.failure
        if failure is None and self._counts_tokens and reply.tokens is None:
            failure = "no_usage"  # what is not counted cannot be kept within a budget
        if failure is None:
            verdict = parse_verdict(reply.text)
            failure = "unparsable" if verdict is None else None
        if verdict is not None and self._cache is not None:  # at once: what was paid for outlives an interruption
            self._cache.write(key, verdict)
        self._ledger.end_request(failure, reply.tokens)
        return verdict

    # ------------------------------------------------------------------ scores and what is told of them
    def _reward(self, row: tuple[str, str] | None, verdicts: Mapping[str, str]) -> float | None:
        """Of the question with the completion as answer A, and that with the completion as answer B."""
        if row is None:
            self._ledger.count(missing_profiles=1, dropped=1)
            return None
        if row[0] == row[1]:  # the completion is the reference: nothing to ask
            self._ledger.count(ties=1)
            return 0.5
        first, second = (verdicts.get(question) for question in row)
        if first is None or second is None:
            self._ledger.count(dropped=1)
            return None
        agreed = first == _SWAPPED[second]
        if agreed and first == "A":
            self._ledger.count(wins=1)
            return 1.0
        if agreed and first == "B":
            self._ledger.count(losses=1)
            return 0.0
        self._ledger.count(ties=1, order_disagreements=int(not agreed))
        return 0.5

    def _report(self, before: JudgeStats, after: JudgeStats, rows: int, log_metric: Callable | None) -> None:
        failures = after.failures - before.failures
        if failures:
            logger.warning(
                "The judge left %d of %d rows unscored; requests that failed: %s.",
                after.dropped - before.dropped,
                rows,
                format_failures(failures),
            )
        if log_metric is None:
            return
        wins, ties, losses = (getattr(after, name) - getattr(before, name) for name in ("wins", "ties", "losses"))
        scored = wins + ties + losses
        hits = after.cache_hits - before.cache_hits
        verdicts = hits + after.requests - before.requests
        for name, count, total in (
            ("win_rate", wins, scored),
            ("tie_rate", ties, scored),
            ("order_disagreement_rate", after.order_disagreements - before.order_disagreements, scored),
            ("dropped_rate", after.dropped - before.dropped, rows),
            ("cache_hit_rate", hits, verdicts),
        ):
            if total:
                log_metric(f"{self.__name__}/{name}", count / total)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` is {value!r}, expected one of {', '.join(map(repr, choices))}.")
