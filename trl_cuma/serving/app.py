# Copyright 2026 The trl_cuma authors. Licensed under the Apache License, Version 2.0.
"""The endpoints. What a client sends is checked here, before it costs anything; nothing of it is ever logged."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ..generation.answering import Answerer, Question
from ..generation.batches import Prompt, context_length
from ..generation.profiles import unknown_fields
from .engine import Closed, Engine, Job, QueueFull, log_failure
from .guard import Guard
from .metrics import Metrics
from .responses import ApiError, Envelope, Kind, error_body, event
from .schemas import AnswerRequest, ChatRequest, CompletionRequest

POLL_SECONDS = 0.2  # how often a waiting request looks whether its client is still there


@dataclass(frozen=True)
class ServerSettings:
    """
    Attributes:
        name (`str`): The model's name for clients.
        api_key (`str`, *optional*): Asked of every client.
        max_batch (`int`): Answers that are decoded at a time.
        wait_ms (`float`): How long a batch waits for company, milliseconds.
        max_queue (`int`): Answers that may wait; beyond, 503.
        max_body (`int`): Bytes of a request; beyond, 413.
        max_total_tokens (`int`): Of a prompt with its answer, at most the model's context; beyond, 400.
        default_max_tokens (`int`): Of an answer whose request gives no limit.
        max_choices (`int`): Answers to one request.

    Raises:
        ValueError: A value is out of its range.
    """

    name: str
    api_key: str | None = None
    max_batch: int = 16
    wait_ms: float = 5.0
    max_queue: int = 128
    max_body: int = 256 * 1024
    max_total_tokens: int = 4096
    default_max_tokens: int = 512
    max_choices: int = 8

    def __post_init__(self) -> None:
        whole = ("max_batch", "max_queue", "max_body", "max_total_tokens", "default_max_tokens", "max_choices")
        for name in whole:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, expected at least 1.")
        if not 0 <= self.wait_ms <= 10_000:
            raise ValueError(f"`wait_ms` is {self.wait_ms}, expected 0 to 10000 milliseconds.")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise ValueError("The API key is empty or has characters that a header can't carry. Choose another.")


def create_app(answerer: Answerer, settings: ServerSettings) -> FastAPI:
    """
    The server as an ASGI application, for uvicorn. Its thread begins with it and ends with its `lifespan`.

    Args:
        answerer ([`Answerer`]): The model.
        settings ([`ServerSettings`]): Limits and names.
    """
    metrics = Metrics()
    engine = Engine(
        answerer,
        metrics,
        max_batch=settings.max_batch,
        wait_ms=settings.wait_ms,
        max_queue=settings.max_queue,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="trl_cuma", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine = engine
    service = _Service(answerer, engine, settings)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        turns = [message.as_turn() for message in body.messages]
        return await service.respond(request, body, "chat", [turns])

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        return await service.respond(request, body, "text", prompts)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": settings.name, "object": "model", "owned_by": "trl_cuma"}]}

    @app.get("/health")
    async def health() -> Response:
        alive = engine.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, 200 if alive else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return JSONResponse(_invalid_body(error), 400)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        body = error.body if isinstance(error, ApiError) else error_body(error.status_code, str(error.detail))
        return JSONResponse(body, error.status_code, error.headers)

    app.add_middleware(
        Guard,
        metrics=metrics,
        endpoints=frozenset(("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")),
        api_key=settings.api_key,
        max_body=settings.max_body,
    )
    return app


class _Service:
    """From a request that has been read to its response."""

    def __init__(self, answerer: Answerer, engine: Engine, settings: ServerSettings) -> None:
        self.answerer = answerer
        self.engine = engine
        self.settings = settings
        self.limit = min(settings.max_total_tokens, context_length(answerer.model) or settings.max_total_tokens)

    async def respond(self, request: Request, body: AnswerRequest, kind: Kind, prompts: Sequence[Prompt]) -> Response:
        """Answer each prompt `n` times. Whatever fails is an [`ApiError`], which nobody logs."""
        try:
            return await self._respond(request, body, kind, prompts)
        except ApiError:
            raise
        except Closed:
            raise _closed() from None
        except Exception as error:
            log_failure("A request failed", error)
            raise _failed() from None

    async def _respond(self, request: Request, body: AnswerRequest, kind: Kind, prompts: Sequence[Prompt]) -> Response:
        questions, warnings = self._questions(body, prompts)
        prompt_tokens = sum(len(question.tokens) for question in questions[:: body.n])
        envelope = Envelope(kind, self.settings.name, warnings)
        if body.stream:
            pieces: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()
            jobs = self._submit(questions, pieces)
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            stream = _stream(jobs, pieces, envelope, prompt_tokens if with_usage else None)
            return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        jobs = self._submit(questions)
        whole = asyncio.gather(*(asyncio.wrap_future(job.reply) for job in jobs))
        try:
            while not (await asyncio.wait([whole], timeout=POLL_SECONDS))[0]:
                if await request.is_disconnected():
                    raise ApiError(499, "The client is gone.")
            return JSONResponse(envelope.whole(whole.result(), prompt_tokens))
        finally:
            for job in jobs:
                job.cancel()
            whole.cancel()

    def _questions(self, body: AnswerRequest, prompts: Sequence[Prompt]) -> tuple[list[Question], list[str]]:
        if body.model is not None and body.model != self.settings.name:
            raise ApiError(
                404,
                f"There is no such model here: the one that is served is {self.settings.name!r}.",
                param="model",
                code="model_not_found",
            )
        choices = body.n * len(prompts)
        if choices > self.settings.max_choices:
            raise ApiError(
                400,
                f"`n` times the number of prompts is {choices}, and at most {self.settings.max_choices} answers are "
                "made for one request.",
                param="n",
            )
        try:
            unknown = unknown_fields(self.answerer.table, body.metadata)
            warnings = self.answerer.check_profile(body.metadata, "`metadata`")
        except (TypeError, ValueError) as error:
            raise ApiError(400, str(error), param="metadata", code="invalid_profile") from None
        if unknown:
            raise ApiError(400, warnings[0], param="metadata", code="invalid_profile")
        seed = secrets.randbits(62) if body.seed is None else body.seed
        given = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k", "min_p")}
        questions = []
        for prompt in prompts:
            try:
                tokens = self.answerer.encode(prompt)
            except ValueError as error:
                param = "messages" if isinstance(body, ChatRequest) else "prompt"
                raise ApiError(400, str(error), param=param) from None
            limit = self._max_tokens(body.max_tokens, len(tokens))
            for choice in range(body.n):
                try:
                    settings = given | {"max_new_tokens": limit, "seed": seed + choice, "stop": body.stop_texts}
                    sampling = self.answerer.sampling(**settings)
                except ValueError as error:
                    raise ApiError(400, str(error)) from None
                questions.append(Question(tokens, body.metadata, sampling))
        return questions, warnings

    def _max_tokens(self, asked: int | None, prompt_tokens: int) -> int:
        room = self.limit - prompt_tokens
        if room < 1 or (asked is not None and asked > room):
            wanted = "" if asked is None else f", and {asked} are asked for"
            raise ApiError(
                400,
                f"The prompt has {prompt_tokens} tokens{wanted}; both together may be {self.limit}. Shorten the "
                "prompt or lower `max_tokens`.",
                param="max_tokens" if room > 0 else None,
                code="context_length_exceeded",
            )
        return min(self.settings.default_max_tokens, room) if asked is None else asked

    def _submit(self, questions: Sequence[Question], pieces: asyncio.Queue | None = None) -> list[Job]:
        jobs = []
        loop = asyncio.get_running_loop()
        for index, question in enumerate(questions):
            if pieces is None:
                jobs.append(Job(question))
                continue

            def put(text: str | None, index: int = index) -> None:
                loop.call_soon_threadsafe(pieces.put_nowait, (index, text))

            jobs.append(Job(question, put))
            jobs[-1].reply.add_done_callback(lambda reply, put=put: None if reply.cancelled() else put(None))
        try:
            self.engine.submit(jobs)
        except QueueFull:
            raise ApiError(
                503, "Too many answers wait already. Try again later.", headers={"Retry-After": "1"}
            ) from None
        return jobs


async def _stream(
    jobs: Sequence[Job], pieces: asyncio.Queue, envelope: Envelope, prompt_tokens: int | None
) -> AsyncIterator[str]:
    """The events of a stream: pieces of all answers as they come; `None` in the queue is the end of one."""
    try:
        for index in range(len(jobs)):
            yield event(envelope.piece(index, "", first=True))
        for _ in jobs:
            while (piece := await pieces.get())[1] is not None:
                yield event(envelope.piece(*piece))
            index = piece[0]
            try:
                yield event(envelope.piece(index, "", jobs[index].reply.result().ending))
            except Exception as error:  # of the batch
                yield event((_closed() if isinstance(error, Closed) else _failed()).body)
                return
        if prompt_tokens is not None:
            yield event(envelope.last([job.reply.result() for job in jobs], prompt_tokens))
        yield event("[DONE]")
    finally:  # also where the client has gone
        for job in jobs:
            job.cancel()


def _failed() -> ApiError:
    return ApiError(500, "The answer could not be made. The server's log says where it failed.")


def _closed() -> ApiError:
    return ApiError(503, "The server is shutting down.", headers={"Retry-After": "10"})


def _invalid_body(error: RequestValidationError) -> dict[str, Any]:
    """The first thing that is wrong with a body: where and why, without what stood there."""
    errors = error.errors()
    # Of a field that may be one of several types: the one that is meant.
    alike = [e for e in errors if e["loc"][:2] == errors[0]["loc"][:2]]
    first = next((e for e in alike if not e["type"].endswith("_type")), errors[0])
    _, *place = first["loc"]
    if first["type"] == "json_invalid":
        return error_body(400, "The body is no JSON.")
    message = first["msg"].removeprefix("Value error, ")
    if not place:
        return error_body(400, f"The body: {message}. Send JSON, as `Content-Type: application/json`.")
    param = str(place[0])
    inner = len(place) > 1 and (isinstance(place[1], int) or param == "metadata")
    where = f"`{param}.{place[1]}`" if inner else f"`{param}`"
    if first["type"] == "extra_forbidden":
        return error_body(400, f"{where} is not supported. Leave it out.", param)
    return error_body(400, f"{where}: {message}.", param)
