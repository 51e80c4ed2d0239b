"""What the server counts, for Prometheus."""

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, about: str) -> Histogram:
            return Histogram(f"llasa_{name}", about, buckets=SECONDS, registry=registry)

        self.requests = Counter(
            "llasa_requests", "Requests by status", ["path", "status"], registry=registry
        )
        self.waiting = Gauge("llasa_waiting", "Requests that wait for a row", registry=registry)
        self.running = Gauge("llasa_running", "Requests that are spoken", registry=registry)
        self.codes = Counter("llasa_codes", "Codes drawn, 50 a second", registry=registry)
        self.audio_seconds = Counter(
            "llasa_audio_seconds", "Seconds of sound given to clients", registry=registry
        )
        self.first_audio = histogram("first_audio_seconds", "Until a request's first sound")
        self.seconds = histogram("request_seconds", "Until a request's end")
        self.step_seconds = histogram("step_seconds", "Of a few codes in all rows")

    def count_codes(self, codes: np.ndarray) -> None:
        self.codes.inc(len(codes))
