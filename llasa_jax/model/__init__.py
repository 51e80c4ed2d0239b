"""The language model: a LLaMA in Flax NNX, its loss, adapters and sharding."""


def __getattr__(name: str):
    # Only where they are asked for: commands read this room's settings without importing JAX.
    if name in ("Cache", "Llama"):
        from llasa_jax.model import llama

        return getattr(llama, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
