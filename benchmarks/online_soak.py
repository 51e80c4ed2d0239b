"""A soak of online training among faults: `python benchmarks/online_soak.py --minutes 30`.

Round after round, a run of one epoch is trained online with a real (tiny) codec. A tenth of its
clips are bad. Meanwhile audio stalls, reading processes kill themselves and are killed, the codec
raises in its thread, and the trainer is stopped (SIGTERM, SIGINT) and killed (SIGKILL), each at
random, also while it starts; the same command goes on every time. At the end of a round every good
clip must have been trained on in exactly one step, every bad one in none and be listed with its
reason, and a step that was done twice must have had the same clips. Any other end of a process than
those that were asked for, and three minutes without a step, fail. Stops longer than five seconds
are reported.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests/fixtures")]

from llasa_jax.runtime.signals import CommandSignal  # noqa: E402

if __name__ == "__main__" and "--train" in sys.argv:
    CommandSignal().__enter__()  # like `llasa-jax train`, before anything large is imported

from online import children_of  # noqa: E402

from llasa_jax.encode.sources import ManifestAudio  # noqa: E402
from llasa_jax.speech.audio import read_audio  # noqa: E402

CLIPS, HANGS_AFTER, STOPS_WITHIN = 80, 180.0, 5.0
STALL, READER_DIES, THREAD_DIES = 0.04, 0.03, 0.004  # chances a clip, or a batch in the codec


class FaultyAudio(ManifestAudio):
    """Some clips come late, and some kill the process that reads them, once."""

    def __init__(self, manifest, marks: Path):
        super().__init__(manifest)
        self.marks = marks

    def waves(self):
        return self

    def place(self, index):
        return index

    def where(self, index):
        return self.key(index)[0]

    def wave(self, index):
        chance, mark = random.random(), self.marks / str(index)
        if chance < STALL:
            _count(self.marks, "stalls")
            time.sleep(random.uniform(0.5, 4.0))
        elif chance < STALL + READER_DIES and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return read_audio(self.key(index)[0])


def train(config: Path, marks: Path) -> int:
    """What the trainer's process does: `llasa-jax train`, with faults, telling the clips of every
    step.
    """
    from llasa_jax import cli
    from llasa_jax.codec import load_codec
    from llasa_jax.encode import mixture, online, online_cache
    from llasa_jax.train import progress

    class FaultyCodec:
        def __init__(self, *arguments):
            self._codec = load_codec(*arguments)

        def encode(self, waves):
            if random.random() < THREAD_DIES * len(waves):
                raise RuntimeError("injected into the thread")
            return self._codec.encode(waves)

        def __getattr__(self, name):
            return getattr(self._codec, name)

    filled, taken = collections.deque(), []
    fill, take, add = online.fill, online.OnlineBatches.__next__, progress.Progress.add

    def noting_fill(rows, *rest):
        filled.append(
            [planned.record.id for row in rows for planned in row if planned.example is not None]
        )
        return fill(rows, *rest)

    def noting_next(self):
        batch = take(self)
        taken[:] = filled.popleft()
        return batch

    def noting_add(self, step, *rest):
        with (marks / "steps.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "ids": taken}) + "\n")
        return add(self, step, *rest)

    online.fill, online.OnlineBatches.__next__, progress.Progress.add = (
        noting_fill,
        noting_next,
        noting_add,
    )
    online_cache.load_codec = FaultyCodec
    mixture.open_audio = lambda path, settings: FaultyAudio(path, marks)
    return cli.main(["train", "--config", str(config)])


def make_clips(folder: Path, seed: int) -> set[str]:
    """Writes a manifest of clips, a tenth of them bad, and returns the ids of the good ones.

    What is wrong with a bad one (cut short as FLAC and as WAV, silent, NaN) shows when it is read,
    and not before: a clip without a header is in no row, and the first rows of the next epoch then
    stand among the last of this one.
    """
    import numpy as np
    import soundfile
    from online import RATE, write_clips

    chance = random.Random(seed)
    write_clips(
        HERE.parent / "tests/speech", folder, [chance.uniform(0.4, 2.5) for _ in range(CLIPS)]
    )
    bad = chance.sample(range(CLIPS), CLIPS // 10)
    for number, clip in enumerate(bad):
        path = folder / f"{clip:05d}.flac"
        if number % 4 > 1:
            wave = np.full(RATE, 0.0 if number % 4 == 2 else np.nan, np.float32)
            soundfile.write(path, wave, RATE, format="WAV", subtype="FLOAT")
        elif number % 4:
            soundfile.write(path, soundfile.read(path)[0], RATE, format="WAV")
        if number % 4 < 2:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return {f"{clip:05d}" for clip in range(CLIPS) if clip not in bad}


def one_round(
    folder: Path, model: Path, codec: Path, seed: int, counts: collections.Counter
) -> None:
    chance = random.Random(seed)
    (marks := folder / "marks").mkdir(parents=True)
    good = make_clips(folder / "clips", seed)
    online = {
        "codec": str(codec),
        "workers": 2,
        "queue": 2,
        "max_bad_share": 0.2,
        "stall_seconds": 2.0,
        "torch_threads": 1,
    }
    if seed % 2:
        online["cache"] = str(folder / "cache")
    settings = {
        "out": str(folder / "run"),
        "model": {"path": str(model), "dtype": "float32", "remat": "none", "loss_chunk": 64},
        "data": {
            "mode": "online",
            "path": str(folder / "clips/manifest.jsonl"),
            "max_length": 256,
            "doctor": "off",
            "online": online,
        },
        "train": {"epochs": 1, "rows": 1, "save_every": 5, "seed": seed},
        "log": {"every": 1000, "tensorboard": False},
    }
    config = folder / "config.yaml"
    config.write_text(json.dumps(settings))
    ended = None
    while ended != 0:
        ended = one_process(config, marks, chance, counts)
        counts["processes"] += 1
    steps: dict[int, list[str]] = {}
    for line in (marks / "steps.jsonl").read_text().splitlines():
        step = json.loads(line)
        if steps.setdefault(step["step"], step["ids"]) != step["ids"]:
            raise SystemExit(
                f"step {step['step']} had {steps[step['step']]}, and other clips when it was done"
                f" again: {step['ids']}"
            )
    used = collections.Counter(clip for ids in steps.values() for clip in ids)
    twice, missed, wrong = (
        [clip for clip, times in used.items() if times > 1],
        good - used.keys(),
        used.keys() - good,
    )
    reasons = {
        bad["id"]: bad["reason"]
        for bad in map(json.loads, (folder / "run/bad.jsonl").read_text().splitlines())
    }
    if twice or missed or wrong:
        unused = {clip: reasons.get(clip, "no reason is listed") for clip in sorted(missed)}
        raise SystemExit(
            f"clips used twice: {twice}; good and not used: {unused}; bad and used: {sorted(wrong)}"
        )
    listed = reasons.keys()
    if listed != {f"{clip:05d}" for clip in range(CLIPS)} - good:
        raise SystemExit(f"bad.jsonl lists {sorted(listed)}, not the bad clips")
    counts["reading processes that killed themselves"] += len(
        [mark for mark in marks.iterdir() if mark.name.isdigit()]
    )
    counts["clips that stalled"] += (
        (marks / "stalls").stat().st_size if (marks / "stalls").exists() else 0
    )
    counts |= {"good clips, each used once": counts["good clips, each used once"] + len(good)}
    counts |= {
        "bad clips, none used": counts["bad clips, none used"] + len(listed),
        "steps": counts["steps"] + len(steps),
    }


def one_process(
    config: Path, marks: Path, chance: random.Random, counts: collections.Counter
) -> int:
    """Runs a trainer, does it harm, and returns 0 where it has finished all the same."""
    command = [sys.executable, __file__, "--train", str(config), str(marks)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(child.stdout), daemon=True)
    reader.start()
    steps = marks / "steps.jsonl"
    # A third of the processes are sent a signal somewhere in their first ten seconds, which is
    # mostly before any step.
    early = time.monotonic() + chance.uniform(0.1, 10.0) if chance.random() < 0.33 else float("inf")
    size, since, asked, asked_at = -1, time.monotonic(), 0, 0.0
    while child.poll() is None:
        time.sleep(0.1)
        grown = steps.stat().st_size if steps.exists() else 0
        draw = 1.0
        if grown != size:
            size, since = grown, time.monotonic()
            draw = chance.random() if grown else 1.0
        starting = time.monotonic() > early
        if not asked and (starting or draw < 0.08):
            asked, asked_at = (
                chance.choice((signal.SIGTERM, signal.SIGKILL, signal.SIGINT)),
                time.monotonic(),
            )
            child.send_signal(asked)
            counts[f"trainers sent {asked.name}{' as they start' if starting else ''}"] += 1
        elif draw < 0.2:
            with contextlib.suppress(OSError):  # it may have ended by itself
                readers = [
                    pid
                    for pid in children_of(child.pid)
                    if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
                ]
                if readers:
                    os.kill(chance.choice(readers), signal.SIGKILL)
                    counts["reading processes killed"] += 1
        if time.monotonic() - since > HANGS_AFTER:
            child.kill()
            raise SystemExit(
                f"no step for {HANGS_AFTER:.0f} s; the last that the trainer"
                f" said:\n{''.join(said)[-3000:]}"
            )
    took = 0.0
    if asked in (signal.SIGTERM, signal.SIGINT):
        took = round(time.monotonic() - asked_at, 1)
        counts["longest stop, s"] = max(counts["longest stop, s"], took)
    reader.join()
    text = "".join(said)
    if took > STOPS_WITHIN:
        print(
            f"stopping by {asked.name} took {took} s; the last that the trainer"
            f" said:\n{text[-1000:]}",
            flush=True,
        )
    counts["warnings of stalls"] += text.count("stalled") + text.count("has waited")
    if child.returncode == 1 and "injected into the thread" in text:
        counts["threads that raised"] += 1
    elif child.returncode and child.returncode not in (-asked, 128 + asked):
        raise SystemExit(
            f"the trainer ended with {child.returncode}, sent {asked}:\n{text[-5000:]}"
        )
    return child.returncode


def _count(marks: Path, what: str) -> None:
    with (marks / what).open("a") as file:
        file.write(".")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--train", nargs=2, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        sys.exit(train(*args.train))
    from tiny_run import make_model

    from llasa_jax.demo.tiny import make_tiny_codec

    folder, began, rounds = Path(tempfile.mkdtemp()), time.monotonic(), 0
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    counts: collections.Counter = collections.Counter()
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("jax", "torch", "transformers", "grain")
    )
    print(
        f"{time.strftime('%Y-%m-%d')}; {versions}; rounds of {CLIPS} clips, a tenth of them bad",
        flush=True,
    )
    try:
        model, codec = make_model(folder / "model"), make_tiny_codec(folder / "codec")
        while not rounds or time.monotonic() - began < args.minutes * 60:
            one_round(folder / f"round{rounds}", model, codec, rounds, counts)
            rounds += 1
            print(
                f"{(time.monotonic() - began) / 60:5.1f} minutes, {rounds} rounds:"
                f" {json.dumps(counts)}",
                flush=True,
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"no hang, and every good clip used once, in {rounds} rounds of"
        f" {(time.monotonic() - began) / 60:.1f} minutes together"
    )


if __name__ == "__main__":
    main()
