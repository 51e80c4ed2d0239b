"""A LoRA run's adapters folded into its base's weights, piece by piece, in float32."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llasa_jax.convert.model_folder import (
    adapters_of,
    check_base,
    params_folder,
    quantization_of,
    read_description,
)
from llasa_jax.convert.names import our_axes
from llasa_jax.convert.params_io import ParamsReader
from llasa_jax.convert.peft_adapter import open_adapter
from llasa_jax.errors import UserError
from llasa_jax.model.lora import Adapter, merged


class MergedReader:
    """A `ParamsReader` of a base whose pieces come with an adapter folded in, as float32 where it
    touches them.

    `config` is that of the merged model, whose head is no longer tied where an adapter is on one of
    the tables alone.
    """

    def __init__(self, base: ParamsReader, adapter: Adapter):
        its = adapter.config
        one_table = base.config.tie_word_embeddings and {"embed", "head"} & set(its.targets)
        self.config = (
            dataclasses.replace(base.config, tie_word_embeddings=False)
            if one_table
            else base.config
        )
        self._base, self._adapter = base, adapter
        self.dtypes = {path: base.dtypes[self._source(path)] for path in our_axes(self.config)}

    def _source(self, path: str) -> str:
        return path if path in self._base.dtypes else "embed"

    def pieces(self, path: str) -> Iterator[tuple[int, np.ndarray]]:
        """As `ParamsReader.pieces`."""
        for start, piece in self._base.pieces(self._source(path)):
            yield start, merged(path, piece, start, self._adapter)


def merged_reader(run: Path, step: int | None) -> MergedReader:
    """The weights of a LoRA run, merged. UserError where its base is not there, or is another
    model.
    """
    config, source = read_description(run)
    _, base = adapters_of(source)
    if quantization_of(source) != "none":
        raise UserError(
            f"{run} was trained over {base} quantised to {quantization_of(source)}, and merged into"
            " the weights as they are it would be another model; write the adapter alone (--lora"
            " adapter), which PEFT loads over a quantised model too"
        )
    check_base(run, base)
    reader = ParamsReader(params_folder(base), config)
    return MergedReader(reader, open_adapter(run, base, step))
