"""Attention over packed rows on a GPU: the Pallas kernel that `model.attention` picks there,
against plain XLA. Time forward and backward, and the relative difference of the result and its
gradients: `python benchmarks/attention.py`, on a machine with a GPU.
"""

import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from llasa_jax.model.attention import triton_attention, xla_attention

# Rows, tokens, heads, key-value heads, width of a head.
SHAPES = (16, 1024, 3, 3, 64), (16, 1024, 4, 4, 32)
TURNS = 10


def main() -> None:
    print(
        f"{time.strftime('%Y-%m-%d')}; {jax.devices()[0].device_kind}; jax {jax.__version__}, flax"
        f" {version('flax')}; bfloat16, five segments a row"
    )
    for rows, tokens, heads, kv_heads, width in SHAPES:
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, weights = (
            jax.random.normal(key, (rows, tokens, count, width), jnp.bfloat16)
            for key, count in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
        )
        drawn = np.random.default_rng(0).integers(1, 6, (rows, tokens))
        segment_ids = jnp.asarray(np.sort(drawn, axis=1), jnp.int32)
        milliseconds, results = {}, {}
        for name, attention in (("xla", xla_attention), ("triton", triton_attention)):

            def loss(q, k, v, attention=attention, segment_ids=segment_ids, weights=weights):
                out = attention(q, k, v, segment_ids)
                return (out.astype(jnp.float32) * weights.astype(jnp.float32)).sum(), out

            step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
            (_, out), gradients = jax.block_until_ready(step(q, k, v))
            began = time.perf_counter()
            for _ in range(TURNS):
                last = step(q, k, v)
            jax.block_until_ready(last)
            milliseconds[name] = 1000 * (time.perf_counter() - began) / TURNS
            results[name] = out, *gradients
        differences = [
            float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(a.astype(float)))
            for a, b in zip(results["xla"], results["triton"], strict=True)
        ]
        print(
            f"{rows} rows of {tokens} tokens, {heads} heads ({kv_heads}) of {width}: xla"
            f" {milliseconds['xla']:.2f} ms, triton {milliseconds['triton']:.2f} ms, ratio"
            f" {milliseconds['xla'] / milliseconds['triton']:.1f}; differences of the result and"
            f" of the gradients of q, k, v: {', '.join(f'{each:.1e}' for each in differences)}"
        )


if __name__ == "__main__":
    main()
