# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What a judge's requests cost, how they fail, and when that is enough."""

import copy
import threading
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field

FAILURE_WINDOW = 200
"""Number of latest requests over which the failure rate is taken."""
FAILURE_MINIMUM = 20
"""Number of requests before a failure rate means anything."""


class JudgeError(RuntimeError):
    """The judge failed where the settings say to stop. The message names kinds and counts, never a text."""


@dataclass
class JudgeStats:
    """
    What a judge has done since it was made.

    Attributes:
        wins, losses, ties (`int`): Rows that were scored 1, 0 and 0.5.
        order_disagreements (`int`): The ties whose two orders got different verdicts: the judge's position bias.
        dropped (`int`): Rows that got no score, for a failure or for a missing profile.
        missing_profiles (`int`): The dropped rows without a profile.
        requests (`int`): Requests sent, not counting retries.
        cache_hits (`int`): Verdicts that the cache knew.
        tokens (`int`): Tokens used, as far as the server tells.
        failures (`Counter[str]`): Requests that failed, by kind: `timeout`, `connection`, `http_<status>`, `malformed`
            (the body is no chat completion), `truncated` (cut off before the verdict), `unparsable` (no verdict, or an
            ambiguous one), `no_usage` (see `max_tokens`), `budget` (not sent).
    """

    wins: int = 0
    losses: int = 0
    ties: int = 0
    order_disagreements: int = 0
    dropped: int = 0
    missing_profiles: int = 0
    requests: int = 0
    cache_hits: int = 0
    tokens: int = 0
    failures: Counter[str] = field(default_factory=Counter)


class JudgeLedger:
    """
    The counts of one judge, and the limits that they are held to. May be used from several threads.

    Args: see [`ProfileJudge`].
    """

    def __init__(
        self,
        *,
        max_requests: int | None,
        max_tokens: int | None,
        on_budget: str,
        on_failure: str,
        max_failure_rate: float,
    ) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.on_budget = on_budget
        self.on_failure = on_failure
        self.max_failure_rate = max_failure_rate
        self._lock = threading.Lock()  # guards what follows
        self._stats = JudgeStats()
        self._failed: deque[bool] = deque(maxlen=FAILURE_WINDOW)

    @property
    def stats(self) -> JudgeStats:
        """A copy of the counts so far."""
        with self._lock:
            return copy.deepcopy(self._stats)

    def count(self, **counts: int) -> None:
        """Add to fields of the statistics."""
        with self._lock:
            for name, count in counts.items():
                setattr(self._stats, name, getattr(self._stats, name) + count)

    def begin_request(self) -> bool:
        """
        Count a request that is about to be sent; `False` if the budget does not allow it.

        Raises:
            JudgeError: it does not, and `on_budget` is `"stop"`.
        """
        with self._lock:
            spent = self._spent_budget()
            if spent is None:
                self._stats.requests += 1
                return True
            self._stats.failures["budget"] += 1
            if self.on_budget == "stop":
                raise JudgeError(
                    f"The judge's budget is spent: {spent}. Raise it, or set `on_budget='drop'` to leave what is over "
                    "it unscored."
                )
            return False

    def end_request(self, failure: str | None, tokens: int | None) -> None:
        """
        Count what came of a request.

        Raises:
            JudgeError: it failed and `on_failure` is `"stop"`, or too many of the latest requests have.
        """
        with self._lock:
            self._stats.tokens += tokens or 0
            self._failed.append(failure is not None)
            if failure is not None:
                self._stats.failures[failure] += 1
                self._check_failures(failure)

    def _spent_budget(self) -> str | None:
        if self.max_requests is not None and self._stats.requests >= self.max_requests:
            return f"{self._stats.requests} requests of `max_requests={self.max_requests}`"
        if self.max_tokens is not None and self._stats.tokens >= self.max_tokens:
            return f"{self._stats.tokens} tokens of `max_tokens={self.max_tokens}`"
        return None

    def _check_failures(self, failure: str) -> None:
        counts = f"{self._stats.requests} requests so far, failures: {format_failures(self._stats.failures)}"
        if self.on_failure == "stop":
            raise JudgeError(
                f"A request to the judge failed ({failure}), and `on_failure` is 'stop'; {counts}. See to the "
                "endpoint, or set `on_failure='drop'` to leave such rows unscored."
            )
        rate = sum(self._failed) / len(self._failed)
        if len(self._failed) >= FAILURE_MINIMUM and rate > self.max_failure_rate:
            raise JudgeError(
                f"{rate:.0%} of the judge's last {len(self._failed)} requests failed, more than "
                f"`max_failure_rate={self.max_failure_rate}`; {counts}. See to the endpoint (its address, key, model "
                "and limits), or raise `max_failure_rate`."
            )


def format_failures(failures: Mapping[str, int]) -> str:
    """`"http_500 1, timeout 3"`."""
    return ", ".join(f"{kind} {count}" for kind, count in sorted(failures.items()))
