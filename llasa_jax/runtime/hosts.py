"""What the hosts of a run must agree on, for a step that one host does not take hangs all the
others; and how they end together when one of them fails.
"""

import hashlib
import json
import os
import re
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from llasa_jax.errors import UserError, printable
from llasa_jax.runtime.channel import LINGER, Channel
from llasa_jax.runtime.files import explain, sentence_of

if TYPE_CHECKING:
    from llasa_jax.runtime.signals import StopSignal

FAILED = 1000  # above every signal
# Seconds in which a failure may turn out to be the consequence of another host's: when one dies,
# the collectives of the others fail as well.
CONSEQUENCE = 2.0
# JAX's own heartbeat ends a process with a C++ stack, so it must be slower than the channel's.
JAX_HEARTBEAT = 200
LIBRARIES = "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"

_channel: Channel | None = None


@dataclass(frozen=True)
class Given:
    """What settings say of the processes: host 0 as HOST:PORT, how many, and which one this is."""

    coordinator: str = ""
    count: int = 0
    index: int = -1


def find_hosts(given: Given = Given()) -> dict[str, Any]:  # noqa: B008 immutable
    """The arguments of `jax.distributed.initialize` for this process: as `given`, from JAX's
    environment variables, from Slurm, Open MPI, a TPU VM or Kubernetes, or from those that
    PyTorch's launchers set. UserError where nothing says what they are.
    """
    from jax._src.clusters import ClusterEnv  # JAX has no public way to ask without connecting

    address: str | None = given.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = given.count or _whole_number("JAX_PROCESS_COUNT", "JAX_NUM_PROCESSES")
    number = _whole_number("JAX_PROCESS_INDEX", "JAX_PROCESS_ID")
    number = given.index if given.index >= 0 else number
    try:
        address, count, number, devices = ClusterEnv.auto_detect_unset_distributed_params(
            address, count, number, None, None, 60
        )
    except Exception as error:  # noqa: BLE001 each kind of cluster raises its own
        raise UserError(
            f"mesh.hosts is set, but what JAX reads of the cluster is damaged ({error}); check the"
            " launcher's environment variables"
        ) from error
    if address is None and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        address = "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
        local = _whole_number("LOCAL_RANK")
        devices = devices if devices or local is None else [local]
    count = _whole_number("WORLD_SIZE") if count is None else count
    number = _whole_number("RANK") if number is None else number
    if address is None or count is None or number is None or ":" not in address:
        raise UserError(
            "mesh.hosts is set, but nothing says which hosts take part; start the command by"
            " Slurm (srun), Open MPI, Kubernetes or on all workers of a TPU slice, give"
            " mesh.coordinator, mesh.process_count and mesh.process_index, or leave mesh.hosts out"
            " on a single host"
        )
    if not 0 <= number < count:
        raise UserError(
            f"this is process {number} of {count}, by mesh.process_index and mesh.process_count or"
            f" the launcher's environment variables; number the processes from 0 to {count - 1}"
        )
    # With a process a machine JAX would use one of its GPUs only, as many as there are processes.
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    alone = re.fullmatch(r"1(\(x\d+\))?", tasks) is not None
    alone = alone or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    if alone or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        devices = None
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": number,
        "local_device_ids": devices,
    }


def _whole_number(*names: str) -> int | None:
    """The first of these environment variables that is set. UserError where it is no number."""
    for name in names:
        if text := os.environ.get(name):
            if not text.isdecimal():
                raise UserError(f"${name} is {text!r}, which is not a whole number; correct it")
            return int(text)
    return None


def join(given: Given, timeout: float, facts: dict[str, Any], fix: str) -> None:
    """Brings all hosts together: waits at most `timeout` seconds until each is there, compares the
    `facts` (see `agree`), and only then starts `jax.distributed`.

    From here on, the failure or disappearance of any host ends all of them. UserError where hosts
    do not come or differ.
    """
    global _channel
    found = find_hosts(given)
    if found["num_processes"] > 1:
        _channel = _new_channel(found, timeout)
        _channel.join()
        agree(facts, fix)
    try:
        jax.distributed.initialize(
            **found,
            heartbeat_timeout_seconds=JAX_HEARTBEAT,
            cluster_detection_method="deactivate",  # all is found
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"jax.distributed cannot start ({' '.join(str(error).split())[:200]}); check that the"
            " hosts reach each other, and JAX_COORDINATOR_ADDRESS"
        ) from error


def _new_channel(found: dict[str, Any], timeout: float) -> Channel:
    name, _, port = found["coordinator_address"].rpartition(":")
    # Away from JAX's own port, and from those that Slurm's next jobs get: its range is 4,096 wide.
    port = int(port) - 4096 if int(port) > 4096 + 1024 else int(port) + 4096
    return Channel((name.strip("[]"), port), found["process_id"], found["num_processes"], timeout)


def software() -> dict[str, str]:
    """The versions of this program and of what decides its numbers, to `agree` on."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    versions = {name: version(name) for name in LIBRARIES}
    return {"the code of llasa_jax": digest.hexdigest()[:16]} | versions


def several() -> bool:
    """Whether there are other hosts that `join` has found."""
    return _channel is not None


def devices() -> str:
    """This host's devices, to `agree` on."""
    return f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"


def agree(facts: dict[str, Any], fix: str) -> None:
    """Returns once all hosts have called it with equal `facts`, which JSON can hold. UserError on
    all hosts names what differs, every host's value, and the `fix`. A single host agrees.
    """
    if _channel:
        _channel.agree(facts, fix)


