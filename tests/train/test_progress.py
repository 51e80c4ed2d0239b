"""The step's numbers: the learning rate is computed on the host, nothing moves unasked between host
and devices, and an output that nobody reads ends training with a checkpoint.
"""

import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from places import FIXTURES, environment
from tiny_run import make_clips, make_model, settings_for

from llasa_jax.convert.model_folder import saved_steps
from llasa_jax.train import loop
from llasa_jax.train.optimizer import learning_rate_schedule
from llasa_jax.train.progress import on_host
from llasa_jax.train.settings import OptimizerSettings
from llasa_jax.train.step import TrainStep


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.mark.parametrize("schedule", ["cosine", "constant", "deepspeed"])
def test_the_rate_is_the_schedules_and_computed_on_the_cpu(schedule, monkeypatch):
    wanted = learning_rate_schedule(
        OptimizerSettings(learning_rate=3e-3, schedule=schedule, warmup_ratio=0.2), 50
    )
    rate = on_host(wanted)
    with jax.transfer_guard("disallow"):
        rates = [rate(step) for step in range(60)]
    np.testing.assert_allclose(rates, [float(wanted(step)) for step in range(60)], rtol=1e-5)
    # With another default device it still runs on the CPU's first.
    taken = []
    real = jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, to: taken.append(to) or real(x, to))
    with jax.default_device(jax.devices()[3]):
        on_host(wanted)(7)
    assert taken == [jax.local_devices(backend="cpu")[0]]


def test_a_hidden_transfer_in_a_step_is_refused(model, tmp_path, monkeypatch):
    """Such as the learning rate's, when it was computed on the devices."""
    monkeypatch.setattr(loop, "on_host", lambda schedule: lambda step: float(jnp.log(step + 1.0)))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.train(settings_for(model, tmp_path / "run"), [make_clips()])


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGHUP,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.soak),
        pytest.param(signal.SIGUSR2, marks=pytest.mark.soak),
    ],
)
def test_other_signals_save_too(model, tmp_path, monkeypatch, number):
    real, count = TrainStep.place, iter(range(100))

    def place(*arguments):
        if next(count) == 3:
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(TrainStep, "place", place)
    before = signal.signal(number, signal.SIG_DFL)  # nohup would have training ignore SIGHUP
    try:
        with pytest.raises(SystemExit) as stop:
            loop.train(settings_for(model, tmp_path / "run"), [make_clips()])
    finally:
        signal.signal(number, before)
    assert stop.value.code == 128 + number
    assert saved_steps(tmp_path / "run") == [2, 3]


@pytest.mark.parametrize("output", ["closed pipe", "full disk"])
def test_an_output_that_nobody_takes_saves_and_stops(model, tmp_path, output):
    if output == "full disk" and not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full" if output == "full disk" else os.devnull, "w") as sink:
        child = subprocess.Popen(
            [sys.executable, str(FIXTURES / "tiny_run.py"), str(model), str(tmp_path / "run")],
            env=environment(1),
            stdout=sink if output == "full disk" else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if output == "closed pipe":
            for line in child.stdout:
                if line.startswith("step 1/"):
                    break
            child.stdout.close()
        with child.stderr as stderr:
            complained = stderr.read()
        child.wait()
    assert "Traceback" not in complained
    assert "the standard output cannot be written" in complained
    if output == "closed pipe":
        assert child.returncode == 128 + signal.SIGTERM, complained
        assert saved_steps(tmp_path / "run")
