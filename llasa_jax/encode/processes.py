"""Encoding on all devices of a machine: a process for each, which makes one shard after another."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
from collections import Counter, deque
from collections.abc import Iterator
from multiprocessing.connection import wait
from types import SimpleNamespace
from typing import Any, cast

from tqdm import tqdm

from llasa_jax.codec import Codec
from llasa_jax.data.seal import SEAL, check_unfinished
from llasa_jax.data.shards import Shard
from llasa_jax.encode.offline import Job, Summary, codec_metadata, make_shard, seal
from llasa_jax.encode.readers import without_main
from llasa_jax.errors import UserError
from llasa_jax.runtime.signals import end_with_parent
from llasa_jax.runtime.storage import check_writable

CHANCES = 3  # how many processes may die of one shard


def all_devices(device: str, processes: int = 1) -> list[str]:
    """The devices of this machine, each for `processes` processes: every GPU for "cuda"; one for
    others, as JAX's codec takes all chips by itself. UserError where there is no GPU.
    """
    names = [device]
    if device.partition(":")[0] == "cuda":
        import torch

        names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        if not names:
            raise UserError(f"--devices all with --device {device}: PyTorch sees no GPU; use cpu.")
    return names * processes


def encode_on(job: Job, devices: list[str]) -> Summary:
    """As `encode_here`, with one process for each of `devices` (a CPU's share its cores). A process
    that dies is replaced, and its shard goes on from its journal.
    """
    check_writable(job.folder.parent)
    check_unfinished(job.folder)
    if (job.folder / SEAL).is_file():
        return seal(job)
    source = job.source()
    # Opened once here, for what the shards are; the codec is loaded by the processes alone.
    maker = dataclasses.replace(job, source=lambda: source).open(described({}))
    with (
        _Processes(job, devices, maker.shards) as processes,
        tqdm(desc="encode", total=len(source), unit="clip") as bar,
    ):
        codec = described(processes.run(bar.update))
    return seal(dataclasses.replace(job, source=lambda: source), codec)


def described(metadata: dict) -> Codec:
    """A codec that another process has loaded, by its `codec_metadata`."""
    name = {"name": metadata.get("codec", ""), "fingerprint": ""}
    return cast(Codec, SimpleNamespace(**metadata | name | metadata))


class _Processes:
    def __init__(self, job: Job, devices: list[str], shards: list[Shard]):
        self._job, self._shards = job, shards
        # The largest first, so that all end at about the same time
        order = sorted(range(len(shards)), key=lambda at: -len(shards[at].members))
        self._todo: deque[int] = deque(order)
        self._deaths: Counter[int] = Counter()
        self._context = multiprocessing.get_context("spawn")
        self._busy: dict[Any, tuple[int, int | None, Any]] = {}
        self._devices = devices[: max(1, len(shards))]

    def run(self, done) -> dict:
        """Makes all shards, and returns the description of the codec."""
        for number in range(len(self._devices)):
            self._start(number)
        metadata: dict = {}
        clips: Counter[int] = Counter()  # that are counted already
        counted: Counter[int] = Counter()
        while self._busy:
            for pipe in cast(list[Any], wait(list(self._busy))):
                number, shard, process = self._busy[pipe]
                try:
                    kind, value = pipe.recv()
                except (EOFError, OSError):
                    del self._busy[pipe]
                    process.join(1)
                    self._died(number, shard, process.exitcode)
                    continue
                if kind == "clips" and shard is not None:
                    clips[shard] += value
                    if clips[shard] > counted[shard]:  # not those of a process that died again
                        done(clips[shard] - counted[shard])
                        counted[shard] = clips[shard]
                    continue
                if kind == "error":
                    raise value
                metadata = value
                at = self._todo.popleft() if self._todo else None
                if at is None:
                    del self._busy[pipe]
                else:
                    clips[at] = 0
                    self._busy[pipe] = number, at, process
                with contextlib.suppress(OSError):
                    pipe.send(at)
        return metadata

    def _start(self, number: int) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work,
            args=(self._job, self._devices[number], theirs),
            name="llasa-jax encoder",
        )
        with without_main(), _cores_of(self._devices[number], number, len(self._devices)):
            process.start()
        theirs.close()
        self._busy[ours] = number, None, process

    def _died(self, number: int, shard: int | None, code: int | None) -> None:
        key = -1 if shard is None else shard
        self._deaths[key] += 1
        if self._deaths[key] >= CHANCES:
            what = "as they started" if shard is None else f"of the shard {self._shards[key].name}"
            raise UserError(
                f"{CHANCES} processes that encode died {what}, the last with exit code {code};"
                " if it is -9, memory may be short: use fewer --processes."
            )
        if shard is not None:
            self._todo.appendleft(shard)
        self._start(number)

    def __enter__(self):
        return self

    def __exit__(self, kind, *error):
        for pipe, (_, _, process) in self._busy.items():
            process.kill()
            process.join()
            pipe.close()


@contextlib.contextmanager
def _cores_of(device: str, number: int, count: int) -> Iterator[None]:
    """A process that starts inside has the `number`-th of `count` shares of the cores where its
    device is the CPU. From its start: libraries of linear algebra make a thread for each core that
    they find as they are loaded, and the threads of two cores wait for each other on one, spinning.
    """
    if device != "cpu" or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[number::count] or cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _work(job: Job, device: str, pipe) -> None:
    """A process's life: opens the job, then makes the shards whose numbers it receives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends this one
    end_with_parent()
    if device == "cpu" and hasattr(os, "sched_setaffinity"):
        import torch

        torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        with dataclasses.replace(job, device=device).open() as maker:
            pipe.send(("ready", codec_metadata(maker.codec)))
            while (at := pipe.recv()) is not None:
                make_shard(maker, maker.shards[at], lambda clips: pipe.send(("clips", clips)))
                pipe.send(("made", codec_metadata(maker.codec)))
    except UserError as error:
        pipe.send(("error", error))
    except (EOFError, BrokenPipeError):
        return
