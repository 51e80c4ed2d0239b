"""New rows for the speech tokens, as transformers' `resize_token_embeddings` draws them by default
("mean resizing").

They come from the normal distribution with the old rows' mean and a billionth of their covariance,
so that the new tokens start out nearly alike and take little probability from the old ones
(transformers, `_init_added_embeddings_weights_with_mean`).
"""

import numpy as np

from llasa_jax.convert.safetensors_io import SafetensorsFolder

SHRINK = 1e-9
BLOCK = 4096  # rows at a time


def added_rows(checkpoint: SafetensorsFolder, table: str, count: int, seed: int) -> np.ndarray:
    """`count` new rows [count, D] for the tensor `table` [V, D], in its dtype. The table is read
    twice, in blocks.

    Statistics are in float32, as in HF. Where the covariance is not positive definite, above all
    with fewer rows than columns, every new row is the mean, as in HF.
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
    return new
