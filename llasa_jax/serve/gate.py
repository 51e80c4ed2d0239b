"""What is refused before a request's body is read: a wrong key, and a body that is too large."""

import secrets

from fastapi.responses import JSONResponse

from llasa_jax.serve.metrics import Metrics

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_content(
    status: int, sentence: str, code: str | None = None, param: str | None = None
) -> dict:
    """An error as OpenAI's clients read it."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": sentence, "type": kind, "param": param, "code": code}}


def error_response(
    status: int, sentence: str, code: str | None = None, param: str | None = None
) -> JSONResponse:
    """An answer with an error."""
    return JSONResponse(error_content(status, sentence, code, param), status)


class Gate:
    """ASGI middleware. /v1 needs the key, if there is one; every body must say its length, which
    servers of HTTP hold clients to. Counts the answers.
    """

    def __init__(self, app, max_bytes: int, api_key: str, metrics: Metrics):
        self._app, self._max_bytes, self._metrics = app, max_bytes, metrics
        self._key = f"Bearer {api_key}".encode() if api_key else b""

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Paths are those of the table, so that no client can make up counters.
        known = ("/v1/audio/speech", "/v1/audio/voices", "/v1/models", "/health", "/metrics")
        path = next((one for one in known if scope["path"].startswith(one)), "other")

        async def counting(message):
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        app = self._refusal(scope) or self._app
        await app(scope, receive, counting)

    def _refusal(self, scope) -> JSONResponse | None:
        headers = dict(scope["headers"])
        if self._key and scope["path"].startswith("/v1"):
            given = headers.get(b"authorization", b"")
            if not secrets.compare_digest(given, self._key):
                return error_response(401, "the API key is wrong or missing", "invalid_api_key")
        if scope["method"] in ("GET", "HEAD"):
            return None
        if b"transfer-encoding" in headers:
            return error_response(411, "the body does not say its length; send Content-Length")
        length = int(headers.get(b"content-length", b"0"))
        if length > self._max_bytes:
            return error_response(
                413, f"the body has {length:,} bytes, more than {self._max_bytes:,}; send less"
            )
        return None
