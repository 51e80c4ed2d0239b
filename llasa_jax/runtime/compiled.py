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
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR", "")
    least = "jax_persistent_cache_min_compile_time_secs"
    if "://" not in (folder or given) and least.upper() not in os.environ:
        # By default JAX keeps what takes a second to compile. A run has nearly a hundred smaller
        # programs, which together take as long as its step's. In a bucket, each is a request.
        jax.config.update(least, 0.0)
    if not folder and given:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = folder or os.path.join(home, "llasa-jax", "compiled")
    jax.config.update("jax_compilation_cache_dir", folder)
    if "://" in folder:  # XLA's own caches are files
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
