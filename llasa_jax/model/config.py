"""The model's geometry, and its adapters'. The training settings live in
`llasa_jax.train.settings`.
"""

import math
from dataclasses import dataclass
from typing import Literal

Quantization = Literal[
    "none", "int8", "nf4"
]  # how a frozen matrix is kept (see llasa_jax.model.quantize)
# Both tables are padded to a multiple of this, so that any usual `tensor` axis divides them; the
# padding's logits are masked, and what is exported has the tokenizer's own size.
VOCAB_MULTIPLE = 512


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling of rotary embeddings (`rope_type: llama3` in HF's config)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a LLaMA, under HF's `LlamaConfig` names. `vocab_size` is the tokenizer's, without
    padding.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 131_072

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


@dataclass(frozen=True)
class AdapterConfig:
    """What LoRA trains beside a frozen model. Each of `targets` has an adapter of `rank`, which
    adds `scale` times its product.

    `modules` are trained whole: "norms", "embed" or "head". `token_ids` are those of tokens whose
    rows of the tables are trained by themselves. `dropout` is on what goes into an adapter, in
    training alone. With a `batch`, ranks and rows are several adapters' side by side, and each of
    so many rows of a batch has factors of its own for them (see
    `llasa_jax.model.lora.side_by_side`).
    """

    targets: tuple[str, ...]
    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    modules: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    batch: int = 0

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rslora."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
