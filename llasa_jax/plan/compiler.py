"""The machines that a step is compiled for, TPU slices that you do not have included, and the
memory that XLA says it takes.
"""

import importlib.util
import os
import re
from contextlib import contextmanager
from math import prod
from typing import Any

import jax

from llasa_jax.errors import UserError
from llasa_jax.plan.memory import is_out_of_memory
from llasa_jax.runtime.hardware import Device, device_of_kind, known_topologies, parse_topology
from llasa_jax.train.step import TrainStep

HERE = "here"


def machine(topology: str, slices: int) -> tuple[list, Device | None]:
    """The devices to compile for, and what is known of one."""
    if topology == HERE:
        devices = jax.devices()
        return devices, device_of_kind(devices[0].device_kind)
    _, device, _ = parse_topology(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning for TPUs needs XLA's TPU compiler, which is not installed; `pip install"
            " 'llasa-jax[plan]'` brings it"
        )
    # A compiler without a TPU: it must not look for one, and other processes may use it too.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
        if prod(map(int, topology.partition(":")[2].split("x"))) < 4:
            options["chips_per_host_bounds"] = (1, 1, 1)
        with _quiet():
            return (
                topologies.get_topology_desc(
                    platform="tpu", topology_name=topology.lower(), **options
                ).devices,
                device,
            )
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the TPU compiler does not take the topology {topology} ({reason}); known are"
            f" {known_topologies()}"
        ) from None


@contextmanager
def _quiet():
    """Hides what libtpu's C++ says on stderr about a machine that is no TPU."""
    stderr, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nothing)


def compiled_peak(step: TrainStep, accumulation: int, rows: int, length: int) -> tuple[float, bool]:
    """Peak GiB per device, and whether it fits: the compiler refuses what does not, and says how
    much at least that would have taken.
    """
    try:
        analysis = step.compile(accumulation, rows, length).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        sizes = re.findall(r"([\d.]+)G\)? (?:of|exceeds)", str(error))
        return max(map(float, sizes), default=0.0), False
    assert analysis  # every backend here gives one
    # XLA's peak counts arguments that lie on the host too.
    return (analysis.peak_memory_in_bytes - analysis.host_argument_size_in_bytes) / 2**30, True
