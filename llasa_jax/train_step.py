"""One step of training: a jitted function over sharded parameters, optimizer state and a batch of packed rows."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llasa_jax.attention import choose_attention
from llasa_jax.config import ModelConfig
from llasa_jax.loss import chunked_cross_entropy, chunked_ranks
from llasa_jax.model import Llama
from llasa_jax.offload import place_state
from llasa_jax.settings import ModelSettings
from llasa_jax.sharding import ROWS, MeshLayout, abstract_params


class TrainStep:
    """The compiled train and validation steps of one model on one mesh.

    A batch is a dict of arrays [accumulation, rows, length] as `batching.batches` makes them, sharded as `batch_sharding`. `code_ids` are
    the ids of the speech codes, whose share and accuracy are counted. `offload` keeps the optimizer's state on the host, for an optimizer
    made with that setting.
    """

    BATCH = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32) | {"loss_mask": jnp.bool_}

    def __init__(
        self,
        config: ModelConfig,
        settings: ModelSettings,
        optimizer: optax.GradientTransformation,
        mesh: Mesh,
        code_ids: range = range(0),
        offload: bool = False,
    ):
        self.config, self.settings, self.mesh, self.code_ids = config, settings, mesh, code_ids
        self.optimizer = optax.with_extra_args_support(optimizer)
        options = {
            "dtype": jnp.dtype(settings.dtype),
            "remat": settings.remat,
            "attention": choose_attention(settings.attention, mesh),
            "layout": MeshLayout(mesh),
        }
        model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0), **options))
        self.graphdef = nnx.graphdef(model)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.batch_sharding = NamedSharding(mesh, PartitionSpec(None, *ROWS))
        self.params = abstract_params(config, mesh, jnp.dtype(settings.param_dtype))
        self.opt_state = place_state(jax.eval_shape(optimizer.init, self.params), self.params, offload=offload)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, (self.params, self.opt_state))
        self.init = jax.jit(optimizer.init, out_shardings=shardings[1])
        self.train = jax.jit(self._train, donate_argnums=(0, 1), out_shardings=(*shardings, self.replicated))
        self.validate = jax.jit(self._validate, out_shardings=self.replicated)

    def compile(self, accumulation: int, rows: int, length: int) -> jax.stages.Compiled:
        """The train step for batches of this shape and the platform of the mesh's devices, which need not be at hand."""

        shape, sharding = (accumulation, rows, length), self.batch_sharding
        batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in self.BATCH.items()}
        platform = self.mesh.devices.flat[0].platform
        lowered = self.train.trace(self.params, self.opt_state, batch).lower(
            lowering_platforms=("cuda" if platform == "gpu" else platform,)
        )
        return lowered.compile()

    def _hidden(self, params, micro_batch):
        """The rows of one micro-batch [rows, length], their hidden states and the output table."""
        rows = jax.lax.with_sharding_constraint(micro_batch, NamedSharding(self.mesh, ROWS))
        model = nnx.merge(self.graphdef, params)
        return rows, model(rows["tokens"], rows["positions"], rows["segment_ids"]), model.output_table

    def _sums(self, params, micro_batch):
        """Summed loss (nats) and correct predictions of one micro-batch [rows, length]."""
        rows, hidden, table = self._hidden(params, micro_batch)
        sizes = {"vocab_size": self.config.vocab_size, "chunk": self.settings.loss_chunk}
        return chunked_cross_entropy(hidden, table, rows["targets"], rows["loss_mask"], **sizes, mesh=self.mesh)

    def _is_code(self, batch):
        return batch["loss_mask"] & (batch["targets"] >= self.code_ids.start) & (batch["targets"] < self.code_ids.stop)

    def _validate(self, params, batch):
        """Sums over a whole batch without gradients, so that many batches average exactly: nats and correct predictions of all
        targets; of the codes among them, how many are the likeliest token, and among the ten likeliest."""

        def sums(micro_batch):
            rows, hidden, table = self._hidden(params, micro_batch)
            sizes = {"vocab_size": self.config.vocab_size, "chunk": self.settings.loss_chunk}
            nll, rank = chunked_ranks(hidden, table, rows["targets"], **sizes, mesh=self.mesh)
            learned, code = rows["loss_mask"], self._is_code(rows)
            counts = {"correct": learned & (rank == 0), "code_top1": code & (rank == 0), "code_top10": code & (rank < 10)}
            counts |= {"targets": learned, "codes": code}
            return {"nats": jnp.sum(jnp.where(learned, nll, 0.0))} | {name: jnp.sum(x, dtype=jnp.float32) for name, x in counts.items()}

        return jax.tree.map(jnp.sum, jax.lax.map(sums, batch))

    def _train(self, params, opt_state, batch):
        """The mean over all targets of the whole batch, whatever micro-batch or device they are on, and one update for it."""
        targets = jnp.maximum(batch["loss_mask"].sum(dtype=jnp.float32), 1.0)

        def mean_loss(params, micro_batch):
            nats, correct = self._sums(params, micro_batch)
            return nats / targets, correct

        def value_and_grad(micro_batch):
            (loss, correct), grads = jax.value_and_grad(mean_loss, has_aux=True)(params, micro_batch)
            return loss, correct, grads

        def accumulate(carry, micro_batch):
            return jax.tree.map(jnp.add, carry, value_and_grad(micro_batch)), None

        if batch["tokens"].shape[0] == 1:
            loss, correct, grads = value_and_grad(jax.tree.map(lambda x: x[0], batch))
        else:
            zeros = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
            (loss, correct, grads), _ = jax.lax.scan(accumulate, zeros, batch)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.params)
        updates, opt_state = self.optimizer.update(grads, opt_state, params, shardings=shardings)
        real = batch["segment_ids"] > 0
        metrics = {
            "loss": loss,
            "accuracy": correct / targets,
            "grad_norm": optax.tree.norm(grads),
            "targets": targets,
            "codes": self._is_code(batch).sum(dtype=jnp.float32),
            "fill": jnp.mean(real),
            # How many tokens one attends to, itself included: positions restart in every clip.
            "context": jnp.mean(batch["positions"] + 1, where=real),
        }
        return optax.apply_updates(params, updates), opt_state, metrics
