"""XCodec2 in JAX: a second implementation of the codec, for accelerators."""

from collections.abc import Sequence

import jax

from llasa_jax.codec.xcodec2_jax.codec import JaxCodec, Precision
from llasa_jax.codec.xcodec2_jax.weights import open_weights

__all__ = ["JaxCodec", "Precision", "load_jax"]


def load_jax(
    name: str,
    config_dict: dict,
    devices: Sequence[jax.Device] | None = None,
    precision: Precision = "float32",
) -> JaxCodec:
    """Opens a checkpoint of a folder or hub id, in either format, given its config.json.

    Raises `UserError` as `open_weights` does.
    """
    return JaxCodec(name, open_weights(name, config_dict), devices, precision)
