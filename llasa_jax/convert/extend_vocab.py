"""New rows for the speech tokens of a text model.

By default they are drawn as transformers' `resize_token_embeddings` does ("mean resizing"): from
the normal distribution with the old rows' mean and a billionth of their covariance, so that the new
tokens start out nearly alike and take little probability from the old ones (transformers,
`_init_added_embeddings_weights_with_mean`).
"""

from typing import Literal

import numpy as np

from llasa_jax.convert.safetensors_io import SafetensorsFolder
from llasa_jax.speech.vocab import NUM_CODES

SHRINK = 1e-9
BLOCK = 4096  # rows at a time
LEVELS, DIGITS = 4, 8  # of XCodec2's quantiser: 4 ** 8 codes

NewCodes = Literal["mean", "levels"]


def sums_over_digits(vectors_NLD: np.ndarray) -> np.ndarray:
    """A row for each of the 65,536 codes [codes, D]: the sum of one vector for each of its eight
    digits N, of four levels L.
    """
    codes = np.arange(NUM_CODES)
    return sum(vector_LD[codes // LEVELS**n % LEVELS] for n, vector_LD in enumerate(vectors_NLD))


def added_rows(
    checkpoint: SafetensorsFolder, table: str, count: int, seed: int, codes: NewCodes = "mean"
) -> np.ndarray:
    """`count` new rows [count, D] for the tensor `table` [V, D], in its dtype. The table is read
    twice, in blocks.

    Statistics are in float32, as in HF. Where the covariance is not positive definite, above all
    with fewer rows than columns, every new row is the mean, as in HF.

    With `codes` "levels" the last rows, those of the 65,536 codes, are the mean and the sum of one
    random vector for each of a code's eight digits, as spread out as the old rows. Codes with
    digits in common then begin alike, so that those that are rare learn from the others.
    """
    tensor = checkpoint.tensors[table]
    if not count:
        return np.empty((0, *tensor.shape[1:]), tensor.dtype)

    import torch

    rows, width = tensor.shape
    blocks = range(0, rows, BLOCK)

    def block(start: int) -> torch.Tensor:
        return torch.from_numpy(checkpoint.read(table, start, start + BLOCK).astype(np.float32))

    sums = (block(start).sum(0, dtype=torch.float64) for start in blocks)
    mean = sum(sums, torch.zeros(width, dtype=torch.float64)).div(rows).float()
    covariance = torch.zeros(width, width)
    for start in blocks:
        centred = block(start) - mean
        covariance.addmm_(centred.T, centred)
    factor, failed = torch.linalg.cholesky_ex(covariance.div_(rows) * SHRINK)
    new = np.empty((count, width), tensor.dtype)
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, BLOCK):
        part = new[start : start + BLOCK]
        drawn = mean.expand(len(part), width)
        if not failed:
            drawn = drawn + torch.randn(len(part), width, generator=generator) @ factor.T
        part[...] = drawn.numpy().astype(tensor.dtype)
    if codes == "levels":
        spread = covariance.diagonal().sqrt() / DIGITS**0.5
        vectors = torch.randn(DIGITS, LEVELS, width, generator=generator) * spread
        of_codes = mean.numpy() + sums_over_digits(vectors.numpy())
        new[-NUM_CODES:] = of_codes.astype(tensor.dtype)
    return new
