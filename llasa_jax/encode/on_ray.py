"""Encoding on a Ray cluster: a task for each shard, tried again elsewhere when its node dies. Needs
the extra `[ray]`.
"""

import functools
import time
from typing import Any

from llasa_jax.data.seal import SEAL, check_unfinished
from llasa_jax.encode.offline import Job, Summary, codec_metadata, make_shard, seal
from llasa_jax.encode.processes import described
from llasa_jax.encode.shards import ShardMaker
from llasa_jax.errors import InUseError, UserError
from llasa_jax.runtime.storage import check_writable

RETRIES = 100  # of a shard, each when a node or process has died
PATIENCE = 120.0  # seconds until a process that died has let its journal go
OPENED: dict[str, ShardMaker] = {}  # of a Ray process, which makes one shard after another


def encode_on_ray(
    job: Job, address: str = "auto", cpus: float = 1.0, gpus: float = 0.0, tpus: float = 0.0
) -> Summary:
    """As `encode_here`, by tasks on the Ray cluster at `address` ("local" starts one here), each of
    which asks for so many CPUs, GPUs and TPU chips. Source, codec and `out` must be paths that all
    nodes see. Raises UserError where Ray is not installed or no cluster is there.
    """
    ray = _ray(address)
    check_writable(job.folder.parent)
    check_unfinished(job.folder)
    if (job.folder / SEAL).is_file():
        return seal(job)
    maker = job.open(described({}))
    task = ray.remote(
        num_cpus=cpus,
        num_gpus=gpus,
        resources={"TPU": tpus} if tpus else None,
        max_retries=RETRIES,
    )(_make)
    numbers = sorted(range(len(maker.shards)), key=lambda at: -len(maker.shards[at].members))
    waiting = {task.remote(job, number): number for number in numbers}
    metadata: dict = {}
    hours, clips, began = 0.0, 0, time.monotonic()
    while waiting:
        (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
        number = waiting.pop(ready)
        try:
            metadata, frames = ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        hours += frames * metadata["hop"] / metadata["sample_rate"] / 3600
        clips += len(maker.shards[number].members)
        all_clips = len(maker.source)
        to_do = hours / max(clips, 1) * (all_clips - clips)
        passed = (time.monotonic() - began) / 3600
        print(
            f"{len(numbers) - len(waiting)} of {len(numbers)} shards; {hours:.2f} hours of speech"
            f" done, about {to_do:.2f} left, which take"
            f" {passed / max(clips, 1) * (all_clips - clips):.2f} hours",
            flush=True,
        )
    return seal(job, described(metadata))


def _make(job: Job, number: int) -> tuple[dict, int]:
    """Makes one shard in a Ray process, and says by which codec, and how many codes are in it."""
    key = repr(job)
    if key not in OPENED:
        OPENED[key] = job.open()
    maker = OPENED[key]
    until = time.monotonic() + PATIENCE
    while True:
        try:
            made = make_shard(maker, maker.shards[number], lambda clips: None)
            return codec_metadata(maker.codec), made.frames
        except InUseError:
            if time.monotonic() > until:
                raise
            time.sleep(1)


@functools.cache
def _ray(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--on ray needs the package ray; run `pip install 'llasa-jax[ray]'`."
        ) from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False)
        except ConnectionError as error:
            raise UserError(
                f"no Ray cluster at {address!r}; start one (`ray start --head`), or give"
                " --ray-address local."
            ) from error
    return ray
