"""How a process learns which of how many it is, and where host 0 is."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from llasa_jax.cli import train
from llasa_jax.errors import UserError
from llasa_jax.runtime import hosts
from llasa_jax.runtime.compiled import keep_programs
from llasa_jax.train.parsing import parse_settings

LAUNCHERS = ("SLURM", "JAX_", "OMPI", "MASTER", "WORLD", "RANK", "LOCAL_", "KUBERNETES", "TPU")
NEEDED = ("--out=o", "--model.path=m", "--data.path=d")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        if name != "JAX_PLATFORMS":
            monkeypatch.delenv(name)


def found(address, count, index, devices=None):
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "local_device_ids": devices,
    }


TORCH = {"MASTER_ADDR": "h0", "MASTER_PORT": "29500", "WORLD_SIZE": "4", "RANK": "3"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "h0",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("variables", "given", "expected"),
    [
        ({}, hosts.Given("h0:1234", 4, 0), found("h0:1234", 4, 0)),
        ({}, hosts.Given("[::1]:1234", 4, 3), found("[::1]:1234", 4, 3)),
        (
            {"JAX_COORDINATOR_ADDRESS": "h0:1", "JAX_PROCESS_COUNT": "2", "JAX_PROCESS_INDEX": "1"},
            hosts.Given(),
            found("h0:1", 2, 1),
        ),
        ({"JAX_PROCESS_ID": "1"}, hosts.Given("h0:1", 2), found("h0:1", 2, 1)),
        (TORCH, hosts.Given(), found("h0:29500", 4, 3)),
        (TORCH | {"LOCAL_RANK": "2"}, hosts.Given(), found("h0:29500", 4, 3, [2])),
        (TORCH, hosts.Given("h9:1", 2, 0), found("h9:1", 2, 0)),  # settings win
        (SLURM, hosts.Given("h9:1"), found("h9:1", 2, 1, [0])),  # and Slurm says the rest
        # A process a machine has all of its GPUs.
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, hosts.Given("h9:1"), found("h9:1", 2, 1)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8"}, hosts.Given("h9:1"), found("h9:1", 2, 1, [0])),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "2,3"}, hosts.Given("h9:1"), found("h9:1", 2, 1)),
    ],
)
def test_where_it_is_said(monkeypatch, variables, given, expected):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hosts.find_hosts(given) == expected


@pytest.mark.parametrize(
    ("variables", "given", "complaint"),
    [
        ({}, hosts.Given(), "nothing says which hosts take part"),
        (
            {},
            hosts.Given("h0:1"),
            "mesh.process_count and mesh.process_index",
        ),
        ({"JAX_PROCESS_ID": "one"}, hosts.Given("h0:1", 2), r"\$JAX_PROCESS_ID is 'one'"),
        (TORCH | {"RANK": "4"}, hosts.Given(), "this is process 4 of 4, .*from 0 to 3"),
    ],
)
def test_what_is_missing_or_wrong(monkeypatch, variables, given, complaint):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=complaint):
        hosts.find_hosts(given)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--mesh.coordinator=h0"], "mesh.coordinator is 'h0'; it must be HOST:PORT"),
        (
            ["--mesh.process_count=2", "--mesh.process_index=2"],
            "mesh.process_index=2 is not below mesh.process_count=2",
        ),
    ],
)
def test_settings_that_cannot_be(given, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_settings([*NEEDED, *given])


def test_a_coordinator_means_several_hosts():
    assert parse_settings([*NEEDED, "--mesh.coordinator=h0:1"]).mesh.joins
    assert not parse_settings(NEEDED).mesh.joins


def test_settings_that_are_refused_are_told_to_the_others(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(hosts, "report_failure", lambda *what: told.append(what))
    (tmp_path / "a.yaml").write_text("mesh: {coordinator: 'h0:1', process_count: 3}")
    train.tell_other_hosts(
        [f"--config={tmp_path / 'a.yaml'}", "--mesh.process_index=2", "--x=1"], "no x"
    )
    train.tell_other_hosts(["--mesh.hosts", "--x=1"], "no x")
    train.tell_other_hosts(["--mesh.hosts=false", "--x=1"], "no x")
    assert told == [("no x", 2, hosts.Given("h0:1", 3, 2)), ("no x", 2, hosts.Given())]


def test_the_preemption_service_is_asked(monkeypatch):
    """Only where there are several hosts, and not where it is off."""
    asked = []

    def reached(step):
        asked.append(step)
        if step == 3:
            raise RuntimeError("off")
        return step == 2

    monkeypatch.setattr(hosts.multihost_utils, "reached_preemption_sync_point", reached)
    assert not hosts.preempted(2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert [hosts.preempted(step) for step in (1, 2, 3)] == [False, True, False]
    assert asked == [1, 2, 3]


def test_hosts_agree_on_a_signal_before_what_is_due(monkeypatch):
    """Of the others' verdicts the largest counts."""
    others = {"value": 0}
    monkeypatch.setattr(hosts, "largest", lambda value: max(value, others["value"]))

    def verdict(others_value, received=0, **mine):
        others["value"] = others_value
        stop = SimpleNamespace(received=received)
        due = hosts.agree_to_go_on(stop, **{"failed": False, "due": False} | mine)
        return due, stop.received

    assert verdict(0) == (False, 0)
    assert verdict(1) == (True, 0)
    assert verdict(0, due=True) == (True, 0)
    assert verdict(30, due=True) == (False, 15)
    assert verdict(1, received=15) == (False, 15)
    with pytest.raises(UserError, match="another host's data failed"):
        verdict(hosts.FAILED)
    assert verdict(0, failed=True) == (False, 0)


@pytest.mark.parametrize("folder", ["", "off", "gs://bucket/compiled"])
def test_where_compiled_programs_are_kept(monkeypatch, tmp_path, folder):
    changed = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: changed.update({name: value}))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_programs(folder)
    assert (
        changed
        == {
            "": {
                "jax_compilation_cache_dir": f"{tmp_path}/llasa-jax/compiled",
                "jax_persistent_cache_min_compile_time_secs": 0.0,
            },
            "off": {"jax_enable_compilation_cache": False},
            "gs://bucket/compiled": {
                "jax_compilation_cache_dir": "gs://bucket/compiled",
                "jax_persistent_cache_enable_xla_caches": "none",
            },
        }[folder]
    )


def test_what_jax_was_told_of_compiled_programs_stays(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://elsewhere")
    monkeypatch.setattr(jax.config, "update", lambda *_: pytest.fail("changed"))
    keep_programs("")


def test_small_programs_are_kept_too(tmp_path):
    code = (
        "import jax, sys; from llasa_jax.runtime.compiled import keep_programs;"
        " keep_programs(sys.argv[1]); jax.jit(lambda x: x + 1)(1.0)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    assert list(tmp_path.glob("*-cache"))
