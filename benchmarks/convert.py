"""How much memory and time a conversion takes: `python benchmarks/convert.py [FOLDER]`, with 60 GB
free in FOLDER.

Prints a Markdown table. Checkpoints are synthetic, bfloat16, of the published models' shapes with
Llasa's vocabulary. The 8B one has room on the disk and was never written (all zeros), which is
enough to measure memory. The 1B one has random weights, and its speed is set beside that of `cp -r`
of the same files on the same disk: medians of six rounds, each in another order. Times are until
everything is written back to disk (`sync`), without starting Python; sources are in the page cache
for all alike. Peak memory is that of the whole process, as the kernel counts it (`VmHWM`). What is
allowed is three times the largest tensor and 1 GB, and never more than 6 GiB.
"""

import datetime
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np

from llasa_jax.convert.hf_config import model_config
from llasa_jax.convert.import_hf import import_hf
from llasa_jax.convert.names import places
from llasa_jax.convert.safetensors_io import SafetensorsWriter
from llasa_jax.demo.tiny_llama import make_tiny_tokenizer

LLASA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 193_800,
    "rope_theta": 5e5,
}
SHAPES = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}


def make_checkpoint(folder: Path, size: str, filled: bool) -> int:
    """Writes a checkpoint of `size` and returns its tensors' bytes. `filled` with random weights,
    or never written.
    """
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(LLASA | SHAPES[size] | {"num_key_value_heads": 8})
    )
    shapes = {
        name: place.shape
        for name, place in places(
            model_config(LLASA | SHAPES[size] | {"num_key_value_heads": 8}, folder)
        ).items()
    }
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    with SafetensorsWriter(folder, shapes, dict.fromkeys(shapes, bfloat16), 5 * 10**9) as writer:
        for name, shape in shapes.items():
            last = shape[0] - 1
            if filled:
                bits = np.random.default_rng(0).integers(
                    0, 1 << 14, shape, np.uint16
                )  # positive and below 2: no NaN
                writer.write(name, bits.view(bfloat16))
            else:
                writer.write(name, np.zeros((1, *shape[1:]), bfloat16), last)
    make_tiny_tokenizer().save_pretrained(folder)
    return sum(math.prod(shape) * 2 for shape in shapes.values())


def measure(code: str) -> tuple[float, float]:
    """Seconds that the last line of `code` takes until all is on disk, and peak memory in GiB, in a
    process of its own.
    """
    *setup, last = code.splitlines()
    timed = [
        *setup,
        "import os, time",
        "os.sync()",
        "started = time.monotonic()",
        last,
        "os.sync()",
        "print(time.monotonic() - started)",
    ]
    # Not `ru_maxrss`, which a child inherits from the process that started it.
    timed.append(
        "print(next(line.split()[1] for line in open('/proc/self/status') if"
        " line.startswith('VmHWM')))"
    )
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(timed)], capture_output=True, text=True
    )
    if result.returncode:
        raise SystemExit(f"this failed:\n{code}\n{result.stderr}")
    seconds, kilobytes = result.stdout.split()
    return float(seconds), int(kilobytes) / (1 << 20)


def main(parent: str | None = None) -> None:
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("numpy", "tensorstore", "orbax-checkpoint", "jax")
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    print(
        f"{datetime.date.today()}, {os.cpu_count()}-core "
        f"{platform.machine().replace('_', '-')} VM, {memory:.0f} GB"
    )
    print(
        f"Load average {os.getloadavg()[1]:.0f} before, over 5 minutes: other work on the machine"
        " slows whatever uses the processor"
    )
    print(f"Python {platform.python_version()}, {packages}\n")
    print("| checkpoint | GB | step | seconds | MB/s | speed of cp | peak GiB | allowed GiB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        source, copy, model, again, out = (
            Path(folder) / name for name in ("hf", "copy", "model", "again", "out")
        )
        steps = {
            "cp": (
                (
                    f"import subprocess\nsubprocess.run(['cp', '-r', '{source}', '{copy}'],"
                    " check=True)"
                ),
                copy,
            ),
            "import": (
                (
                    f"from llasa_jax.convert.import_hf import import_hf\nimport_hf('{source}',"
                    f" '{again}')"
                ),
                again,
            ),
            "export": (
                f"from llasa_jax.convert.export_hf import export_hf\nexport_hf('{model}', '{out}')",
                out,
            ),
        }
        for size, rounds in (("1B", 6), ("8B", 1)):
            total = make_checkpoint(source, size, filled=size == "1B")
            import_hf(source, model)
            results = {step: [] for step in steps if rounds > 1 or step != "cp"}
            for turn in range(rounds):
                # Each comes first, second and third equally often: a disk slows down after a burst
                # of writes.
                order = list(results)[turn % 3 :] + list(results)[: turn % 3]
                for step in order:
                    code, made = steps[step]
                    results[step].append(measure(code))
                    shutil.rmtree(made)
            shutil.rmtree(source)
            shutil.rmtree(model)
            typical = {
                step: statistics.median(seconds for seconds, _ in measured)
                for step, measured in results.items()
            }
            allowed = min(6.0, (3 * 193_800 * SHAPES[size]["hidden_size"] * 2 + 1e9) / (1 << 30))
            for step, measured in results.items():
                ratio = f"{typical['cp'] / typical[step]:.2f}" if "cp" in typical else ""
                seconds, peak = typical[step], max(peak for _, peak in measured)
                columns = [
                    size,
                    f"{total / 1e9:.2f}",
                    step,
                    f"{seconds:.1f}",
                    f"{total / 1e6 / seconds:.0f}",
                    ratio,
                ]
                columns += ["", ""] if step == "cp" else [f"{peak:.2f}", f"{allowed:.2f}"]
                print(f"| {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
