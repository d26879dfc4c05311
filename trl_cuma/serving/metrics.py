# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""What the server counts for Prometheus. No label tells of a person, a prompt or an answer."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..generation.replies import Reply

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300)
ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """The counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("endpoint", "status")
        self.requests = Counter("cuma_requests", "HTTP requests", labels, registry=self.registry)
        self.seconds = Histogram(
            "cuma_request_seconds",
            "From a request to the end of its response",
            ("endpoint",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter("cuma_prompt_tokens", "Tokens of answered prompts", registry=self.registry)
        self.generated_tokens = Counter("cuma_generated_tokens", "Tokens that were generated", registry=self.registry)
        self.endings = Counter("cuma_answers", "Answers by how they ended", ("ending",), registry=self.registry)
        self.batch_size = Histogram("cuma_batch_size", "Rows of a batch", buckets=ROWS, registry=self.registry)
        self.batch_failures = Counter("cuma_batch_failures", "Batches that failed as a whole", registry=self.registry)
        self.queue_length = Gauge("cuma_queue_length", "Answers that wait for a batch", registry=self.registry)

    def count(self, reply: Reply) -> None:
        """Count an answer."""
        self.prompt_tokens.inc(reply.prompt_tokens)
        self.generated_tokens.inc(reply.num_tokens)
        self.endings.labels(reply.ending).inc()

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