def check_alone() -> None:
    """UserError where `mesh.hosts` is not set on this host, but its environment says that it is one
    of several: those that have set it hear of it too, and do not wait for this one.
    """
    try:
        found = find_hosts()
    except UserError:
        return  # no cluster
    if found["num_processes"] > 1:
        text = (
            f"mesh.hosts is not set on host {found['process_id']}, which was started as one of"
            f" {found['num_processes']} processes; set it on all hosts, or start a single process"
        )
        report_failure(text, 2)
        raise UserError(text)


def check_shared(folder: Path, name: str) -> None:
    """UserError on all hosts unless `folder`, that of the setting `name`, is one and the same on
    all: each host writes a file there, and looks for those of the others. Makes the folder.
    """
    if not _channel:
        return
    # One number for all hosts, and a new one each time: no file of before has this name.
    token = largest(secrets.randbelow(1 << 31))
    files = [folder / f".host-{i}.{token}.partial" for i in range(jax.process_count())]
    own = files[jax.process_index()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.touch()
        largest(0)  # all have written
        seen = [str(number) for number, file in enumerate(files) if file.exists()]
        largest(0)  # all have looked
        own.unlink()
    except OSError as error:
        raise UserError(explain(error, folder)) from error
    agree(
        {f"what is seen in {name}={folder}": f"the files of host {' and '.join(seen)}"},
        f"{name} must be one folder that all hosts share, such as one on a network file system",
    )


def report_failure(text: str, status: int, given: Given = Given()) -> None:  # noqa: B008
    """Tells the other hosts, who may be waiting for this one, why it cannot even join them."""
    try:
        found = find_hosts(given)
        if found["num_processes"] > 1:
            channel = _new_channel(found, LINGER)
            channel.connect(time.monotonic() + LINGER)
            channel.fail(text, status)
    except UserError:
        pass  # no cluster, or nobody there: there is nobody to tell


@contextmanager
def together() -> Iterator[None]:
    """Around all that the hosts do: an error on this host ends all of them, with its sentence."""
    try:
        with failing_together():
            yield
    except SystemExit:  # all hosts have agreed to stop
        _finish()
        raise
    _finish()


@contextmanager
def failing_together() -> Iterator[None]:
    """Where there are several hosts, an error inside ends all of them, and this process at once.

    It belongs innermost as well, inside contexts that wait for the other hosts when they are left
    (such as checkpoints): those would wait for hosts that wait for this one.
    """
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        if _channel:
            _fail(_channel, error)
        raise


def _finish() -> None:
    if _channel:
        _channel.finish()


def _fail(channel: Channel, error: BaseException) -> None:
    if not isinstance(error, KeyboardInterrupt):
        time.sleep(CONSEQUENCE)  # the channel ends the process if another host has failed
    known = isinstance(error, UserError | OSError)
    if isinstance(error, KeyboardInterrupt):
        text, status = "interrupted", 128 + signal.SIGINT
    elif known:
        text, status = sentence_of(error), 2
    else:
        text, status = f"{type(error).__name__}: {error}", 1
        traceback.print_exception(error)
    print(f"llasa-jax: error: {printable(text)}", file=sys.stderr, flush=True)
    channel.fail(text[:2000], status)
    os._exit(status)


def end_by_signal(number: int) -> None:
    """Tells the other hosts that a signal ends this one now. From any thread."""
    if _channel:
        name = signal.Signals(number).name
        _channel.fail(f"stopped by {name}, with nothing new to save", 128 + number, linger=0)


def largest(value: int) -> int:
    """The largest of all hosts' values. Every host must ask, and waits for the others."""
    if jax.process_count() == 1:
        return int(value)
    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def everyones(value: Any) -> list[Any]:
    """Every host's value, which JSON can hold, in the order of the hosts. Every host must ask."""
    if jax.process_count() == 1:
        return [json.loads(json.dumps(value))]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    # A power of two, for each size is compiled once.
    padded = np.zeros(1 << int(np.max(lengths)).bit_length(), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:n])) for row, n in zip(texts, lengths.tolist(), strict=True)]


def stopped(stop: "StopSignal", failed: bool = False) -> int:
    """The signal that any host has received, 0 if none: all hosts stop after the same step. All
    must ask.

    UserError where another host has `failed`, so that nobody waits for it.
    """
    agree_to_go_on(stop, failed=failed, due=False)
    return stop.received


def agree_to_go_on(stop: "StopSignal", *, failed: bool, due: bool) -> bool:
    """As `stopped`, which it leaves in `stop.received`; and whether something is `due` on any host,
    where none stops. One exchange for both.
    """
    verdict = largest(FAILED if failed else 2 * stop.received + due)
    if verdict == FAILED and not failed:
        raise UserError(
            "another host's data failed, and training stops on all; its own log says why"
        )
    stop.received = stop.received if failed else verdict // 2
    return verdict == 1


def on_this_host(tree: Any) -> Any:
    """The tree's arrays as NumPy's, those that lie on several hosts too. Every host must ask."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(
        lambda x: (
            multihost_utils.process_allgather(x, tiled=True)
            if isinstance(x, jax.Array) and not x.is_fully_addressable
            else jax.device_get(x)
        ),
        tree,
    )


def preempted(step: int) -> bool:
    """Whether JAX's preemption service has told all hosts to stop after this step. All must ask."""
    if jax.process_count() == 1:
        return False
    try:
        return multihost_utils.reached_preemption_sync_point(step)
    except RuntimeError:  # jax_enable_preemption_service is off
        return False


def evenly(batches: Iterable[dict], empty: dict) -> Iterator[dict]:
    """This host's batches, and after them as many `empty` ones as it takes for every host to have
    the same number.
    """
    batches = iter(batches)
    while True:
        batch = next(batches, None)
        if not largest(batch is not None):
            return
        yield empty if batch is None else batch
