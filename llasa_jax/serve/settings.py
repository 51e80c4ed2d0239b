"""Settings of the server: where it listens, and what it refuses."""

from dataclasses import dataclass

from llasa_jax.runtime.settings import check, setting


@dataclass(frozen=True)
class ServeSettings:
    """Where the server listens, and its limits. Raises UserError for a value out of range."""

    host: str = setting("127.0.0.1", pattern=r"[\w.:-]+", words="a host's name or address")
    """Address to listen at; the default is reached from this machine alone."""
    port: int = setting(8000, low=0, high=65_535)
    """Port to listen at; 0 is any that is free."""
    max_text: int = setting(4096, low=1, high=1_000_000)
    """Longest text of a request, in characters."""
    max_queue: int = setting(64, low=0, high=100_000)
    """Requests that may wait for a row; further ones are answered with status 429."""
    max_request_seconds: float = setting(300.0, above=0, high=86_400)
    """Longest time of a request, from when it came; what is not spoken then is given up."""
    max_upload_mb: float = setting(10.0, above=0, high=1000)
    """Largest body of a request, in millions of bytes."""
    max_prompt_seconds: float = setting(30.0, above=0, high=3600)
    """Longest recording of a voice to clone."""
    max_voices: int = setting(64, low=0, high=10_000)
    """Voices that may be uploaded; they are kept in memory until the server ends."""

    def __post_init__(self):
        check(self, "serve")
