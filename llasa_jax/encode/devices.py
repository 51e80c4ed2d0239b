"""The codec's share of the machine, beside JAX: cores, and memory of the GPU that they share."""

import os

from llasa_jax.encode.settings import OnlineSettings


def shares_gpu(settings: OnlineSettings) -> bool:
    """Whether the codec runs on a GPU that JAX uses too: on all but those that
    JAX_CUDA_VISIBLE_DEVICES leaves out.
    """
    device, _, number = settings.device.partition(":")
    visible = os.environ.get("JAX_CUDA_VISIBLE_DEVICES", "all")
    return device == "cuda" and (visible == "all" or (number or "0") in visible.split(","))


def share_gpu(settings: OnlineSettings) -> None:
    """Leaves the codec its part of the GPU's memory, all of which JAX would otherwise plan with.
    Before JAX begins.
    """
    if shares_gpu(settings):
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.95 - settings.gpu_memory:.2f}")


def divide_machine(settings: OnlineSettings) -> None:
    """Keeps PyTorch to its share of the cores, and of a GPU that JAX uses too."""
    import jax
    import torch

    if shares_gpu(settings) and settings.gpu_memory:
        torch.cuda.set_per_process_memory_fraction(settings.gpu_memory, settings.device)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    shared = settings.device == "cpu" and jax.default_backend() == "cpu"
    torch.set_num_threads(settings.torch_threads or max(1, cores // 2 if shared else cores))
