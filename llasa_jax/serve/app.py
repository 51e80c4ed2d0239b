"""The addresses: OpenAI's speech endpoint, models, voices, health and metrics.

No request names a file: what is read from disk is read before the server listens.
"""

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, File, Form, UploadFile
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from llasa_jax.errors import UserError, first_line, printable
from llasa_jax.generate.line import LONGEST_NAME, Line, Speech
from llasa_jax.runtime.settings import MAX_SEED
from llasa_jax.serve.engine import Busy, Engine, Late, Request
from llasa_jax.serve.formats import MEDIA_TYPES, Format, Parts, whole
from llasa_jax.serve.gate import Gate, error_content, error_response
from llasa_jax.serve.metrics import Metrics
from llasa_jax.serve.settings import ServeSettings
from llasa_jax.serve.voices import Unknown, Voices

SECONDS_BETWEEN_LOOKS = 0.25  # at whether the client of a whole speech is still there
STATUS = {Busy: 429, Late: 504, UserError: 400, RuntimeError: 503}


class VoiceId(BaseModel):
    """A voice as OpenAI's newer clients name it."""

    id: str


class SpeechRequest(BaseModel):
    """The body of /v1/audio/speech: OpenAI's fields, then `seed` and `language`."""

    model_config = ConfigDict(extra="forbid")

    model: str
    input: str
    voice: str | VoiceId
    response_format: Format = "mp3"
    stream_format: Literal["audio", "sse"] | None = None
    instructions: Annotated[str, Field(max_length=LONGEST_NAME)] | None = None
    speed: Literal[1] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    language: Annotated[str, Field(max_length=LONGEST_NAME)] | None = None


def new_app(
    engine: Engine,
    voices: Voices,
    settings: ServeSettings,
    metrics: Metrics,
    api_key: str = "",
) -> FastAPI:
    """The application, for uvicorn or any other server of ASGI."""
    app = FastAPI(title="llasa-jax", docs_url=None, redoc_url=None)
    app.add_middleware(
        Gate, max_bytes=round(settings.max_upload_mb * 1e6), api_key=api_key, metrics=metrics
    )
    started = int(time.time())

    @app.exception_handler(RequestValidationError)
    def invalid(http: HttpRequest, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        sentence = f"{field}: {first['msg']}" if field else first["msg"]
        return error_response(400, printable(sentence[:300]), param=printable(field[:100]) or None)

    @app.exception_handler(HTTPException)
    def refused(http: HttpRequest, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail))

    @app.exception_handler(UserError)
    def wrong(http: HttpRequest, error: UserError) -> JSONResponse:
        return error_response(400, str(error))

    @app.exception_handler(Unknown)
    def unknown(http: HttpRequest, error: Unknown) -> JSONResponse:
        return error_response(404, error.sentence, f"{error.what}_not_found", error.what)

    @app.exception_handler(Exception)
    def failed(http: HttpRequest, error: Exception) -> JSONResponse:
        return error_response(500, f"the server failed ({first_line(error)})")

    @app.get("/health")
    def health() -> Response:
        if engine.failure:
            return error_response(503, f"the engine has failed ({first_line(engine.failure)})")
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    def counts() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": started, "owned_by": "llasa-jax"}

    @app.get("/v1/models")
    def models() -> dict:
        return {"object": "list", "data": [described(name) for name in voices.models]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict:
        voices.line(name, voices.names[0])
        return described(name)

    @app.get("/v1/audio/voices")
    def known_voices() -> dict:
        return {"voices": voices.names, "uploaded": sorted(voices.uploaded)}

    @app.post("/v1/audio/voices")
    def add_voice(
        name: Annotated[str, Form()],
        ref_text: Annotated[str, Form()],
        audio_sample: Annotated[UploadFile, File()],
        consent: Annotated[str, Form()] = "",
    ) -> dict:
        _check_text(ref_text, settings.max_text, "ref_text")
        audio = audio_sample.file.read()
        seconds, most = settings.max_prompt_seconds, settings.max_voices
        voices.add(engine.speaker, name, audio, ref_text, seconds, most)
        return {"name": name, "object": "audio.voice", "created_at": int(time.time())}

    @app.delete("/v1/audio/voices/{name}")
    def remove_voice(name: str) -> dict:
        voices.remove(name)
        return {"name": name, "deleted": True}

    @app.post("/v1/audio/speech")
    async def speech(body: SpeechRequest, http: HttpRequest) -> Response:
        line, tokens = await run_in_threadpool(line_of, body, voices, engine, settings.max_text)
        seed = secrets.randbelow(2**31) if body.seed is None else body.seed
        format, streams = body.response_format, body.stream_format is not None
        streams = streams or format == "pcm"  # players ask for it, and have no header to be wrong
        events: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def give(item) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, item)

        request = Request(line, seed, streams, give)
        headers = {"x-seed": str(seed)}
        is_begun = False
        try:
            engine.submit(request)
            first = await _next(events, http)
            if isinstance(first, Exception):
                raise first
            if isinstance(first, Speech):
                raise UserError(
                    "the model ended before any speech; try another seed, or another text"
                )
            if not streams:
                file = await run_in_threadpool(whole, first, format)
                return Response(file, media_type=MEDIA_TYPES[format], headers=headers)
            parts = _items(engine, request, events, first)
            if body.stream_format == "sse":
                sent, kind = _sse(parts, format, tokens), "text/event-stream"
            else:
                sent, kind = _audio(parts, format), MEDIA_TYPES[format]
            is_begun = True
            return StreamingResponse(sent, media_type=kind, headers=headers)
        except (Busy, Late, UserError, RuntimeError) as error:
            answer = error_response(*_refusal_of(error))
            if isinstance(error, Busy):
                answer.headers["retry-after"] = "5"
            return answer
        except _Gone:
            return Response(status_code=499)  # nobody reads it
        finally:
            if not is_begun:
                engine.drop(request)

    return app


