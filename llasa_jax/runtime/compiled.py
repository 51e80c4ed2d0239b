"""Compiled programs, kept so that a process that starts again does not compile again."""

import os

import jax


def keep_programs(folder: str) -> None:
    """Keeps what JAX compiles in `folder`, local or in a bucket, for every process that compiles
    the same; "off" keeps nothing.

    Empty, it is that of JAX's environment variable, or else a folder of the user's. What
    cannot be read or written is compiled, with a warning by JAX.
    """
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if not folder and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = folder or os.path.join(home, "llasa-jax", "compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
    if "://" in folder:  # XLA's own caches are files
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
