"""How much quicker does a run start when its programs are compiled already, and how long does
saving hold training up? `python benchmarks/restart.py`.

A Llama of --width and --layers with random weights is trained by `llasa-jax train` for --steps
steps with a checkpoint after each, in a process of its own, twice: with an empty folder of compiled
programs, and with what the first process left there; both on 8 virtual CPU devices. Everything is
from the run's own metrics (`goodput`) but the processor time, which a busy machine changes less
than the clock.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

from llasa_jax.data.builder import write_dataset
from llasa_jax.demo.tiny_llama import make_tiny_llama, make_tiny_tokenizer

ROOT = Path(__file__).parents[1]
LENGTH = 256


def make_data(folder: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"id": f"clip{i}", "text": f"word {i}", "codes": rng.integers(0, 65_536, 150)}
        | {"speaker": "", "description": "", "language": ""}
        for i in range(200)
    ]
    write_dataset(folder, {"train": iter(rows)}, {"codec": "random", "fingerprint": "unknown"})


def run(folder: Path, name: str, steps: int, rows: int) -> dict[str, float]:
    """The last `goodput` line of a run, and `cpu`: the process's own seconds."""
    settings = {
        "out": folder / name,
        "model.path": folder / "model",
        "data.path": folder / "records",
        "data.max_length": LENGTH,
        "data.doctor": "off",
        "train.rows": rows,
        "train.steps": steps,
        "train.save_every": 1,
        "log.tensorboard": "false",
        "mesh.compiled": folder / "compiled",
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
    }
    command = [sys.executable, "-m", "llasa_jax.cli", "train"]
    command += [f"--{key}={value}" for key, value in settings.items()]
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").open()]
    spent = [line for line in lines if "goodput" in line][-1]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent | {"cpu": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        sizes = {"hidden_size": args.width, "intermediate_size": 4 * args.width}
        sizes |= {"num_hidden_layers": args.layers, "head_dim": args.width // 4}
        make_tiny_llama(folder / "model", make_tiny_tokenizer(), **sizes)
        make_data(folder / "records")
        first, again = (run(folder, name, args.steps, args.rows) for name in ("first", "again"))
    print(
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} CPUs, load"
        f" {os.getloadavg()[0]:.0f}, Python {platform.python_version()}, jax {version('jax')}"
    )
    print(f"width {args.width}, {args.layers} layers, {args.rows} rows of {LENGTH} tokens\n")
    print("seconds            first start   with compiled programs")
    for name, words in (("compile", "compiling"), ("start", "all else before step 1")):
        print(f"{words:24}{first[f'seconds_{name}']:8.1f}{again[f'seconds_{name}']:16.1f}")
    print(f"{'processor, whole run':24}{first['cpu']:8.1f}{again['cpu']:16.1f}")
    starts = [spent["seconds_compile"] + spent["seconds_start"] for spent in (first, again)]
    print(
        f"\nthe start is {starts[0] / starts[1]:.1f} times as quick, compiling"
        f" {first['seconds_compile'] / max(again['seconds_compile'], 1e-3):.1f} times"
    )
    save, step = (again[f"seconds_{name}"] / args.steps for name in ("save", "train"))
    print(f"saving holds training up for {save:.2f} s; a step takes {step:.2f} s")


if __name__ == "__main__":
    main()
