"""A run in a bucket whose store fails: `python benchmarks/bucket_faults.py --faults 200 --kills 3`.

A tiny run is trained with `out=gs://...`, from a store on this machine that answers requests with
500 and 429, cuts connections and waits five seconds, so many times in all; meanwhile the process is
killed (SIGKILL) at random moments, and the same command goes on. The losses must be bit for bit
those of a run on the local disk, no step may be done again that a whole checkpoint has, and the
longest silence is reported: the time between two lines of a training that takes a line a step.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
sys.path.insert(0, str(FIXTURES))

from buckets import environment, faults, served  # noqa: E402

STEPS, SAVE_EVERY, LONGEST_SILENCE = 60, 2, 60.0


def train(model: str, out: str) -> None:
    from tiny_run import make_clips, settings_for

    from llasa_jax.train import loop

    settings = settings_for(
        model,
        out,
        mesh={"data": 1, "fsdp": 1, "tensor": 1},
        train={"steps": STEPS, "save_every": SAVE_EVERY, "keep": 2, "validate_every": 1000},
        log={"every": 1},
    )
    loop.train(settings, [make_clips()])


def start(model: Path, out: str | Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--train", str(model), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def follow(process: subprocess.Popen, kill_after: float | None) -> tuple[list[int], float]:
    """The steps that a process reports, killed so many seconds after the first, and the longest
    time between two of its lines after that.
    """
    steps: list[int] = []
    silence, before, started = 0.0, 0.0, 0.0
    for line in process.stdout:
        now = time.monotonic()
        if line.startswith("step ") and "/" in line.split()[1]:
            steps.append(int(line.split()[1].split("/")[0]))
            started = started or now
        if started:
            silence = max(silence, now - (before or now))
            before = now
        if kill_after is not None and started and now - started > kill_after:
            process.kill()
            break
    process.wait()
    return steps, silence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--share", type=float, default=0.1, help="of requests that fail")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from tiny_run import losses, make_model

    from llasa_jax.convert.model_folder import saved_steps
    from llasa_jax.runtime.copies import local_copy

    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch, served("gs", Path(scratch)) as address:
        folder = Path(scratch)
        os.environ.update(environment("gs", address))
        os.environ |= {"LLASA_JAX_CACHE": f"{scratch}/copies"}
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": f"{scratch}/compiled"}
        model, run = make_model(folder / "model"), "gs://bucket/run"
        started = time.monotonic()
        follow(start(model, folder / "run"), None)
        local_seconds = time.monotonic() - started
        kinds = ["500", "429", "cut", "slow"]
        faults({"share": args.share, "kinds": kinds, "most": args.faults, "seed": args.seed})
        started, silences, again = time.monotonic(), [], 0
        last = 0
        for number in range(args.kills + 1):
            kill_after = moments.uniform(1, 20) if number < args.kills else None
            process = start(model, run)
            steps, silence = follow(process, kill_after)
            silences.append(silence)
            again += max(0, last + 1 - steps[0]) if steps else 0
            last = steps[-1] if steps else last
            whole = saved_steps(run)
            print(
                f"part {number}: steps {steps[:1]} to {steps[-1:]}, status {process.returncode},"
                f" whole checkpoints {whole}, longest silence {silence:.1f} s",
                flush=True,
            )
            if process.returncode == 0:
                break
        result = {
            "steps": STEPS,
            "checkpoints": STEPS // SAVE_EVERY,
            "faults": faults(),
            "kills": args.kills,
            "steps done again": again,
            "longest silence, s": round(max(silences), 1),
            "seconds": round(time.monotonic() - started),
            "seconds on the local disk": round(local_seconds),
            "same losses": losses(local_copy(run)) == losses(folder / "run"),
        }
        print(json.dumps(result, indent=2))
        if not result["same losses"] or max(silences) > LONGEST_SILENCE:
            sys.exit("FAULT")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(*sys.argv[2:])
    else:
        main()
