"""Settings of preference training."""

from dataclasses import dataclass
from typing import Literal

from llasa_jax.errors import UserError
from llasa_jax.runtime.settings import group, setting


@dataclass(frozen=True)
class DpoSettings:
    """Direct preference optimisation, where align.loss is dpo."""

    beta: float = setting(0.1, above=0, high=1000)
    """How strongly the model is held at the one that training begins with: the rewards are beta
    times the log-probabilities relative to that model's. For length_normalized and ipo, whose
    log-probabilities are means over tokens, larger ones are usual."""
    form: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid is DPO's own loss, -log sigmoid of the margin of the rewards (arXiv 2305.18290); ipo
    is the squared distance of the mean log-probabilities' margin from 1 / (2 beta) (arXiv
    2310.12036)."""
    label_smoothing: float = setting(0.0, low=0, below=0.5)
    """Share of the pairs that are taken to be ranked wrongly (conservative DPO); sigmoid alone has
    it."""
    length_normalized: bool = False
    """Divide the log-probability of each speech by its number of tokens, so that a long one does
    not count for more; ipo always does."""
    supervised: float = setting(0.0, low=0, high=1000)
    """Weight of the supervised loss on the better speeches, in nats a token, which is added: it
    keeps their log-probability from falling."""

    def check(self, name: str) -> None:
        if self.form == "ipo" and (self.label_smoothing or self.length_normalized):
            raise UserError(
                f"{name}.form ipo has no label_smoothing, and is length_normalized in any case;"
                " leave both out"
            )


@dataclass(frozen=True)
class GrpoSettings:
    """Group relative policy optimisation, where align.loss is grpo."""

    epsilon_low: float = setting(0.2, above=0, below=1)
    """A speech is made less probable only until the ratio of its tokens' probabilities to those
    when it was drawn has fallen by this. Without effect where updates is 1."""
    epsilon_high: float = setting(0.2, above=0, high=100)
    """And more probable until it has risen by this; DAPO takes 0.28. Without effect where updates
    is 1."""
    kl: float = setting(0.0, low=0, high=1000)
    """Weight of the divergence from the model that training begins with, in nats a token; 0, as
    DAPO and Dr. GRPO have it, needs no reference. In full finetuning above 0 a second copy of the
    weights is in memory."""
    normalize: Literal["speeches", "tokens", "length"] = "tokens"
    """What the loss is a mean over. speeches: each speech counts as much as another (GRPO); tokens:
    each token does (DAPO); length: the sum of a speech is divided by data.max_length, whatever its
    own length (Dr. GRPO)."""
    scale: bool = True
    """Divide rewards by their standard deviation among the speeches of a text; Dr. GRPO does
    not."""
    updates: int = setting(1, low=1, high=64)
    """Steps on the same speeches, before new ones are drawn."""


@dataclass(frozen=True)
class AlignSettings:
    """Which loss is trained with."""

    loss: Literal["supervised", "dpo"] = "supervised"
    """supervised: cross-entropy of every clip. dpo: of pairs, which `llasa-jax prefer` makes, the
    better one is made more probable than the worse one."""
    dpo: DpoSettings = group(DpoSettings)

    def check(self, name: str) -> None:
        if self.loss != "dpo" and self.dpo != DpoSettings():
            raise UserError(f"{name}.dpo is set, but {name}.loss is {self.loss}; set it to dpo")
