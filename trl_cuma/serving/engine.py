# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""Requests to batches: one thread that decodes whatever waits, for different people and with different settings."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from ..generation.answering import Answerer, Question
from ..generation.replies import Reply
from .metrics import Metrics

logger = logging.getLogger(__name__)


class QueueFull(Exception):
    """As many questions wait as may."""


class Closed(Exception):
    """The server is shutting down."""


class Job:
    """
    A question that waits or is being answered.

    Attributes:
        reply (`Future[Reply]`): The answer, or the exception of its batch.
    """

    def __init__(self, question: Question, on_text: Callable[[str], Any] | None = None) -> None:
        self.question = question
        self.on_text = on_text
        self.reply: Future[Reply] = Future()
        self._cancelled = False

    def cancel(self) -> None:
        """Nobody waits for it any more: it leaves the queue, or the batch at its next token."""
        self._cancelled = True
        self.reply.cancel()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._cancelled


class Engine:
    """
    A thread that answers jobs in batches. A batch begins with the job that has waited longest and takes what else
    waits or comes within `wait_ms`; it runs to its longest answer, while shorter ones are handed back as they end.
    Every row has its own profile, sampling settings, limit and stop texts: nothing is grouped by them.

    Args:
        answerer ([`Answerer`]): The model.
        metrics ([`Metrics`]): Counts.
        max_batch (`int`): Rows of a batch.
        wait_ms (`float`): How long a batch waits for company, milliseconds.
        max_queue (`int`): Jobs that may wait.
    """

    def __init__(
        self, answerer: Answerer, metrics: Metrics, *, max_batch: int = 16, wait_ms: float = 5.0, max_queue: int = 128
    ) -> None:
        self.answerer = answerer
        self.metrics = metrics
        self.max_batch = max_batch
        self.wait_seconds = wait_ms / 1000
        self.max_queue = max_queue
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        metrics.queue_length.set_function(lambda: len(self._waiting))
        self._thread = threading.Thread(target=self._run, name="trl-cuma-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it still answers."""
        return self._thread.is_alive() and not self._closed

    def submit(self, jobs: Sequence[Job]) -> None:
        """
        Let jobs wait for their turn, all or none.

        Raises:
            QueueFull: There is no room for them.
            Closed: The engine was closed.
        """
        with self._changed:
            if self._closed:
                raise Closed
            if len(self._waiting) + len(jobs) > self.max_queue:
                raise QueueFull
            self._waiting.extend(jobs)
            self._changed.notify()

    def close(self) -> None:
        """End the thread: the running batch stops at its next token, and what waits fails."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while batch := self._next_batch():
            self._answer(batch)
        for job in self._waiting:
            _fail(job, Closed())

    def _next_batch(self) -> list[Job]:
        """The jobs of the next batch; none when the engine is closed."""
        batch: list[Job] = []
        deadline = None
        with self._changed:
            while True:
                while self._waiting and len(batch) < self.max_batch and not self._closed:
                    job = self._waiting.popleft()
                    if not job.is_cancelled:
                        batch.append(job)
                if self._closed:
                    self._waiting.extend(batch)
                    return []
                if batch and deadline is None:
                    deadline = time.monotonic() + self.wait_seconds
                rest = None if deadline is None else deadline - time.monotonic()
                if len(batch) >= self.max_batch or (rest is not None and rest <= 0):
                    return batch
                self._changed.wait(rest)

    def _answer(self, batch: list[Job]) -> None:
        self.metrics.batch_size.observe(len(batch))
        try:
            self.answerer.answer(
                [job.question for job in batch],
                on_text=lambda row, text: _hand_out(batch[row], text),
                on_reply=lambda row, reply: self._finish(batch[row], reply),
                cancelled=lambda row: batch[row].is_cancelled or self._closed,
            )
        except Exception as error:  # whatever it is, the next batch is another
            log_failure(f"A batch of {len(batch)} failed", error)
            self.metrics.batch_failures.inc()
            for job in batch:
                _fail(job, error)

    def _finish(self, job: Job, reply: Reply) -> None:
        self.metrics.count(reply)
        if self._closed:
            _fail(job, Closed())
        elif job.reply.set_running_or_notify_cancel():
            job.reply.set_result(reply)


def _hand_out(job: Job, text: str) -> None:
    if job.on_text is not None and not job.is_cancelled:
        try:
            job.on_text(text)
        except Exception:  # its event loop is gone; the others of the batch are not
            job.cancel()


def _fail(job: Job, error: Exception) -> None:
    if not job.reply.done() and job.reply.set_running_or_notify_cancel():
        job.reply.set_exception(error)


def log_failure(what: str, error: Exception) -> None:
    """Log where an error was, and not its message, which may quote a prompt."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    logger.error("%s: %s at %s:%s", what, type(error).__name__, place.filename, place.lineno)
