"""From text to speech: a loaded model, the decoding loop, and what makes waves of its codes."""


def __getattr__(name: str):
    # Only where it is asked for: commands read this room's settings without loading a model.
    if name == "load":
        from llasa_jax.generate.speaker import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
