"""Settings of the model: its weights and arithmetic, adapters, and how devices share it."""

from dataclasses import dataclass
from typing import Literal

from llasa_jax.errors import UserError
from llasa_jax.model.config import Quantization
from llasa_jax.runtime.settings import setting

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class ModelSettings:
    """The model to finetune, and its arithmetic."""

    path: str = setting("", path=True, resume=True)
    """Folder of the model, as import-hf makes it; or a Hugging Face folder or hub id."""
    dtype: Dtype = "bfloat16"
    """Type of the arithmetic: activations, and copies of the weights in matrix products."""
    param_dtype: Dtype = "float32"
    """Type in which trained weights are kept and updated."""
    attention: Literal["auto", "xla", "splash", "triton"] = setting("auto", resume=True)
    """Implementation of attention: splash (a Pallas kernel for TPUs), triton (a Pallas kernel for
    GPUs) or xla; auto picks the one for the devices at hand. None lets a clip see its neighbour in
    a packed row."""
    remat: Literal["none", "dots", "full", "offload"] = setting("full", resume=True)
    """What the backward pass recomputes to save memory: full recomputes each layer from its input;
    dots keeps the results of matrix products with weights (17-25% fewer FLOPs than full); none
    keeps everything; offload is full with the layers' inputs in pinned host memory."""
    loss_chunk: int = setting(256, low=1, high=65_536, resume=True)
    """Tokens of each row for which the loss computes logits at a time, to save memory. Must divide
    data.max_length."""

    def check(self, name: str) -> None:
        if not self.path:
            raise UserError(
                f"{name}.path is not set; give it in the config or as --{name}.path=FOLDER"
            )


@dataclass(frozen=True)
class LoraSettings:
    """Adapters trained beside a frozen model, as PEFT's LoRA. The rank turns them on."""

    rank: int = setting(0, low=0, high=65_536)
    """Rank of the adapters' two factors; 0 trains all weights of the model instead."""
    alpha: float = setting(32.0, above=0, high=65_536)
    """An adapter's output is scaled by alpha / rank."""
    dropout: float = setting(0.1, low=0, below=1)
    """Share of an adapter's inputs set to zero in training."""
    targets: list[str] = setting(lambda: ["q", "v"])
    """Matrices that get an adapter: any of q, k, v, o, gate, up, down, embed and head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA)."""
    train_also: list[str] = setting(list)
    """What is trained besides the adapters: norms, embed or head as a whole; or tokens such as
    "<|laugh|>", of which only the rows in embedding and head are trained."""
    init: str = setting("", path=True, resume=True)
    """Folder of a PEFT adapter or a LoRA run to go on from; rank, alpha, targets and the like are
    then the adapter's."""
    frozen_dtype: Dtype = "bfloat16"
    """Type in which frozen weights are kept; trained ones are kept in model.param_dtype."""
    quantize: Quantization = "none"
    """Keep the layers' frozen matrices in 8 bits (int8) or 4 bits (nf4, as QLoRA); embedding, head
    and norms stay in lora.frozen_dtype."""

    def check(self, name: str) -> None:
        for listed in ("targets", "train_also"):
            values = getattr(self, listed)
            twice = [value for value in values if values.count(value) > 1]
            if twice:
                raise UserError(f"{name}.{listed} names {twice[0]} twice; name it once")


# Empty, or a name or address and a port
COORDINATOR = r"|([\w.-]+|\[[0-9A-Fa-f:.]+\]):\d{1,5}"


@dataclass(frozen=True)
class MeshSettings:
    """How devices share the model: a grid of data x fsdp x tensor. At most one axis may be -1,
    which means all devices that remain.
    """

    data: int = setting(1, low=-1, high=1_000_000, resume=True)
    """Copies of the weights; each copy's devices take other rows of the batch."""
    fsdp: int = setting(-1, low=-1, high=1_000_000, resume=True)
    """Devices that split rows, weights, gradients and optimizer state."""
    tensor: int = setting(1, low=-1, high=1_000_000, resume=True)
    """Devices that split each layer: its heads, its MLP and the vocabulary."""
    slices: int = setting(1, low=1, high=1_000_000, resume=True)
    """TPU slices, or GPU machines, that take part; mesh.data must be a multiple of it."""
    hosts: bool = setting(False, resume=True)
    """Join the processes that run this same command on every host
    (jax.distributed.initialize()). They are compared before the first step, and end together."""
    coordinator: str = setting("", pattern=COORDINATOR, words="HOST:PORT", resume=True)
    """Address of host 0, at which all meet, where no launcher says it: HOST:PORT, of a free port.
    Sets mesh.hosts."""
    process_count: int = setting(0, low=0, high=1_000_000, resume=True)
    """Processes that take part; 0, as the launcher says."""
    process_index: int = setting(-1, low=-1, high=1_000_000, resume=True)
    """Which of them this one is, from 0; -1, as the launcher says."""
    start_timeout: float = setting(300.0, above=0, high=86_400, resume=True)
    """Seconds to wait until the processes of all hosts have started."""
    compiled: str = setting("", path=True, resume=True)
    """Folder of compiled programs, local or in a bucket, so that a restart does not compile again;
    empty, $JAX_COMPILATION_CACHE_DIR or ~/.cache/llasa-jax/compiled; off, none are kept."""

    @property
    def joins(self) -> bool:
        """Whether other processes take part."""
        return self.hosts or bool(self.coordinator)

    def check(self, name: str) -> None:
        sizes = {axis: getattr(self, axis) for axis in ("data", "fsdp", "tensor")}
        for axis, size in sizes.items():
            if size == 0:
                raise UserError(
                    f"{name}.{axis} is 0; give a number of devices from 1 up, or -1 for all that"
                    " remain"
                )
        if list(sizes.values()).count(-1) > 1:
            raise UserError(
                f"more than one of {', '.join(f'{name}.{axis}={n}' for axis, n in sizes.items())}"
                " is -1; only one axis can take all devices that remain"
            )
        if self.process_count and self.process_index >= self.process_count:
            raise UserError(
                f"{name}.process_index={self.process_index} is not below"
                f" {name}.process_count={self.process_count}; number the processes from 0"
            )
        if self.data != -1 and self.data % self.slices:
            raise UserError(
                f"{name}.data={self.data} is not a multiple of {name}.slices={self.slices}; each"
                " slice repeats the weights, so make it one"
            )
