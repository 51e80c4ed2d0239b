"""A LoRA run's adapters folded into its base's weights, piece by piece, in float32."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llasa_jax.convert.model_folder import base_of, open_model, quantization_of, read_description
from llasa_jax.convert.names import our_axes
from llasa_jax.convert.params_io import Reader
from llasa_jax.convert.peft_adapter import open_adapter
from llasa_jax.errors import UserError
from llasa_jax.model.config import ModelConfig
from llasa_jax.model.lora import Adapter, merged


class MergedReader:
    """The weights of a base of geometry `config`, with an adapter folded in, as float32 where it
    touches them. A `Reader`.

    `config` is that of the merged model, whose head is no longer tied where an adapter is on one of
    the tables alone.
    """

    def __init__(self, base: Reader, config: ModelConfig, adapter: Adapter):
        tables = {"embed", "head"} & set(adapter.config.targets)
        untied = config.tie_word_embeddings and bool(tables)
        self.config = dataclasses.replace(config, tie_word_embeddings=False) if untied else config
        self._base, self._adapter = base, adapter
        self.dtypes = {path: base.dtypes[self._source(path)] for path in our_axes(self.config)}

    def _source(self, path: str) -> str:
        return path if path in self._base.dtypes else "embed"

    def pieces(self, path: str) -> Iterator[tuple[int, np.ndarray]]:
        """As `Reader.pieces`."""

        def fold(found: tuple[int, np.ndarray]) -> tuple[int, np.ndarray]:
            start, piece = found
            return start, merged(path, piece, start, self._adapter)

        return map(fold, self._base.pieces(self._source(path)))


def merged_reader(
    run: Path, step: int | None = None, base: str | Path | None = None
) -> MergedReader:
    """The weights of a LoRA run, merged. UserError where its base (in `base`, or where it lay in
    training) is not there, or is another model.
    """
    config, source = read_description(run)
    if quantization_of(source) != "none":
        raise UserError(
            f"{run} was trained over a base quantised to {quantization_of(source)}, and merged into"
            " the weights as they are it would be another model; write the adapter alone (--lora"
            " adapter), which PEFT loads over a quantised model too"
        )
    base = base_of(run, base)
    return MergedReader(open_model(base).reader(), config, open_adapter(run, base, step))
