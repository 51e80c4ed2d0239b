"""A run on 2, 1 and 4 hosts in turn, one of which is killed again and again:
`python benchmarks/pod_kills.py --kills 20`.

Processes with a folder, a cache and devices of their own stand for hosts; they share nothing but a
bucket, served on this machine, where model, data and run lie. At random moments, start-up included,
a random one of them is killed with SIGKILL; the others must end by themselves. The same command
then goes on with another number of hosts. Losses, gradient norms and validation losses must be bit
for bit those of one process that nothing interrupts, and each step must be there once.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ |= {"LLASA_JAX_CACHE": "copies", "JAX_COMPILATION_CACHE_DIR": "compiled"}
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fixtures"))

from buckets import environment, served  # noqa: E402
from host_processes import start  # noqa: E402
from tiny_run import make_clips, make_model  # noqa: E402

HOSTS = 2, 1, 4
DEVICES = 4  # in all
LONGEST_END = 60.0  # seconds for the others to end
NAMES = "loss", "grad_norm", "accuracy", "validation_loss"


def put_up(folder: Path) -> None:
    """Model and data, in the bucket."""
    from llasa_jax.data.builder import write_dataset
    from llasa_jax.runtime.bucket_files import upload

    upload(make_model(folder / "model"), "gs://bucket/model", "model.json")
    rows = [
        {"id": clip.id, "text": clip.text, "codes": clip.codes}
        | {"speaker": clip.speaker, "description": "", "language": ""}
        for clip in make_clips(60)
    ]
    splits = {"train": iter(rows[:50]), "validation": iter(rows[50:])}
    write_dataset("gs://bucket/records", splits, {"codec": "tiny", "fingerprint": "unknown"})


def settings(out: str, steps: int) -> list[str]:
    return [
        *("--model.path=gs://bucket/model", "--data.path=gs://bucket/records", f"--out={out}"),
        *("--data.validation_split=validation", "--data.streams=4", "--train.validate_every=50"),
        *(f"--train.steps={steps}", "--train.rows=4", "--train.save_every=10", "--train.keep=2"),
        *("--optimizer.learning_rate=0.01", "--mesh.data=1", f"--mesh.fsdp={DEVICES}"),
        # One process says so too: sums over a CPU's devices then go the same way, and round in the
        # same order, as those over several processes. The timeout is for a host that was killed
        # before they have met; then host 0 tells those that come late.
        *("--mesh.hosts=true", "--mesh.start_timeout=20"),
    ]


def processes_of(scratch: Path, name: str, out: str, steps: int, hosts: int) -> tuple[Path, list]:
    logs = scratch / "logs" / name
    logs.mkdir(parents=True)
    places = [scratch / f"host{number}" for number in range(hosts)]
    for place in places:
        place.mkdir(exist_ok=True)
    each = [settings(out, steps)] * hosts
    return logs, start(logs, *each, where=places, devices=DEVICES // hosts)


def begun(logs: Path) -> bool:
    return any("\nstep " in path.read_text() for path in logs.glob("*.out"))


def wait(processes: list, seconds: float) -> bool:
    """Waits so long at most; whether all have ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if all(process.poll() is not None for process in processes):
            return True
        time.sleep(0.05)
    return False


def numbers(out: str) -> list[list]:
    """(step, what was measured) of a run in the bucket, as they come."""
    from llasa_jax.runtime.copies import local_copy

    file = local_copy(out, lambda name: name == "metrics.jsonl") / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [[line["step"], {n: line[n] for n in NAMES if n in line}] for line in lines]
    return [line for line in kept if line[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder, served("gs", Path(folder)) as address:
        scratch = Path(folder)
        os.chdir(scratch)  # this process's copies and programs are beside the hosts'
        os.environ.update(environment("gs", address))
        put_up(scratch)
        logs, alone = processes_of(scratch, "alone", "gs://bucket/alone", options.steps, 1)
        if not wait(alone, 3600) or alone[0].returncode:
            sys.exit((logs / "0.err").read_text()[-2000:])
        run, kills, slowest = "gs://bucket/run", 0, 0.0
        for number in range(2 * options.kills + 1):
            hosts = HOSTS[number % len(HOSTS)]
            logs, processes = processes_of(scratch, str(number), run, options.steps, hosts)
            done, victim = False, moments.randrange(hosts)
            if kills < options.kills:
                # While it starts, or some time after its first step.
                deadline = time.monotonic() + moments.uniform(2, 20)
                if moments.random() < 0.7:
                    while not begun(logs) and not wait(processes, 0.05):
                        pass
                    deadline = time.monotonic() + moments.uniform(0, 6)
                done = wait(processes, deadline - time.monotonic())
            if kills == options.kills or done:
                ended = done or wait(processes, 3600)
            else:
                processes[victim].kill()
                kills, since = kills + 1, time.monotonic()
                ended = wait(processes, LONGEST_END)
                slowest = max(slowest, time.monotonic() - since)
            for process in processes:
                process.kill()
            codes = [process.wait() for process in processes]
            print(
                f"part {number}: {hosts} hosts, host {victim} killed, statuses {codes}"
                if not done and codes[victim] == -9
                else f"part {number}: {hosts} hosts, statuses {codes}",
                flush=True,
            )
            if not ended:
                said = [path.read_text()[-1500:] for path in sorted(logs.iterdir())]
                sys.exit(f"FAULT: they did not end within {LONGEST_END:g} s:\n" + "\n".join(said))
            if codes == [0] * hosts:
                break
        ours, theirs = numbers(run), numbers("gs://bucket/alone")
        result = {
            "steps": options.steps,
            "kills": kills,
            "longest end of the others, s": round(slowest, 1),
            "lines of metrics": len(ours),
            "equal to one process's, bit for bit": ours == theirs,
            "largest difference of a loss": max(
                abs(mine[1].get("loss", 0.0) - other[1].get("loss", 0.0))
                for mine, other in zip(ours, theirs, strict=False)
            ),
        }
        print(json.dumps(result, indent=2))
        if ours != theirs or kills < options.kills:
            sys.exit("FAULT")


if __name__ == "__main__":
    main()
