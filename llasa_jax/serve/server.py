"""The server's process: a socket, uvicorn, and an orderly end."""

import queue
import signal
import socket

import uvicorn
from fastapi import FastAPI

from llasa_jax.errors import UserError, first_line
from llasa_jax.generate.line import Line, Speech
from llasa_jax.serve.engine import Engine, Request
from llasa_jax.serve.settings import ServeSettings

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
    """Speaks a sentence, whole and as a stream, so that the first request finds what it needs
    compiled. Raises what goes wrong.
    """
    for streams in (False, True):
        given: queue.Queue = queue.Queue()
        engine.submit(Request(Line(WARM_UP), 0, streams, given.put))
        while not isinstance(item := given.get(), Speech):
            if isinstance(item, Exception):
                raise item


def run(app: FastAPI, where: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE
    )
    # uvicorn raises the signal again once it has ended, for whoever set a handler: nobody has.
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda *_: None)
    uvicorn.Server(config).run(sockets=[where])
