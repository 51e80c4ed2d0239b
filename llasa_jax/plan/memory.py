"""What a device's memory holds during a training step, and what to do when it is too small."""

from contextlib import contextmanager
from math import prod

import jax

from llasa_jax.errors import UserError
from llasa_jax.model.config import ModelConfig
from llasa_jax.model.flops import layer_weights
from llasa_jax.model.sharding import row_devices
from llasa_jax.train.offload import HOST
from llasa_jax.train.settings import Settings

GIB = 2**30
REFERENCE = "weights of the reference"


def gib_of(tree, on_host: bool = False) -> float:
    """GiB per device of `ShapeDtypeStruct`s with shardings, of those on the host or of the
    others.
    """
    leaves = [
        leaf for leaf in jax.tree.leaves(tree) if (leaf.sharding.memory_kind == HOST) == on_host
    ]
    sizes = (prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    return sum(sizes) / GIB


def held_gib(config: ModelConfig, settings: Settings, step) -> tuple[dict[str, float], float]:
    """GiB per device of what stays through a step's backward pass, from the shapes and shardings of
    a `TrainStep`; and GiB on the host.
    """
    tensor = step.mesh.shape["tensor"]
    rows = settings.train.rows / row_devices(step.mesh)
    elements = rows * settings.data.max_length * config.num_hidden_layers
    heads = (2 * config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    products = 2 * config.hidden_size + (heads + 3 * config.intermediate_size) / tensor
    inputs, besides = config.hidden_size, {"dots": products, "none": 2.5 * products}
    activation = elements * (2 if settings.model.dtype == "bfloat16" else 4) / GIB
    offloads = settings.model.remat == "offload"
    held = {
        "parameters": gib_of((step.frozen, step.trainable)),
        "optimizer state": gib_of(step.opt_state),
        "gradients": gib_of(step.trainable) * (2 if settings.train.accumulation > 1 else 1),
        "activations kept for the backward pass": (
            0.0 if offloads else activation * (inputs + besides.get(settings.model.remat, 0))
        ),
    }
    if settings.align.loss == "grpo" and settings.align.grpo.kl:
        held[REFERENCE] = gib_of(step.trainable)
    return held, gib_of(step.opt_state, on_host=True) + (activation * inputs if offloads else 0.0)


def working_gib(config: ModelConfig, settings: Settings, mesh) -> float:
    """An estimate, for devices that nothing compiles for here: what one layer or one chunk of the
    loss needs besides, whichever is more.
    """
    tensor = mesh.shape["tensor"]
    rows = settings.train.rows / row_devices(mesh)
    item = 2 if settings.model.dtype == "bfloat16" else 4
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    weights = layer_weights(config) / config.num_hidden_layers / tensor
    widths = 10 * config.hidden_size + (6 * heads + 7 * config.intermediate_size) / tensor
    # Of a layer's weights in the arithmetic's type, of the next one's, and their gradients; frozen
    # ones have none.
    copies, table_copies = (2, 0) if settings.lora.rank else (4, 1)
    layer = rows * settings.data.max_length * widths * item + copies * weights * item
    table = (
        table_copies * config.padded_vocab_size * config.hidden_size / (tensor * mesh.shape["fsdp"])
    )
    loss = (
        rows * settings.model.loss_chunk * config.padded_vocab_size / tensor * (4 + 4 + item)
        + table * item
    )
    return max(layer, loss) / GIB


def advice(settings: Settings) -> str:
    """The two or three settings that would help most, as a sentence's end."""
    ideas = []
    if settings.model.remat in ("none", "dots"):
        ideas.append("model.remat=full")
    if settings.train.rows > 1:
        ideas.append(
            f"train.rows={settings.train.rows // 2} with"
            f" train.accumulation={settings.train.accumulation * 2} (the same batch)"
        )
    if settings.mesh.data != 1:
        ideas.append("mesh.data=1 with mesh.fsdp=-1 (weights and optimizer split over all devices)")
    if settings.optimizer.name != "adafactor" and not settings.optimizer.offload:
        ideas.append("optimizer.offload=true (its state in the host's memory)")
    if settings.optimizer.state_dtype == "float32":
        ideas.append("optimizer.state_dtype=bfloat16")
    if settings.model.loss_chunk > 64:
        ideas.append(f"model.loss_chunk={settings.model.loss_chunk // 2}")
    ideas.append("more devices")
    return ", or ".join(ideas[:3])


def is_out_of_memory(error: Exception) -> bool:
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


@contextmanager
def out_of_memory_explained(settings: Settings):
    """Turns XLA's out-of-memory errors, at compile or run time, into a UserError that names what
    would help.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"the training step does not fit the devices' memory; try {advice(settings)};"
            " `llasa-jax plan` finds out what fits"
        ) from error
