"""XCodec2 in JAX: a second implementation of the codec, for accelerators."""

import jax

from llasa_jax.codec.xcodec2_jax.codec import JaxCodec, Precision
from llasa_jax.codec.xcodec2_jax.weights import open_weights
from llasa_jax.errors import UserError

__all__ = ["JaxCodec", "Precision", "devices_named", "load_jax"]


def load_jax(
    name: str,
    config_dict: dict,
    devices: list[jax.Device] | None = None,
    precision: Precision = "float32",
) -> JaxCodec:
    """Opens a checkpoint of a folder or hub id, in either format, given its config.json.

    Raises `UserError` as `open_weights` does.
    """
    return JaxCodec(name, open_weights(name, config_dict), devices, precision)


def devices_named(name: str) -> list[jax.Device]:
    """This process's devices that "jax" (all of them) or a name such as "jax:2,3" means.

    Raises `UserError` for one that is not there.
    """
    local = jax.local_devices()
    numbers = [int(number) for number in name.partition(":")[2].split(",") if number]
    if max(numbers, default=0) >= len(local):
        raise UserError(
            f"device {name!r} is not available: JAX has devices 0 to {len(local) - 1} here; name"
            " some of them, or all by 'jax'."
        )
    return [local[number] for number in dict.fromkeys(numbers)] or local