class _Gone(Exception):
    """The client has closed its connection."""


def line_of(body: SpeechRequest, voices: Voices, engine: Engine, max_text: int) -> tuple[Line, int]:
    """The line that a request asks for, checked, and how many tokens its prompt has."""
    _check_text(body.input, max_text, "input")
    voice = body.voice if isinstance(body.voice, str) else body.voice.id
    line = voices.line(body.model, voice)
    line = replace(
        line,
        text=body.input,
        description=body.instructions or "",
        language=body.language or "",
    )
    return line, engine.speaker.check(line)


def _check_text(text: str, most: int, field: str) -> None:
    if len(text) > most:
        raise UserError(f"{field} has {len(text):,} characters, more than {most:,}; shorten it")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"{field} has half a character (a lone surrogate); send it as UTF-8")


async def _next(events: asyncio.Queue, http: HttpRequest) -> Any:
    """What comes next. Raises _Gone where the client goes meanwhile."""
    while True:
        try:
            return await asyncio.wait_for(events.get(), SECONDS_BETWEEN_LOOKS)
        except TimeoutError:
            if await http.is_disconnected():
                raise _Gone from None


async def _items(
    engine: Engine, request: Request, events: asyncio.Queue, first: np.ndarray
) -> AsyncGenerator[Any, None]:
    """What a request is given, up to its Speech or error. The request is dropped when the client
    goes, which ends this early.
    """
    item: Any = first
    try:
        while True:
            yield item
            if not isinstance(item, np.ndarray):
                return
            item = await events.get()
    finally:
        engine.drop(request)


async def _audio(items: AsyncGenerator[Any, None], format: Format) -> AsyncGenerator[bytes, None]:
    """The file, by parts. After an error the connection is cut, so that no client takes what it got
    for the whole file.
    """
    parts = Parts(format)
    async with aclosing(items):
        async for item in items:
            if isinstance(item, Exception):
                raise item
            yield parts.end() if isinstance(item, Speech) else parts.feed(item)


async def _sse(
    items: AsyncGenerator[Any, None], format: Format, tokens: int
) -> AsyncGenerator[bytes, None]:
    """The same as server-sent events, with `tokens` of the prompt in the last one."""
    parts = Parts(format)
    async with aclosing(items):
        async for item in items:
            if isinstance(item, Exception):
                yield _event({"type": "error"} | error_content(*_refusal_of(item)))
                return
            is_end = isinstance(item, Speech)
            data = parts.end() if is_end else parts.feed(item)
            if data:
                audio = base64.b64encode(data).decode()
                yield _event({"type": "speech.audio.delta", "audio": audio})
            if is_end:
                said = item.tokens
                usage = {"input_tokens": tokens, "output_tokens": said}
                usage["total_tokens"] = tokens + said
                yield _event({"type": "speech.audio.done", "usage": usage})


def _event(content: dict) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def _refusal_of(error: Exception) -> tuple[int, str]:
    """The status of what a request ended with, and a sentence."""
    sentences = {
        Busy: "too many requests are waiting; try again in a few seconds",
        Late: "the speech took longer than this server allows; shorten the text",
    }
    return STATUS.get(type(error), 500), sentences.get(type(error)) or first_line(error)
