"""One step of training: a jitted function over sharded parameters, optimizer state and a batch of
packed rows, for any `Loss`.

Parameters are two trees, `frozen` and `trainable`: gradients, optimizer state and checkpoints are
of the second alone. In full finetuning the first is empty.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from llasa_jax.model.attention import choose_attention
from llasa_jax.model.config import AdapterConfig, ModelConfig, Quantization
from llasa_jax.model.llama import Llama
from llasa_jax.model.lora import join, split
from llasa_jax.model.loss import (
    Loss,
    SupervisedLoss,
    at_temperature,
    chunked_log_probs,
    chunked_ranks,
)
from llasa_jax.model.settings import ModelSettings
from llasa_jax.model.sharding import ROWS, MeshLayout, abstract_params, rows_here
from llasa_jax.train.offload import place_state


class TrainStep:
    """The compiled train and validation steps of one model on one mesh.

    A batch is a dict of arrays [accumulation, rows, length] as `batching.batches` makes them,
    sharded as `batch_sharding`. `code_ids` are the ids of the speech codes, whose share and
    accuracy are counted. With `adapters` all but them is frozen and kept in `frozen_dtype`, or
    quantised; `seed` is that of their dropout. `frozen`, `trainable` and `opt_state` are the trees
    as `ShapeDtypeStruct`s. `offload` keeps the optimizer's state on the host, for an optimizer made
    with that setting. `loss` is what a step minimises; validation is always supervised.
    """

    BATCH = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32) | {
        "loss_mask": jnp.bool_
    }

    def __init__(
        self,
        config: ModelConfig,
        settings: ModelSettings,
        optimizer: optax.GradientTransformation,
        mesh: Mesh | AbstractMesh,
        code_ids: range = range(0),
        adapters: AdapterConfig | None = None,
        frozen_dtype: str = "bfloat16",
        quantization: Quantization = "none",
        seed: int = 0,
        offload: bool = False,
        loss: Loss | None = None,
    ):
        self.loss: Loss = loss or SupervisedLoss()
        self.config, self.settings, self.mesh, self.code_ids = config, settings, mesh, code_ids
        self.optimizer = optax.with_extra_args_support(optimizer)
        self.adapters, self.seed = adapters, seed
        options = {
            "dtype": jnp.dtype(settings.dtype),
            "remat": settings.remat,
            "attention": choose_attention(settings.attention, mesh),
            "layout": MeshLayout(mesh),
            "adapters": adapters,
        }
        model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), **options))
        self.graphdef = nnx.graphdef(model)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.batch_sharding = NamedSharding(mesh, PartitionSpec(None, *ROWS))
        self.frozen, _ = split(
            abstract_params(config, mesh, jnp.dtype(frozen_dtype), adapters, quantization), adapters
        )
        _, self.trainable = split(
            abstract_params(config, mesh, jnp.dtype(settings.param_dtype), adapters), adapters
        )
        self.opt_state = place_state(
            jax.eval_shape(optimizer.init, self.trainable), self.trainable, offload=offload
        )
        shardings = jax.tree.map(lambda leaf: leaf.sharding, (self.trainable, self.opt_state))
        self.init = jax.jit(optimizer.init, out_shardings=shardings[1])
        self.train = jax.jit(
            self._train, donate_argnums=(1, 2), out_shardings=(*shardings, self.replicated)
        )
        self.validate = jax.jit(self._validate, out_shardings=self.replicated)
        self.log_probs = jax.jit(self._log_probs, out_shardings=self.replicated)

    def rows_here(self, accumulation: int, rows: int, length: int) -> list[int]:
        """Which rows of a batch of this shape this host's devices hold, ascending."""
        return rows_here(self.batch_sharding, (accumulation, rows, length))

    def place(self, batch: dict[str, np.ndarray], rows: int) -> dict[str, jax.Array]:
        """A batch of `rows` on the devices, of the arrays of the rows that are here, or of all."""
        accumulation, here, length = batch["tokens"].shape
        shape = accumulation, rows, length
        given = range(rows) if here == rows else self.rows_here(*shape)
        first = {row: at for at, row in enumerate(given)}

        def part(array):
            def of(index: tuple[slice, ...]) -> np.ndarray:
                begin, end, _ = index[1].indices(rows)
                return array[:, first[begin] : first[begin] + end - begin]

            return of

        # What the guard of the loop lets through on one host counts as implicit on several.
        with jax.transfer_guard_host_to_device("allow"):
            return {
                name: jax.make_array_from_callback(shape, self.batch_sharding, part(array))
                for name, array in batch.items()
            }

    def compile(self, accumulation: int, rows: int, length: int) -> jax.stages.Compiled:
        """The train step for batches of this shape and the platform of the mesh's devices, which
        need not be at hand.
        """
        batch = self.shapes(self.BATCH | self.loss.arrays, accumulation, rows, length)
        traced = self.train.trace(self.frozen, self.trainable, self.opt_state, batch)
        platform = self.mesh.devices.flat[0].platform
        return traced.lower(
            lowering_platforms=("cuda" if platform == "gpu" else platform,)
        ).compile()

    def compile_validation(self, accumulation: int, rows: int, length: int) -> jax.stages.Compiled:
        """The validation step for batches of this shape."""
        return self.validate.lower(
            self.frozen, self.trainable, self.shapes(self.BATCH, accumulation, rows, length)
        ).compile()

    def shapes(self, arrays: dict, *shape: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=self.batch_sharding)
            for name, dtype in arrays.items()
        }

    @property
    def _sizes(self):
        """The arguments of the chunked losses that are the same for every batch."""
        return {
            "vocab_size": self.config.vocab_size,
            "chunk": self.settings.loss_chunk,
            "mesh": self.mesh,
        }

    def _scores(self, frozen, trainable, micro_batch, dropout_key=None):
        """The rows of one micro-batch [rows, length], and the features and tables whose products
        are their scores.
        """
        rows = jax.lax.with_sharding_constraint(micro_batch, NamedSharding(self.mesh, ROWS))
        model = nnx.merge(self.graphdef, join(frozen, trainable))
        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        hidden = model(rows["tokens"], rows["positions"], rows["segment_ids"], keys[0])
        return rows, *model.output_factors(hidden, keys[1])

    def _log_probs(self, frozen, trainable, batch):
        """log p of every target of a whole batch, float32 in its shape, 0 where there is no loss;
        without dropout, at the loss's temperature.
        """

        def of(micro_batch):
            rows, features, tables = self._scores(frozen, trainable, micro_batch)
            features = at_temperature(features, self.loss.temperature)
            return chunked_log_probs(
                features, tables, rows["targets"], rows["loss_mask"], **self._sizes
            )

        return jax.lax.map(of, batch)

    def _is_code(self, batch):
        return (
            batch["loss_mask"]
            & (batch["targets"] >= self.code_ids.start)
            & (batch["targets"] < self.code_ids.stop)
        )

    def _validate(self, frozen, trainable, batch):
        """Sums over a whole batch without gradients, so that many batches average exactly: nats and
        correct predictions of all targets; of the codes among them, how many are the top
        prediction, and among the top ten.
        """

        def sums(micro_batch):
            rows, features, tables = self._scores(frozen, trainable, micro_batch)
            nll, rank = chunked_ranks(features, tables, rows["targets"], **self._sizes)
            learned, code = rows["loss_mask"], self._is_code(rows)
            counts = {
                "correct": learned & (rank == 0),
                "code_top1": code & (rank == 0),
                "code_top10": code & (rank < 10),
            }
            counts |= {"targets": learned, "codes": code}
            return {"nats": jnp.sum(jnp.where(learned, nll, 0.0))} | {
                name: jnp.sum(x, dtype=jnp.float32) for name, x in counts.items()
            }

        return jax.tree.map(jnp.sum, jax.lax.map(sums, batch))

    def _train(self, frozen, trainable, opt_state, batch):
        """The loss over the whole batch, whatever micro-batch or device its rows are on, and one
        update for it.
        """
        totals = self.loss.totals(batch)

        def loss_of(trainable, micro_batch, dropout_key):
            rows, features, tables = self._scores(frozen, trainable, micro_batch, dropout_key)
            return self.loss.shares(rows, totals, features, tables, **self._sizes)

        def value_and_grad(micro_batch, dropout_key):
            return jax.value_and_grad(loss_of, has_aux=True)(trainable, micro_batch, dropout_key)

        def accumulate(carry, micro_batch):
            return jax.tree.map(jnp.add, carry, value_and_grad(*micro_batch)), None

        keys = self._dropout_keys(opt_state, batch["tokens"].shape[0])
        first = jax.tree.map(lambda x: x[0], (batch, keys))
        if batch["tokens"].shape[0] == 1:
            (loss, numbers), grads = value_and_grad(*first)
        else:
            _, shares = jax.eval_shape(loss_of, trainable, *first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (jnp.float32(0), shares))
            zeros = zeros, jax.tree.map(jnp.zeros_like, trainable)
            ((loss, numbers), grads), _ = jax.lax.scan(accumulate, zeros, (batch, keys))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.trainable)
        updates, opt_state = self.optimizer.update(grads, opt_state, trainable, shardings=shardings)
        real = batch["segment_ids"] > 0
        metrics = {
            "loss": loss,
            **numbers,
            "grad_norm": optax.tree.norm(grads),
            "targets": jnp.maximum(batch["loss_mask"].sum(dtype=jnp.float32), 1.0),
            "codes": self._is_code(batch).sum(dtype=jnp.float32),
            "fill": jnp.mean(real),
            # How many tokens one attends to, itself included: positions restart in every clip.
            "context": jnp.mean(batch["positions"] + 1, where=real),
        }
        return optax.apply_updates(trainable, updates), opt_state, metrics

    def _dropout_keys(self, opt_state, accumulation):
        """A key for each micro-batch, or None. They follow from the updates that the optimizer
        counts, so a resumed run draws the same.
        """
        if self.adapters is None or not self.adapters.dropout:
            return None
        (_, updates), *_ = optax.tree.get_all_with_path(opt_state, "count")
        return jax.random.split(
            jax.random.fold_in(jax.random.key(self.seed), updates), accumulation
        )
