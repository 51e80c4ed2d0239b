"""What a large corpus takes beside the codec: `python benchmarks/scale.py`. Listing, sharding and
sealing a million clips, and opening 60 million records, their first batch, and going on from it.

The million clips are lines of a manifest and have short codes; their audio is not there, which
costs a look for each as if it were. The 60 million records are one file under 512 names (links),
opened and read as any. Each stage is a process of its own, whose peak memory includes all imports.
"""

import argparse
import datetime
import functools
import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}

import numpy as np  # noqa: E402

from llasa_jax.data.batching import BatchShape, Source, batches  # noqa: E402
from llasa_jax.data.builder import file_count  # noqa: E402
from llasa_jax.data.records import open_utterances, record_of  # noqa: E402
from llasa_jax.data.seal import SEAL  # noqa: E402
from llasa_jax.data.shards import plan_shards, write_shard  # noqa: E402
from llasa_jax.demo.tiny_llama import make_tiny_tokenizer  # noqa: E402
from llasa_jax.encode.offline import Job, seal  # noqa: E402
from llasa_jax.encode.sources import ManifestAudio  # noqa: E402
from llasa_jax.speech.prompts import Prompter  # noqa: E402

CODEC = SimpleNamespace(name="none", fingerprint="f", hop=320, sample_rate=16000)
CODES = np.arange(40, dtype=np.uint16)
SHAPE = BatchShape(accumulation=1, rows=16, length=2048)
TEXT = "What a clip of a large corpus says, of about the usual length for one."


def a_job(folder: Path) -> Job:
    source = functools.partial(ManifestAudio, folder / "manifest.jsonl", 0.001)
    return Job(source, folder / "dataset", CODEC)


def listing(folder: Path) -> Iterator[str]:
    source = ManifestAudio(folder / "manifest.jsonl", 0.001)
    yield f"listing {len(source):,} clips"


def sharding(folder: Path) -> Iterator[str]:
    ids = [f"speaker_{i % 997:03}/{i:09}" for i in range(lines_in(folder))]
    names = ["train"] * len(ids)
    yield ""
    shards = plan_shards(ids, names)
    yield f"sharding them into {len(shards)} files"


def making(folder: Path) -> Iterator[str]:
    with a_job(folder).open(CODEC) as maker:
        for shard in maker.shards:
            looked = maker.look(shard)
            utterances = map(maker.source.utterance, looked.good)
            records = (record_of(utterance, CODES) for utterance in utterances)
            write_shard(maker.folder, shard, records, looked.made_from, [])
    yield "(making their files, without a codec)"


def sealing(folder: Path) -> Iterator[str]:
    seal(a_job(folder), CODEC)
    yield "sealing them, listed again for it"


def linking(folder: Path, records: int) -> None:
    """A dataset of `records` in `folder`/large: one file under many names."""
    out, files = folder / "large", file_count(records)
    out.mkdir()
    ids = [f"{i:09}" for i in range(records // files)]
    (shard,) = plan_shards(ids, ["train"] * len(ids), len(ids))
    texts = {"text": TEXT, "speaker": "", "description": "", "language": "en"}
    rows = ({"id": ids[i], "codes": CODES, **texts} for i in shard.members)
    made = write_shard(folder / "one", shard, rows, "", [])
    for number in range(files):
        os.link(
            folder / "one" / shard.file,
            out / f"llasa_speech-train.array_record-{number:05}-of-{files:05}",
        )
    for name in ("features.json", "metadata.json"):
        shutil.copyfile(folder / "dataset" / name, out / name)
    info = json.loads((folder / "dataset/dataset_info.json").read_text())
    split = next(one for one in info["splits"] if one["name"] == "train")
    split |= {"shardLengths": [str(made.examples)] * files, "numBytes": str(made.size * files)}
    (out / "dataset_info.json").write_text(json.dumps(info | {"splits": [split]}))
    (out / SEAL).write_text(json.dumps({"records": made.records}))


def opening(folder: Path) -> Iterator[str]:
    records = open_utterances(folder / "large", "train")
    yield f"opening {len(records):,} records"
    prompter = Prompter(make_tiny_tokenizer())
    yield ""
    data = iter(batches([Source(records, prompter)], SHAPE, seed=0))
    next(data)
    yield "their first batch, shuffled and packed"
    for _ in range(20):
        next(data)
    state, wanted = data.get_state(), next(data)
    yield "20 more"
    again = iter(batches([Source(records, prompter)], SHAPE, seed=0))
    again.set_state(state)
    same = all(np.array_equal(value, wanted[name]) for name, value in next(again).items())
    yield f"going on after them ({'the same batch' if same else 'ANOTHER BATCH'})"


def lines_in(folder: Path) -> int:
    return int((folder / "count").read_text())


def _run(stage: Callable[[Path], Iterator[str]], folder: Path) -> list[tuple[str, float, float]]:
    found, began, cpu = [], time.perf_counter(), time.process_time()
    for words in stage(folder):
        found.append((words, time.perf_counter() - began, time.process_time() - cpu))
        began, cpu = time.perf_counter(), time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return [*found, ("", peak, 0.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--records", type=int, default=60_000_000)
    options = parser.parse_args()
    versions = ", ".join(
        f"{name} {version(name)}"
        for name in ("grain", "array-record", "tensorflow-datasets", "numpy")
    )
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, Python {sys.version.split()[0]};")
    print(f"{versions}; load before: {os.getloadavg()[0]:.1f} (2 cores are full at 2)")
    context: Any = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with (folder / "manifest.jsonl").open("w") as file:
            for i in range(options.clips):
                clip = f"speaker_{i % 997:03}/{i:09}"
                file.write(json.dumps({"audio": f"{clip}.flac", "id": clip, "text": TEXT}) + "\n")
        (folder / "count").write_text(str(options.clips))
        for stage in (listing, sharding, making, sealing, opening):
            if stage is opening:
                linking(folder, options.records)
            with context.Pool(1) as pool:
                *found, (_, peak, _) = pool.apply(_run, (stage, folder))
            for words, seconds, cpu in found:
                if words:
                    print(f"{seconds:8.2f} s, {cpu:7.2f} s of CPU: {words}")
            print(f"{'':27}peak memory {peak / 1e9:.2f} GB", flush=True)
    print(f"load after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
