"""Does the input pipeline keep up as a dataset grows? Packed tokens a second from records on disk:
`python benchmarks/input_pipeline.py`.

Clips have LJSpeech's lengths: 1.1 to 10.1 s, 6.6 s on average, 15 letters a second. Up to 100,000
records are written by TFDS; larger sets are copies of those files under one index, so that files,
index and reads are those of a large set. Needs 1 GB of disk for a million records, freed at the
end. Tokens are those of clips, without padding.

Then how long a training loop waits for `next(data)` where it asks for a batch every --step seconds:
with the thread that makes batches ahead, and without, in turn.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}

import numpy as np  # noqa: E402
from lengths import ljspeech_seconds  # noqa: E402

from llasa_jax.data.batching import BatchShape, Source, batches  # noqa: E402
from llasa_jax.data.builder import write_dataset  # noqa: E402
from llasa_jax.data.records import open_utterances  # noqa: E402
from llasa_jax.demo.tiny_llama import SAMPLE_TEXT, make_tiny_tokenizer  # noqa: E402
from llasa_jax.speech.prompts import Prompter  # noqa: E402

SHAPE = BatchShape(accumulation=1, rows=16, length=2048)
MUST_REACH = 300_000
AHEAD = 16  # as the training loop
WRITTEN_AT_MOST = 100_000


def clips(count: int):
    """Records of LJSpeech's durations."""
    rng = np.random.default_rng(0)
    words = sorted({word for text in SAMPLE_TEXT for word in text.split()})
    for i, seconds in enumerate(ljspeech_seconds(count, rng)):
        text = " ".join(rng.choice(words, max(1, round(seconds * 15 / 6))))
        codes = rng.integers(0, 65_536, int(seconds * 50) + 1).astype(np.uint16)
        yield {
            "id": f"{i:07d}",
            "text": text,
            "codes": codes,
            "speaker": "",
            "description": "",
            "language": "en",
        }


def build(folder: Path, records: int, base: Path | None) -> None:
    if base is None:
        write_dataset(folder, {"train": clips(records)}, {"codec": "none"})
        return
    folder.mkdir()
    shards = sorted(base.glob("*array_record*"))
    info = json.loads((base / "dataset_info.json").read_text())
    (split,) = info["splits"]
    copies = records // sum(map(int, split["shardLengths"]))
    for copy in range(copies):
        for i, shard in enumerate(shards):
            number = f"{copy * len(shards) + i:05d}-of-{copies * len(shards):05d}"
            shutil.copyfile(shard, folder / f"llasa_speech-train.array_record-{number}")
    split["shardLengths"] *= copies
    split["numBytes"] = str(int(split["numBytes"]) * copies)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for name in ("features.json", "metadata.json"):
        shutil.copyfile(base / name, folder / name)


def measure(folder: Path, prompter: Prompter, seconds: float) -> dict:
    started = time.perf_counter()
    records = open_utterances(folder, "train")
    data = iter(batches([Source(records, prompter)], SHAPE, seed=0))
    next(data)
    first = time.perf_counter() - started
    for _ in range(5):
        next(data)
    tokens, rows, start, cpu = 0, 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        batch = next(data)
        tokens += int((batch["segment_ids"] > 0).sum())
        rows += SHAPE.rows
    took, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "records": len(records),
        "rate": tokens / took,
        "per_cpu": tokens / cpu,
        "full": tokens / (rows * SHAPE.length),
        "first": first,
    }


def waits(folder: Path, prompter: Prompter, ahead: int, step: float, count: int) -> np.ndarray:
    """Seconds waited for each of some batches, after the first, with `step` seconds between."""
    records = open_utterances(folder, "train")
    data = iter(batches([Source(records, prompter)], SHAPE, seed=0, ahead=ahead))
    next(data)
    waited = []
    for _ in range(count):
        time.sleep(step)  # the devices are at a step
        began = time.perf_counter()
        next(data)
        waited.append(time.perf_counter() - began)
    data.close()
    return np.array(waited)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, nargs="+", default=[1_000, 100_000, 1_000_000])
    parser.add_argument(
        "--seconds",
        type=float,
        default=15.0,
        help="how long each is measured, three times over; the median counts",
    )
    parser.add_argument("--step", type=float, default=0.25, help="seconds of a training step")
    parser.add_argument("--steps", type=int, default=60, help="how many batches are waited for")
    args = parser.parse_args()
    prompter = Prompter(make_tiny_tokenizer())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(
        f"{name} {version(name)}"
        for name in ("grain", "array-record", "tensorflow-datasets", "tokenizers", "numpy")
    )
    print(
        f"{datetime.date.today()}, {os.cpu_count()}-core {platform.machine()} VM, {memory:.0f} GB;"
        f" {versions}"
    )
    print(
        "Others' work on the same cores lowers tokens/s, but hardly tokens/CPU s: one thread's"
        " worth of work, as Python allows no more."
    )
    print(f"load before: {os.getloadavg()[0]:.1f} (2 cores are full at 2)")
    heads = {
        "records": 10,
        "tokens/s": 10,
        "tokens/CPU s": 13,
        "rows full": 10,
        "first batch": 12,
        "to the smallest": 16,
        "CPU to it": 10,
    }
    print(" ".join(f"{head:>{width}}" for head, width in heads.items()))
    with tempfile.TemporaryDirectory() as scratch:
        base, folders = None, []
        for records in sorted(args.records):
            folders.append(Path(scratch) / str(records))
            build(folders[-1], records, base if records > WRITTEN_AT_MOST else None)
            base = folders[-1]
        # All sizes in turn, so that another load on the machine spoils none of them alone.
        runs = [
            [measure(folder, prompter, args.seconds / 3) for folder in folders] for _ in range(3)
        ]
        waited = {
            ahead: waits(folders[-1], prompter, ahead, args.step, args.steps)
            for ahead in (0, AHEAD)
        }
    medians = [sorted(same, key=lambda run: run["rate"])[1] for same in zip(*runs, strict=True)]
    for run in medians:
        print(
            f"{run['records']:>10,} {run['rate']:>10,.0f} {run['per_cpu']:>13,.0f}"
            f" {run['full']:>10.1%} {run['first']:>10.1f} s"
            f" {run['rate'] / medians[0]['rate']:>15.2f}x"
            f" {run['per_cpu'] / medians[0]['per_cpu']:>9.2f}x"
        )
    slowest = min(run["rate"] for run in medians)
    print(
        f"load after: {os.getloadavg()[0]:.1f}; slowest: {slowest:,.0f} tokens/s,"
        f" {slowest / MUST_REACH:.2f}x the {MUST_REACH:,} asked for"
    )
    print(f"waits for next(data), {args.steps} batches, {args.step * 1000:.0f} ms between them:")
    for ahead, seconds in waited.items():
        print(
            f"  {ahead or 'no':>2} batches ahead: {seconds.sum() * 1000:7.0f} ms in all, longest"
            f" {seconds.max() * 1000:.0f} ms, {(seconds > 0.05).sum()} above 50 ms"
        )


if __name__ == "__main__":
    main()
