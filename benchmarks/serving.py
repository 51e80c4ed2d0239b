"""The server under load: first audio, one stream against eight, and minutes of mixed requests.

    python benchmarks/serving.py [streams mixed] [--size tiny 135M] [--minutes 1] [--seconds 8]

`llasa-jax serve` runs in a process of its own, with a random model, float32, and a small random
codec; this one asks, by OpenAI's client and plain HTTP on loopback.

**streams**: pcm of `--seconds` of speech. Time until the first byte; seconds of speech a second by
one stream from a server of one row, and by eight at once from one of eight rows; and the longest
gap that a listener hears who begins with the first byte.

**mixed**: eight clients ask for whole files and streams, hang up at once or after the first bytes,
send what is too large, and what is broken, for `--minutes`. Every finished answer is compared byte
for byte with what `Speaker` says offline with its seed. The server's memory is printed as it goes.
The real run is `--minutes 30`.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import httpx
import psutil
from openai import OpenAI

from llasa_jax.demo.tiny import make_tiny_codec
from llasa_jax.demo.tiny_llama import make_tiny_llama, make_tiny_tokenizer
from llasa_jax.generate.sampling import SamplingSettings
from llasa_jax.generate.settings import SpeechSettings
from llasa_jax.generate.speaker import Speaker
from llasa_jax.serve.formats import Parts, whole

SIZES = {
    "tiny": {},
    "135M": {  # SmolLM2's
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
}
TEXT = "the quick brown fox jumps over the lazy dog, and nothing else that she said was ever true"
TEXTS = [TEXT, "the quick brown fox", "dog"]
ROWS, BYTES_PER_SECOND = 8, 2 * 24_000


@contextmanager
def served(folder: Path, rows: int, seconds: float):
    """A server's address and its process."""
    command = [sys.executable, "-m", "llasa_jax.cli", "serve", str(folder), "--port=0"]
    options = [f"--codec={folder / 'codec'}", "--dtype=float32", f"--rows={rows}"]
    options += [f"--max-seconds={seconds}", "--max-upload-mb=1", "--fastest=1"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line.startswith("serving"), line
    yield line.split(" at ")[1].split("/v1")[0], psutil.Process(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0, "the server did not end in order"


def body(seed: int, text: str = TEXT, **options) -> dict:
    return {"model": "model", "voice": "default", "input": text, "seed": seed} | options


def stream(url: str, seed: int) -> tuple[float, float, float, float]:
    """Seconds until the first byte, until the end, of speech, and of the longest gap."""
    began, first, size, gap = time.perf_counter(), 0.0, 0, 0.0
    asked = body(seed, response_format="pcm")
    with httpx.stream("POST", f"{url}/v1/audio/speech", json=asked, timeout=600) as answer:
        assert answer.status_code == 200, answer.read()
        for part in answer.iter_raw():
            now = time.perf_counter()
            first = first or now
            gap = max(gap, now - first - size / BYTES_PER_SECOND)
            size += len(part)
    return first - began, time.perf_counter() - began, size / BYTES_PER_SECOND, gap


def streams(folder: Path, seconds: float) -> None:
    rates = {}
    for rows, at_once in ((1, 1), (ROWS, 1), (ROWS, ROWS)):
        with served(folder, rows, seconds) as (url, _), ThreadPoolExecutor(at_once) as pool:
            list(pool.map(lambda seed: stream(url, seed), range(at_once)))  # compiles
            began = time.perf_counter()
            results = list(pool.map(lambda seed: stream(url, seed), range(at_once)))
            took = time.perf_counter() - began
        first, _, speech, gaps = zip(*results, strict=True)
        rates[rows, at_once] = sum(speech) / took
        print(
            f"{at_once} at once of {rows} rows: {rates[rows, at_once]:5.2f} s of speech a second,"
            f" first audio after {max(first):.2f} s at most, longest gap {max(gaps):.2f} s",
            flush=True,
        )
    for rows in (1, ROWS):
        print(f"8 streams / 1 stream of {rows} rows: {rates[ROWS, ROWS] / rates[rows, 1]:.2f}")


def offline(folder: Path, seconds: float) -> list[tuple[dict, bytes]]:
    """Requests, and the files that answer them."""
    codec = folder / "codec"
    speaker = Speaker.load(folder, codec=codec, dtype="float32", rows=ROWS)
    settings = SpeechSettings(max_seconds=seconds, fastest=1)
    known = []
    for seed in range(24):
        text, streams = TEXTS[seed % 3], seed % 2 == 0
        sampling = SamplingSettings(seed=seed)
        if streams:
            parts = Parts("wav")
            waves = speaker.stream(text, sampling, settings)
            file = b"".join([*map(parts.feed, waves), parts.end()])
        else:
            file = whole(speaker.speak([text], sampling, settings)[0], "wav")
        form = {"stream_format": "audio"} if streams else {}
        known.append((body(seed, text, response_format="wav", **form), file))
    return known


def mixed(folder: Path, seconds: float, minutes: float) -> None:
    known = offline(folder, seconds)
    with served(folder, ROWS, seconds) as (url, process):
        end = time.monotonic() + 60 * minutes
        speech = f"{url}/v1/audio/speech"

        def ask(worker: int) -> dict[str, int]:
            chance, done = random.Random(worker), {}
            client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
            while time.monotonic() < end:
                kind = chance.choice(["equal", "equal", "equal", "hung up", "refused"])
                asked, file = chance.choice(known)
                if kind == "equal":
                    own = {k: v for k, v in asked.items() if k != "seed"}
                    answer = client.audio.speech.create(**own, extra_body={"seed": asked["seed"]})
                    kind = "equal" if answer.content == file else "DIFFERENT"
                elif kind == "hung up":
                    try:
                        wait = chance.uniform(0.01, 0.5)
                        with httpx.stream("POST", speech, json=asked, timeout=wait) as answer:
                            next(answer.iter_raw())
                    except httpx.TimeoutException:
                        pass
                else:
                    wrong = [
                        json.dumps(asked | {"input": "x" * 5000}),
                        "x" * 2_000_000,
                        json.dumps(asked)[:-5],
                        json.dumps(asked | {"voice": "../../etc/passwd"}),
                    ]
                    try:
                        answer = httpx.post(speech, content=chance.choice(wrong))
                        assert 400 <= answer.status_code < 500, answer.text
                    except httpx.WriteError:  # refused before all was sent
                        pass
                done[kind] = done.get(kind, 0) + 1
            return done

        with ThreadPoolExecutor(ROWS) as pool:
            workers = [pool.submit(ask, worker) for worker in range(ROWS)]
            memory = []
            while not all(worker.done() for worker in workers):
                memory.append(process.memory_info().rss / 2**20)
                time.sleep(max(1, 60 * minutes / 20))
        counts = [worker.result() for worker in workers]
        totals = {k: sum(c.get(k, 0) for c in counts) for k in {k for c in counts for k in c}}
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        left = [line for line in lines if line.startswith(("llasa_running", "llasa_waiting"))]
    print(f"{minutes:g} minutes: {totals}; left: {left}")
    print("memory of the server, MiB:", *(f"{m:.0f}" for m in memory))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", default=["streams", "mixed"])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["tiny"])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seconds", type=float, default=8.0)
    args = parser.parse_args()
    names = ("jax", "fastapi", "uvicorn", "openai")
    print(f"{time.strftime('%Y-%m-%d')}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(", ".join(f"{name} {version(name)}" for name in names))
    tokenizer = make_tiny_tokenizer()
    for size in args.size:
        print(f"\n{size}", flush=True)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "model"
            make_tiny_llama(folder, tokenizer, **SIZES[size])
            make_tiny_codec(folder / "codec")
            if "streams" in args.parts:
                streams(folder, args.seconds)
            if "mixed" in args.parts:
                mixed(folder, min(args.seconds, 4.0), args.minutes)


if __name__ == "__main__":
    main()
