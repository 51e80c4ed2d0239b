"""The server's process: a socket, uvicorn, and an orderly end."""

import signal
import socket
from pathlib import Path

import numpy as np
import uvicorn
from fastapi import FastAPI

from llasa_jax.errors import UserError, first_line
from llasa_jax.generate.line import NO_VOICE, Line
from llasa_jax.generate.sound import CHUNK, CONTEXT, SoundStream
from llasa_jax.serve.engine import Engine
from llasa_jax.serve.settings import ServeSettings
from llasa_jax.serve.voices import Voices
from llasa_jax.serve.work import Work

WARM_UP = "This is what a sentence sounds like."
GRACE = 5  # seconds that requests have to end by themselves


def listen(settings: ServeSettings) -> socket.socket:
    """A socket at the address of the settings. UserError where there can be none."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise UserError(
            f"{settings.host}:{settings.port}: cannot listen there ({first_line(error)}); give"
            " another host or port"
        ) from None


def warm_up(engine: Engine) -> None:
    """Speaks a sentence, and makes a stream's sound, so that the first request finds what it needs
    compiled. Raises what goes wrong.
    """
    engine.say(Line(WARM_UP), 0)
    sound = SoundStream(engine.speaker.codec, NO_VOICE.codes, 0)
    for _ in sound.feed(np.zeros(CONTEXT + 3 * CHUNK, np.uint16)):
        pass


def with_page(
    app: FastAPI,
    engine: Engine,
    voices: Voices,
    settings: ServeSettings,
    api_key: str,
    runs: Path | None = None,
    work: Work | None = None,
) -> FastAPI:
    """The application with a page at /page: to listen, to see the runs below a folder, and, with
    `work`, to train. With a key, it asks for the user `key` with that as the password. UserError
    without the extra `ui`.
    """
    try:
        import gradio
    except ImportError:
        raise UserError(
            'the page needs gradio; install it with `pip install "llasa-jax[ui]"`, or leave --page'
            " out"
        ) from None
    from llasa_jax.serve.page import new_page

    auth = ("key", api_key) if api_key else None
    page = new_page(engine, voices, settings, runs, work)
    return gradio.mount_gradio_app(app, page, path="/page", auth=auth)


def run(app: FastAPI, where: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE
    )
    # uvicorn raises the signal again once it has ended, for whoever set a handler: nobody has.
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda *_: None)
    uvicorn.Server(config).run(sockets=[where])
