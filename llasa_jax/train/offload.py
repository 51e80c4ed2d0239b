"""Optimizer state in the host's memory: it comes to the device slice by slice while the update
runs, and goes back at once.

Moving it as a whole would need more memory than keeping it: old and new state beside each other.
Each device streams its own shards, so this is for optimizers that treat every weight by itself.
"""

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llasa_jax.errors import UserError
from llasa_jax.train.settings import Settings

HOST = "pinned_host"
MAX_SLICES = 32


def check_host_memory(settings: Settings, mesh: Mesh) -> None:
    """UserError, naming the setting, where arrays are to be kept on the host and the mesh's devices
    cannot.
    """
    asked = {
        "model.remat=offload": settings.model.remat == "offload",
        "optimizer.offload=true": settings.optimizer.offload,
    }
    names, device = [name for name, is_asked in asked.items() if is_asked], mesh.devices.flat[0]
    if names and HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise UserError(
            f"{' and '.join(names)} needs devices that can use the host's memory, which"
            f" {device.device_kind} does not offer here; leave it out, and try model.remat=full"
            " with optimizer.state_dtype=bfloat16"
        )


def place_state(state, params, *, offload: bool):
    """An optimizer's abstract state with shardings: what has a parameter's shape lies as it does,
    with `offload` on the host; the rest (counters, factored moments) is on every device.
    """
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(leaf, param):
        sharding = param.sharding if leaf.shape == param.shape else replicated
        return jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=sharding.with_memory_kind(HOST) if offload else sharding,
        )

    return _map_parts(
        lambda moments: jax.tree.map(place, moments, params),
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        state,
        params,
    )


def streamed(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same updates with a state placed by `place_state(..., offload=True)`. `update` needs the
    parameters' `shardings`, a tree.

    Each update takes the place of its gradient, and has its dtype.
    """

    def update(grads, state, params, *, shardings, **_):
        specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
        state_specs = _map_parts(lambda _: specs, lambda _: PartitionSpec(), state, params)
        return jax.shard_map(
            lambda *local: _stream(optimizer, *local),
            mesh=jax.tree.leaves(shardings)[0].mesh,
            in_specs=(specs, state_specs, specs),
            out_specs=(specs, state_specs),
            check_vma=False,
        )(grads, state, params)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _stream(optimizer, grads, state, params):
    """One device's part: parameter by parameter, a loop over slices of its first dimension, so that
    nothing is fetched before its turn.
    """
    parts, structure = _parts(state, params)
    moments = [jax.tree.leaves(part) for part in parts if _is_like(part, params)]
    grads, grads_structure = jax.tree.flatten(grads)
    counters = [part for part in parts if not _is_like(part, params)]
    for at, param in enumerate(jax.tree.leaves(params)):
        # A divisor, so that all slices have one shape and the loop is compiled once.
        slices = (
            next(n for n in range(MAX_SLICES, 0, -1) if len(param) % n == 0)
            if param.ndim > 1
            else 1
        )
        size = len(param) // slices

        # Bound as defaults: the loop around it changes both names.
        def one_slice(i, carry, param=param, size=size):
            def cut(x):
                return jax.lax.dynamic_slice_in_dim(x, i * size, size)

            def paste(x, part):
                return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), i * size, 0)

            grad, stored, _ = carry
            fetched = iter(
                [jax.device_put(cut(moment), jax.memory.Space.Device) for moment in stored]
            )
            # Counters count once a step, not once a slice.
            before = structure.unflatten(
                [next(fetched) if _is_like(part, params) else part for part in parts]
            )
            update, after = optimizer.update(cut(grad), before, cut(param))
            after = list(zip(parts, structure.flatten_up_to(after), strict=True))
            # Sent back in the same turn, so the devices hold the moments of one slice at a time.
            new = [
                jax.device_put(x, jax.memory.Space.Host)
                for part, x in after
                if _is_like(part, params)
            ]
            counters = [x for part, x in after if not _is_like(part, params)]
            return (
                paste(grad, update),
                [paste(x, y) for x, y in zip(stored, new, strict=True)],
                counters,
            )

        start = (grads[at], [moment[at] for moment in moments], counters)
        # A loop, not a Python `for`: XLA would start the copies of all slices at once, and need
        # room for the whole state.
        grads[at], new, counters = jax.lax.fori_loop(0, slices, one_slice, start)
        for moment, stored in zip(moments, new, strict=True):
            moment[at] = stored
    kept, counted = (
        iter([jax.tree.unflatten(grads_structure, moment) for moment in moments]),
        iter(counters),
    )
    state = structure.unflatten(
        [next(kept) if _is_like(part, params) else next(counted) for part in parts]
    )
    return jax.tree.unflatten(grads_structure, grads), state


def _is_like(tree, params) -> bool:
    # JAX's own types do not say what a structure is.
    return jax.tree.structure(tree) == jax.tree.structure(params)  # type: ignore[operator]


def _parts(state, params):
    """What an optimizer's state holds: trees like the parameters', and single arrays."""
    return jax.tree.flatten(state, is_leaf=lambda x: _is_like(x, params))


def _map_parts(of_moments, of_counter, state, params):
    parts, structure = _parts(state, params)
    return structure.unflatten(
        [(of_moments if _is_like(part, params) else of_counter)(part) for part in parts]
    )
