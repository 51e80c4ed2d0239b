"""Traces of steps."""

import jax.numpy as jnp
import pytest

from llasa_jax.errors import UserError
from llasa_jax.train.profiler import Profiler


def test_a_trace_of_the_steps_asked_for(tmp_path):
    state = jnp.zeros(3)
    tracing = []
    with Profiler(tmp_path, "2:4") as profiler:
        for step in range(1, 6):
            profiler.before(step, state)
            tracing.append(profiler.tracing)
            state = state + 1
    assert tracing == [False, True, True, False, False]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_run_that_ends_early_ends_its_trace(tmp_path):
    with Profiler(tmp_path, "1:9") as profiler:
        profiler.before(1, jnp.zeros(1))
    assert not profiler.tracing
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_no_steps_no_trace(tmp_path):
    with Profiler(tmp_path, "") as profiler:
        profiler.before(1, jnp.zeros(1))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("steps", ["10", "a:b", "5:5", "0:3"])
def test_what_names_no_steps(steps, tmp_path):
    with pytest.raises(UserError, match=f"profile.steps={steps} names no steps"):
        Profiler(tmp_path, steps)
