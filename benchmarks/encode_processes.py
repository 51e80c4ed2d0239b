"""Encoding by two processes on two cores against one that is pinned to one core:
`python benchmarks/encode_processes.py`, with nothing else running. The codec is PyTorch's, small
and with random weights, on the corpus of real speech under many ids.

A second is counted from the first clip that is encoded to the last, since all start alike. The same
clips' processor seconds, of all processes together, say what is reached on a machine that does
something else too: with none lost, two cores would take half of one's time.
"""

import argparse
import functools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def encode(folder: Path, processes: int) -> None:
    """Encodes in this many processes, and prints how long it took after the first clip."""
    from unittest import mock

    from llasa_jax.encode import processes as module
    from llasa_jax.encode.offline import Job
    from llasa_jax.encode.sources import ManifestAudio

    times, used = [], []

    class Bar:
        def __init__(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, clips):
            times.append(time.monotonic())
            used.append(processor_seconds())

    source = functools.partial(ManifestAudio, folder / "m.jsonl")
    out = folder / f"by_{processes}"
    job = Job(source, out, str(folder / "codec"), workers=1, clips_a_file=40)
    with mock.patch.object(module, "tqdm", Bar):
        module.encode_on(job, ["cpu"] * processes)
    print(f"TOOK {times[-1] - times[0]:.2f} {used[-1] - used[0]:.2f}")


def processor_seconds() -> float:
    """Those of this process and all below it, while they run."""
    ours, seconds = {os.getpid()}, 0.0
    for number in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if number in ours or int(fields[1]) in ours:
            ours.add(number)
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=30, help="each clip, under other ids")
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.processes:
        encode(options.folder, options.processes)
        return

    import torch

    from llasa_jax.demo.tiny import make_tiny_codec

    load = os.getloadavg()[0]
    print(f"{date.today()}, {os.cpu_count()}-core {platform.machine()}, load {load:.1f};", end=" ")
    print(f"Python {platform.python_version()}, torch {torch.__version__}", flush=True)
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_tiny_codec(folder / "codec")
        lines = (ROOT / "tests/speech/manifest.jsonl").read_text().splitlines()
        with (folder / "m.jsonl").open("w") as file:
            for number in range(options.times):
                for row in map(json.loads, lines):
                    audio = str(ROOT / "tests/speech" / row["audio"])
                    row |= {"audio": audio, "id": f"{row['id']}_{number}"}
                    file.write(json.dumps(row) + "\n")
        took, used = {}, {}
        for count in (1, 2):
            pinned = ["taskset", "-c", ",".join(map(str, cores[:count]))]
            command = [sys.executable, __file__, f"--processes={count}", f"--folder={folder}"]
            said = subprocess.run([*pinned, *command], capture_output=True, text=True, check=True)
            took[count], used[count] = map(float, said.stdout.rpartition("TOOK ")[2].split())
            clips = options.times * len(lines)
            print(
                f"{count} processes on {count} cores: {clips} clips in {took[count]:.1f} s, of"
                f" {used[count]:.1f} s of processors",
                flush=True,
            )
        print(f"{took[1] / took[2]:.2f} times as fast", end="; ")
        print(f"with whole cores {2 * used[1] / used[2]:.2f} times, by processor seconds")
        one, two = (
            {path.name: path.read_bytes() for path in (folder / f"by_{count}").iterdir()}
            for count in (1, 2)
        )
        print(f"byte-equal: {one == two}")


if __name__ == "__main__":
    main()
