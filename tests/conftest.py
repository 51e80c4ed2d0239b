"""Eight virtual CPU devices for every test, set before anything imports JAX."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
# Many tests train the same step: compile it once.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax-cache-")
atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# What tests start in other processes finds the same package and helpers.
os.environ["PYTHONPATH"] = f"{Path(__file__).parent / 'fixtures'}:{Path(__file__).parents[1]}"

import pytest  # noqa: E402
import torch  # noqa: E402

from llasa_jax.demo.tiny_llama import make_tiny_tokenizer  # noqa: E402
from llasa_jax.speech.prompts import Prompter  # noqa: E402

# On busy cores, OpenMP's waiting threads make a minute of a second.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    """Llama-3-shaped, with the speech tokens. Not to be changed: all tests share it."""
    return make_tiny_tokenizer()


@pytest.fixture(scope="session")
def prompter(tokenizer):
    return Prompter(tokenizer)
