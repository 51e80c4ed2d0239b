"""What the codec in the loop costs: online training against its two halves alone, and its memory:
`python benchmarks/online.py`.

An epoch of real speech, cut to LJSpeech's lengths, is (1) encoded alone, by the codec with all
waves in memory, (2) trained on, its codes ready on disk, and (3) trained on online, from FLAC
files. (3) must take no longer than 1.05 times the longer of (1) and (2), and the start-up, which is
what training takes with one step: (2) and (3) each have their own. They take turns. The codec has
one thread and JAX has one, so that on two cores neither takes from the other; codec and model are
tiny ones of the real classes. Then a thousand online steps of short clips, and the memory of the
training process and its readers along the way.
"""

import argparse
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "NPROC": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
sys.path.insert(0, str(Path(__file__).parents[1] / "tests/fixtures"))

MUST_REACH = 1.05
RATE = 16000


def write_clips(speech: Path, out: Path, seconds: list[float]) -> Path:
    """A manifest of clips of these durations, cut from the speech in a circle."""
    import numpy as np

    from llasa_jax.speech.audio import read_audio, write_audio

    wave = np.concatenate([read_audio(path) for path in sorted(speech.glob("*.flac"))])
    wave, at, lines = np.concatenate([wave, wave]), 0, []
    for number, duration in enumerate(seconds):
        samples = int(duration * RATE)
        write_audio(out / f"{number:05d}.flac", wave[at : at + samples])
        at = (at + samples) % (len(wave) // 2)
        lines.append(
            json.dumps(
                {
                    "audio": f"{number:05d}.flac",
                    "text": f"number {number} " + "word " * int(duration * 2),
                }
            )
        )
    (out / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return out / "manifest.jsonl"


class Bench:
    def __init__(self, folder: Path, speech: Path):
        from tiny_run import make_model

        from llasa_jax.codec import load_codec
        from llasa_jax.demo.tiny import make_tiny_codec

        self.folder, self.speech, self.runs = folder, speech, 0
        self.model = make_model(folder / "model")
        self.codec = load_codec(make_tiny_codec(folder / "codec"))

    def settings(self, data: dict, steps: int):
        from llasa_jax.train import settings as s

        self.runs += 1
        return s.Settings(
            out=str(self.folder / f"run{self.runs}"),
            model=s.ModelSettings(
                path=str(self.model), dtype="float32", remat="none", loss_chunk=128
            ),
            data=s.DataSettings(doctor="off", **data),
            train=s.TrainSettings(steps=steps, rows=1, save_every=10**6, validate_every=10**6),
            log=s.LogSettings(every=10**6, tensorboard=False),
        )

    def offline(self, records: Path, length: int, steps: int) -> float:
        from llasa_jax.encode.mixture import open_sources
        from llasa_jax.train.loop import train

        settings = self.settings({"path": str(records), "max_length": length}, steps)
        began = time.perf_counter()
        with redirect_stdout(io.StringIO()):
            train(settings, *open_sources(settings.sources))
        return time.perf_counter() - began

    def online(self, manifest: Path, length: int, steps: int) -> float:
        from llasa_jax.encode.mixture import open_sources
        from llasa_jax.encode.online_cache import open_encoder
        from llasa_jax.encode.settings import OnlineSettings
        from llasa_jax.train.loop import train

        online = OnlineSettings(
            codec=str(self.folder / "codec"), workers=1, torch_threads=1, read_ahead=60.0
        )
        settings = self.settings(
            {"path": str(manifest), "max_length": length, "mode": "online", "online": online}, steps
        )
        began = time.perf_counter()
        records, validation = open_sources(settings.sources, online)
        with redirect_stdout(io.StringIO()):
            train(
                settings,
                records,
                validation,
                encoder=open_encoder(settings.data.online, records, validation),
            )
        return time.perf_counter() - began

    def encode(self, waves: list) -> float:
        began = time.perf_counter()
        for wave in waves:
            self.codec.encode([wave])
        return time.perf_counter() - began


def compare(bench: Bench, clips: int, turns: int) -> None:
    import numpy as np
    from lengths import ljspeech_seconds

    from llasa_jax.convert.model_folder import load_tokenizer
    from llasa_jax.data.batching import BatchShape, Source, measure
    from llasa_jax.data.records import open_utterances
    from llasa_jax.encode.offline import encode
    from llasa_jax.speech.audio import read_audio
    from llasa_jax.speech.prompts import Prompter
    from llasa_jax.speech.settings import PromptSettings

    rng = np.random.default_rng(0)
    seconds = ljspeech_seconds(clips, rng)
    manifest = write_clips(bench.speech, bench.folder / "clips", seconds.tolist())
    records = bench.folder / "records"
    encode(manifest, records, bench.codec)
    waves = [read_audio(path) for path in sorted(manifest.parent.glob("*.flac"))]
    length, shape = 1024, BatchShape(1, 1, 1024)
    prompter = Prompter(load_tokenizer(bench.model), PromptSettings().filled())
    steps = measure([Source(open_utterances(records, "train"), prompter)], length, seed=0).steps(
        1.0, shape
    )
    for side, path in (
        (bench.offline, records),
        (bench.online, manifest),
    ):  # compiles, and keeps the program on disk
        side(path, length, 2)
    print(
        f"{clips} clips, {seconds.sum():.0f} s of speech; {steps} steps of {length} tokens; load"
        f" before: {os.getloadavg()[0]:.1f}"
    )
    heads = (
        "starting offline",
        "starting online",
        "encoding alone",
        "steps on codes",
        "online",
        "ratio",
    )
    print(" ".join(f"{head:>16}" for head in heads))
    rows = []
    for _ in range(turns):
        starts = bench.offline(records, length, 1), bench.online(manifest, length, 1)
        alone, steps_alone = bench.encode(waves), bench.offline(records, length, steps) - starts[0]
        online = bench.online(manifest, length, steps) - starts[1]
        rows.append((*starts, alone, steps_alone, online, online / max(alone, steps_alone)))
        print(
            " ".join(f"{value:>14.2f} s" for value in rows[-1][:-1]) + f" {rows[-1][-1]:>15.3f}",
            flush=True,
        )
    median = sorted(row[-1] for row in rows)[len(rows) // 2]
    print(
        f"load after: {os.getloadavg()[0]:.1f}; online less start-up is {median:.3f}x the longer"
        f" half, {MUST_REACH} is asked for"
    )


def children_of(pid: int) -> list[int]:
    """The processes that any of its threads has started."""
    return [
        int(child)
        for file in Path(f"/proc/{pid}/task").glob("*/children")
        for child in file.read_text().split()
    ]


def resident() -> float:
    """MB in the memory of this process and its children, what they share counted for each."""
    pids = [os.getpid(), *children_of(os.getpid())]
    return (
        sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
        * os.sysconf("SC_PAGE_SIZE")
        / 1e6
    )


def memory(bench: Bench, steps: int) -> None:
    manifest = write_clips(
        bench.speech, bench.folder / "short", [0.3 + 0.004 * i for i in range(100)]
    )
    metrics = bench.folder / f"run{bench.runs + 1}" / "metrics.jsonl"
    marks: dict[int, float] = {}
    done = threading.Event()

    def watch():
        while not done.wait(0.05):
            step = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
            mark = step // (steps // 10) * (steps // 10)
            if mark and mark not in marks:
                marks[mark] = resident()

    watcher = threading.Thread(target=watch)
    watcher.start()
    bench.online(manifest, 128, steps)
    done.set()
    watcher.join()
    print(f"memory of the trainer and its reader in {steps} online steps, MB:")
    print(" ".join(f"{step}: {size:.0f}" for step, size in sorted(marks.items())))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--speech", type=Path, default=Path(__file__).parents[1] / "tests/speech")
    parser.add_argument("--clips", type=int, default=240)
    parser.add_argument("--turns", type=int, default=3, help="0 leaves the comparison out")
    parser.add_argument(
        "--steps", type=int, default=1000, help="of the measurement of memory, 0 for none"
    )
    args = parser.parse_args()
    import jax
    import torch

    torch.set_num_threads(1)
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("jax", "torch", "transformers", "grain")
    )
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()}-core {platform.machine()} VM, {size:.0f}"
        f" GB; {versions}"
    )
    folder = Path(tempfile.mkdtemp())
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        bench = Bench(folder, args.speech)
        if args.turns:
            compare(bench, args.clips, args.turns)
        if args.steps:
            memory(bench, args.steps)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
