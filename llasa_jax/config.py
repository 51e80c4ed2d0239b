"""The model's geometry. The training settings live in `llasa_jax.settings`."""

from dataclasses import dataclass

# Both tables are padded to a multiple of this, so that any usual `tensor` axis divides them; the padding's logits are
# masked, and what is exported has the tokenizer's own size.
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
    """Sizes of a LLaMA, under HF's `LlamaConfig` names. `vocab_size` is the tokenizer's, without padding."""

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
    """What LoRA trains beside a frozen model. Each of `targets` gets an adapter of `rank`, which adds `scale` times its product.

    `modules` are trained whole: "norms", "embed" or "head". `rows` are ids of tokens whose rows of the tables are trained by themselves.
    `dropout` is on what goes into an adapter, in training alone.
    """

    targets: tuple[str, ...]
    rank: int
    scale: float
    dropout: float = 0.0
    modules: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
