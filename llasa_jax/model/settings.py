"""Settings of the model: its weights and arithmetic, adapters, and how devices share it."""

from dataclasses import dataclass, field
from typing import Literal

from llasa_jax.model.config import Quantization

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ModelSettings:
    """`path`: a folder that `import-hf` made. Arithmetic in `dtype` over weights kept in
    `param_dtype`.

    `attention` "auto" is splash (Pallas) on TPUs, triton (Pallas) on GPUs and xla elsewhere; none
    lets a clip see its neighbour. `remat` "full" recomputes layers in the backward pass to save
    memory, "dots" all but the products with weights; "offload" is "full" with what is kept, each
    layer's input, in the host's memory. `loss_chunk` is how many tokens of each row the loss takes
    at a time.
    """

    path: str = ""
    dtype: Dtype = "bfloat16"
    param_dtype: Dtype = "float32"
    attention: Literal["auto", "xla", "splash", "triton"] = "auto"
    remat: Literal["none", "dots", "full", "offload"] = "full"
    loss_chunk: int = 256


@dataclass(frozen=True)
class LoraSettings:
    """With a `rank` from 1 on, adapters are trained beside a frozen model, as PEFT's LoRA; 0 trains
    all weights.

    `targets` are any of q, k, v, o, gate, up, down, embed and head. An adapter's product counts
    alpha / rank times, with `rslora` alpha / sqrt(rank). `train_also` lists what is trained
    besides: norms, embed or head as a whole, or tokens (such as "<|laugh|>"), whose rows of
    embedding and head are. `init`: a PEFT adapter to go on from. Frozen weights are kept in
    `frozen_dtype`, trained ones in model.param_dtype. `quantize` keeps the layers' frozen matrices
    in 8 or, as QLoRA, in 4 bits, and leaves tables and norms as they are.
    """

    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.1
    targets: list[str] = field(default_factory=lambda: ["q", "v"])
    rslora: bool = False
    train_also: list[str] = field(default_factory=list)
    init: str = ""
    frozen_dtype: Dtype = "bfloat16"
    quantize: Quantization = "none"


@dataclass(frozen=True)
class MeshSettings:
    """Devices along each axis; -1 means all that remain. `data` repeats the weights, `fsdp` splits
    them, `tensor` splits each layer.

    `slices`: how many TPU slices, or GPU machines, take part; `data` must be a multiple of it.
    `hosts` true joins the processes that run this same command on every host
    (`jax.distributed.initialize()`).
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    slices: int = 1
    hosts: bool = False
