"""How much work and traffic one training step is, from shapes alone, and how long devices take for
it at least.
"""

from dataclasses import dataclass
from math import prod

import jax

from llasa_jax.model.axes import INPUTS, LAYER_AXES, adapter_axes, parameter_axes, sizes
from llasa_jax.model.config import AdapterConfig, ModelConfig, Quantization
from llasa_jax.model.lora import count
from llasa_jax.runtime.hardware import Device

# Bytes that one token moves to and from memory in one layer, in units of 2-byte elements: reads and
# writes of activations around the products and norms, forward, recomputed and backward.
_WIDTHS_D, _WIDTHS_F = 40, 15


@dataclass(frozen=True)
class StepShape:
    """A step on a mesh: `rows` are all rows of a micro-batch, `length` their tokens."""

    rows: int
    length: int
    accumulation: int
    data: int
    fsdp: int
    tensor: int
    remat: str

    @property
    def devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    @property
    def tokens(self) -> int:
        return self.rows * self.length * self.accumulation


def layer_weights(config: ModelConfig) -> int:
    """Weights of all layers' matrices."""
    size, matrices = sizes(config), [axes for name, axes in LAYER_AXES.items() if name in INPUTS]
    return size["L"] * sum(prod(size[letter] for letter in axes) for axes in matrices)


def all_weights(config: ModelConfig) -> int:
    """Weights of the whole model, its tables padded."""
    size = sizes(config)
    leaves = jax.tree.leaves(parameter_axes(config))
    return sum(prod(size[letter] for letter in axes) for axes in leaves)


def model_flops_per_token(
    config: ModelConfig, context: float, adapters: AdapterConfig | None = None
) -> float:
    """FLOPs of training on one token that attends to `context` tokens (on average, itself
    included): forward, and twice that backward.

    Counts the matrix products of the model alone, two FLOPs a multiplication; what is recomputed to
    save memory counts as nothing. With `adapters` a frozen weight's product is made once forward
    and once backward, for it has no gradient of its own.
    """
    attention = (
        2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * context
    )
    head = config.vocab_size * config.hidden_size
    if adapters is None:
        return 6 * (layer_weights(config) + attention + head)
    whole_head = 2 * head * _trains_head(config, adapters)
    return (
        4 * (layer_weights(config) + head)
        + whole_head
        + 6 * (attention + _adapter_products(config, adapters))
    )


def _trains_head(config: ModelConfig, adapters: AdapterConfig | None) -> bool:
    return (
        adapters is None or ("embed" if config.tie_word_embeddings else "head") in adapters.modules
    )


def _adapter_products(config: ModelConfig, adapters: AdapterConfig) -> int:
    """Weights of the adapters' products; the first of an embedding's is a look-up."""
    size = sizes(config, adapters) | {"V": config.vocab_size}
    factors = [
        axes
        for name, pair in adapter_axes(adapters, ()).get("lora", {}).items()
        for axes in ([pair["b"]] if name == "embed" else pair.values())
    ]
    return sum(prod(size[letter] for letter in axes) for axes in factors)


def model_flops(
    config: ModelConfig, shape: StepShape, adapters: AdapterConfig | None = None
) -> float:
    """FLOPs of one step as for a row that is one clip: packed clips attend to less, which makes a
    few per cent.
    """
    return shape.tokens * model_flops_per_token(config, (shape.length + 1) / 2, adapters)


def step_seconds(
    config: ModelConfig,
    shape: StepShape,
    device: Device,
    adapters: AdapterConfig | None = None,
    quantization: Quantization = "none",
) -> dict[str, float]:
    """The least seconds that a step takes for arithmetic, for memory traffic and for traffic
    between devices, each at its peak rate.

    With `adapters` there are no gradients of frozen weights, to compute or to send; their own
    products are left out.
    """
    micro_tokens = (
        shape.rows * shape.length / (shape.data * shape.fsdp)
    )  # of one device and one micro-batch
    D, L, V = config.hidden_size, config.num_hidden_layers, config.padded_vocab_size
    weights = layer_weights(config) / shape.tensor
    # Forward, recomputed, and two backward; "dots" recomputes attention, and no product with
    # weights.
    over_attention = 3 if shape.remat == "none" else 4
    over_weights = (3 if shape.remat in ("none", "dots") else 4) - (adapters is not None)
    trained = all_weights(config) if adapters is None else count(config, adapters)[0]
    context = 2 * L * config.num_attention_heads * config.head_dim * shape.length / 2
    layers = 2 * micro_tokens * (over_weights * weights + over_attention * context / shape.tensor)
    loss = (6 if _trains_head(config, adapters) else 4) * micro_tokens * V * D / shape.tensor
    flops = shape.accumulation * (layers + loss)

    kept = {"none": 2, "int8": 1, "nf4": 0.53}[quantization]  # bytes a weight, its scales included
    # What is quantised is read, written in bfloat16 and read again.
    reads = (kept if quantization == "none" else kept + 4) * weights * over_weights
    activations = (
        2 * micro_tokens * L * (_WIDTHS_D * D + _WIDTHS_F * config.intermediate_size / shape.tensor)
    )
    logits = 16 * micro_tokens * V / shape.tensor
    optimizer = 36 * trained / (shape.fsdp * shape.tensor)
    traffic = shape.accumulation * (reads + activations + logits) + optimizer

    ways = 2 if adapters else 3  # forward, backward, and the gradients' way home
    gathered = (shape.fsdp - 1) / shape.fsdp * weights * kept * ways
    gradients = 4 * trained / shape.tensor if adapters else 2 * weights + 4 * V * D / shape.tensor
    over_data = 2 * (shape.data - 1) / shape.data * gradients / shape.fsdp
    of_loss = (shape.fsdp - 1) * micro_tokens * D * (2 + 4 + 2 + 2)
    over_tensor = (shape.tensor - 1) / shape.tensor * 2 * 2 * 6 * L * micro_tokens * D
    between = shape.accumulation * (gathered + over_data + of_loss + over_tensor)
    return {
        "arithmetic": flops / device.flops,
        "memory": traffic / device.bandwidth,
        "links": between / device.link,
    }
