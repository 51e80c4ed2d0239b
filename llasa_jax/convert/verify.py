"""`llasa-jax verify`: do transformers and we compute the same from an HF checkpoint and one of
ours?
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llasa_jax.convert.hf_config import dtype_key
from llasa_jax.convert.hf_files import CONFIG, read_json
from llasa_jax.convert.load_hf import HfReader
from llasa_jax.convert.merge import merged_reader
from llasa_jax.convert.model_folder import (
    adapters_of,
    load_params,
    open_model,
    read_description,
    refuse_base,
)
from llasa_jax.convert.params_io import Reader, Sums
from llasa_jax.convert.safetensors_io import cast, named_dtype
from llasa_jax.errors import UserError, first_line, listed
from llasa_jax.model.config import ModelConfig
from llasa_jax.model.llama import Llama
from llasa_jax.model.sharding import make_mesh
from llasa_jax.runtime.copies import local_copy
from llasa_jax.runtime.storage import as_path

ROWS, LENGTH = 2, 64
# In float32, sums in another order differ by about 1e-6 of the logits, layer on layer.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Verification:
    """`largest_difference` of two logits, `largest_logit` for its scale; `agreement`: how often the
    most probable next token is the same. `different` are the names of the tensors, out of
    `tensors`, that are not equal bit for bit in the narrower of the two types.
    """

    largest_difference: float
    largest_logit: float
    agreement: float
    tokens: int
    tensors: int = 0
    different: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        """Whether the difference is that of float32 sums in another order. False where there is a
        NaN.
        """
        return self.largest_difference <= TOLERANCE * max(1.0, self.largest_logit)

    def check(self) -> None:
        """UserError where the two do not compute the same, or a tensor differs."""
        if not self.equal:
            raise UserError(
                f"the Hugging Face checkpoint and ours do not compute the same ({self}); one of"
                " them is damaged, or of another step"
            )
        if self.different:
            raise UserError(
                f"{len(self.different)} of {self.tensors} tensors"
                f" {'differs' if len(self.different) == 1 else 'differ'}: {listed(self.different)};"
                " one of the two is damaged, or of another step"
            )

    def __str__(self) -> str:
        tensors = (
            f"{len(self.different)} of {self.tensors} tensors differ"
            if self.different
            else f"all {self.tensors} tensors are equal, bit for bit"
        )
        return (
            f"{tensors}; largest difference of logits {self.largest_difference:.2e} (logits up to"
            f" {self.largest_logit:.1f}), next-token agreement {self.agreement:.2%} over"
            f" {self.tokens} tokens"
        )


def verify(
    hf_dir: Path,
    our_checkpoint: Path,
    *,
    step: int | None = None,
    base: str | Path | None = None,
) -> Verification:
    """Compares the tensors of both bit for bit, and their logits on a fixed batch of 2 x 64 random
    tokens, and prints the result.

    Both compute in float32, from weights in the HF checkpoint's type: so a difference is one of
    conversion, not of rounding. Takes 4 bytes a weight for transformers, then again for us, one
    after the other. UserError where the two are of different sizes.
    """
    hf_dir = as_path(hf_dir)
    hf_config = read_json(hf_dir / CONFIG)
    config, source = read_description(our_checkpoint)
    refuse_base(our_checkpoint, source, base)
    if hf_config.get("vocab_size") != config.vocab_size:
        raise UserError(
            f"{hf_dir} has {hf_config.get('vocab_size')} tokens and {our_checkpoint}"
            f" {config.vocab_size}; they do not match"
        )
    tokens = (
        np.random.default_rng(0).integers(0, config.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    )
    theirs = _hf_logits(hf_dir, tokens)
    stored = named_dtype(hf_config.get(dtype_key(hf_config)) or "float32")
    if adapters_of(source)[0]:
        config, params = _merged(our_checkpoint, step, stored, base)
    else:
        params = load_params(our_checkpoint, make_mesh(devices=jax.devices()[:1]), stored, step)
    ours = np.asarray(_our_logits(config, params, tokens))
    result = Verification(
        float(np.abs(ours - theirs).max()),
        float(np.abs(theirs).max()),
        float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        tokens.size,
        *_compare_tensors(hf_dir, our_checkpoint, step, base),
    )
    print(result)
    return result


def _compare_tensors(
    hf_dir: Path, our_checkpoint: Path, step: int | None, base: str | Path | None
) -> tuple[int, tuple[str, ...]]:
    """How many tensors the HF checkpoint has, and the names of those whose bits are not ours. Where
    the types differ, the wider one is rounded first, as a conversion does.
    """
    config, origin = read_description(our_checkpoint)
    if adapters_of(origin)[0]:
        merged = merged_reader(our_checkpoint, step, base)
        reader: Reader = merged
        config = merged.config
    else:
        reader = open_model(our_checkpoint).reader(step)
    # Theirs by their own config: a tied model's export after LoRA on one table is untied.
    theirs = HfReader(hf_dir, config)
    names = {(place.path, place.layer): name for name, place in theirs.table.items()}
    different = []
    for path in theirs.dtypes:
        narrow = min(reader.dtypes[path], theirs.dtypes[path], key=lambda dtype: dtype.itemsize)
        ours, hf = Sums(path), Sums(path)
        stacked = path.startswith("layers.")
        for start, piece in reader.pieces(path):
            # Padding of a table may hold anything: it is in neither the model nor an export.
            rows = piece if stacked else piece[: max(0, theirs.shapes[path][0] - start)]
            ours.add(start, cast(rows, narrow))
        for start, piece in theirs.pieces(path):
            hf.add(start, cast(piece, narrow))
        for index, (a, b) in enumerate(zip(ours.sums, hf.sums, strict=True)):
            if a != b:
                different.append(names[path, index if stacked else None])
    return len(names), tuple(different)


def _merged(
    run: Path, step: int | None, dtype: np.dtype, base: str | Path | None
) -> tuple[ModelConfig, dict]:
    """A LoRA run's weights as `export-hf --lora merge` writes them, in `dtype`."""
    reader = merged_reader(run, step, base)
    tree: dict = {"layers": {}}
    for path in reader.dtypes:
        whole = np.concatenate([cast(piece, dtype) for _, piece in reader.pieces(path)])
        (tree["layers"] if path.startswith("layers.") else tree)[path.removeprefix("layers.")] = (
            whole
        )
    return reader.config, tree


def _hf_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            local_copy(folder), dtype=torch.float32, use_safetensors=True
        ).eval()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is not read by transformers ({first_line(error)}); give an HF checkpoint"
        ) from error
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def _our_logits(config, params: dict, tokens: np.ndarray) -> jax.Array:
    graphdef = nnx.graphdef(
        nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), dtype=jnp.float32, remat="none"))
    )
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)

    @jax.jit
    def logits(params, tokens, positions):
        model = nnx.merge(graphdef, params)
        return model.logits(model(tokens, positions, jnp.ones_like(tokens)))

    with jax.default_matmul_precision("highest"):
        return logits(params, tokens, positions)
