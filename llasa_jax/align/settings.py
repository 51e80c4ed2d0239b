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
class AlignSettings:
    """Which loss is trained with."""

    loss: Literal["supervised", "dpo"] = "supervised"
    """supervised: cross-entropy of every clip. dpo: of pairs, which `llasa-jax prefer` makes, the
    better one is made more probable than the worse one."""
    dpo: DpoSettings = group(DpoSettings)

    def check(self, name: str) -> None:
        if self.loss != "dpo" and self.dpo != DpoSettings():
            raise UserError(f"{name}.dpo is set, but {name}.loss is {self.loss}; set it to dpo")
