"""What GRPO's rollouts take of a device's memory, between the steps."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from llasa_jax.align.prefer import SPEECH
from llasa_jax.align.rollouts import sampling_of
from llasa_jax.generate import steps
from llasa_jax.generate.decode import HEAD_MULTIPLE
from llasa_jax.model.lora import join
from llasa_jax.model.sharding import RULES
from llasa_jax.plan.memory import GIB, gib_of
from llasa_jax.speech.vocab import CODES_PER_SECOND, NUM_CODES
from llasa_jax.train.settings import Settings
from llasa_jax.train.step import TrainStep


def rollouts_gib(step: TrainStep, settings: Settings, *, compiled: bool) -> dict[str, float]:
    """GiB per device that speaking needs beside the weights, with a cache of keys and values of the
    longest rows; with `compiled` what the program that draws codes works in too, from XLA's
    compiler for the step's mesh. None of it is there during a step.
    """
    program, given = _program(step, settings)
    cache, head = gib_of([given["state"][name] for name in "kv"]), gib_of(given["tables"])
    found = {"cache": cache, "head": head}
    if compiled:
        traced = steps.advance.trace(**program, **given)
        platform = step.mesh.devices.flat[0].platform
        lowered = traced.lower(lowering_platforms=("cuda" if platform == "gpu" else platform,))
        analysis = lowered.compile().memory_analysis()
        assert analysis  # every backend here gives one
        of_arguments = gib_of(given["params"]) + cache + head
        peak = analysis.peak_memory_in_bytes / GIB
        found["working memory"] = max(0.0, peak - of_arguments)
    return found


def _program(step: TrainStep, settings: Settings) -> tuple[dict, dict]:
    """The arguments of `steps.advance`, as `Rows` gives them: those it is compiled for, and the
    others as `ShapeDtypeStruct`s.
    """
    config, grpo = step.config, settings.align.grpo
    program = {
        "graphdef": step.graphdef,
        "settings": dataclasses.replace(sampling_of(grpo), seed=0),
        "loop_codes": round(SPEECH.loop_seconds * CODES_PER_SECOND),
    }
    params, last = join(step.frozen, step.trainable), config.vocab_size
    count = min(last, -(-(NUM_CODES + 8) // HEAD_MULTIPLE) * HEAD_MULTIPLE)

    def of(params):
        first, marks = last - count, jnp.zeros(count, bool)
        tables = steps.head_rows(step.graphdef, params, first=first, last=last)
        fixed = {"tables": tables, "first": jnp.int32(first), "allowed": marks, "stops": marks}
        state = steps.empty_state(
            **program, **fixed, params=params, rows=grpo.rows, slots=settings.data.max_length
        )
        return fixed | {"state": state, "steps": jnp.int32(0), "leave": jnp.int32(0)}

    def placed(path, leaf):
        # Heads lie where the weights that make them lie; everything else is on all devices.
        is_cache = path[0].key == "state" and path[1].key in ("k", "v")
        spec = PartitionSpec(None, None, None, RULES["K"]) if is_cache else PartitionSpec()
        sharding = NamedSharding(step.mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    given = jax.tree.map_with_path(placed, jax.eval_shape(of, params))
    return program, given | {"params": params}
