"""LoRA: which of a model's parameters are trained and which stay frozen, and where adapters begin.

The arithmetic is in `llasa_jax.model.llama`. Reference: PEFT's `LoraModel`, whose factors, scaling
and start these are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from llasa_jax.errors import UserError
from llasa_jax.model.axes import INPUTS, LAYER_AXES, TABLE_AXES, outputs, parameter_axes, sizes
from llasa_jax.model.config import AdapterConfig, ModelConfig
from llasa_jax.model.settings import LoraSettings

# What can be trained whole, and the parameters that it is.
MODULES = {"norms": ("attn_norm", "mlp_norm", "norm"), "embed": ("embed",), "head": ("head",)}
# Beyond this many, rows by themselves cost more than they save.
MOST_ROWS = 1024


def adapter_config(
    settings: LoraSettings, config: ModelConfig, token_ids: dict[str, int]
) -> AdapterConfig | None:
    """The adapters that `settings` describe, for a model of this geometry with the vocabulary
    `token_ids`; None for full finetuning.

    UserError for an unknown target, a rank larger than a matrix has, and combinations of targets
    and `train_also` that cannot be trained.
    """
    if not settings.rank:
        if settings != LoraSettings():
            raise UserError(
                "lora.rank is 0, which trains the whole model, but other lora settings are given;"
                " give a rank of at least 1"
            )
        return None
    if not settings.targets:
        raise UserError(f"lora.targets is empty; name some of {', '.join(INPUTS)}")
    for name in settings.targets:
        if name not in INPUTS:
            raise UserError(
                f"the target {name} of lora.targets does not exist; there are {', '.join(INPUTS)}"
            )
        tied = name == "head" and config.tie_word_embeddings
        if name in MODULES and {name, "embed" if tied else name} & {*settings.train_also}:
            raise UserError(
                f"the target {name} of lora.targets is trained whole by lora.train_also; take it"
                " out of one"
            )
        size, most = sizes(config), []
        for letters in (INPUTS[name], outputs(name)):
            most.append(math.prod(size[letter] for letter in letters))
        if not 0 < settings.rank <= min(most):
            raise UserError(
                f"lora.rank is {settings.rank}, but {name} is a matrix of {most[1]} x {most[0]};"
                f" choose 1 to {min(most)}"
            )
    if not 0 <= settings.dropout < 1:
        raise UserError(
            f"lora.dropout is {settings.dropout}; give a share of at least 0 and under 1"
        )
    modules, tokens = (
        tuple(x for x in settings.train_also if (x in MODULES) == whole) for whole in (True, False)
    )
    if "head" in modules and config.tie_word_embeddings:
        raise UserError(
            "lora.train_also has head, which this model ties to the embedding; name embed, which"
            " trains both"
        )
    unknown = [token for token in tokens if token not in token_ids]
    if unknown:
        raise UserError(
            f"lora.train_also has {unknown[0]}, which is neither {', '.join(MODULES)} nor a token"
            " of the model's tokenizer"
        )
    if tokens and {"embed", "head"} & {*modules, *settings.targets}:
        raise UserError(
            "lora.train_also trains rows of the tables, and a table is trained or adapted as well;"
            " leave one of them out"
        )
    if len(tokens) > MOST_ROWS:
        raise UserError(
            f"lora.train_also names {len(tokens)} tokens, more than {MOST_ROWS}; train the whole"
            " tables, embed and head"
        )
    ids = tuple(sorted({token_ids[token] for token in tokens}))
    targets = tuple(name for name in INPUTS if name in settings.targets)
    return AdapterConfig(
        targets, settings.rank, settings.alpha, settings.rslora, settings.dropout, modules, ids
    )


def split(params: dict, adapters: AdapterConfig | None) -> tuple[dict, dict]:
    """A parameter tree, or one in its shape, as two: what is frozen and what is trained. Without
    adapters all of it is trained.
    """
    if adapters is None:
        return {}, params
    trained = {name for module in adapters.modules for name in MODULES[module]}
    frozen, trainable = {}, {name: params[name] for name in ("lora", "rows") if name in params}
    for name, value in params.items():
        if name == "layers":
            parts = [
                {key: leaf for key, leaf in value.items() if (key in trained) == learns}
                for learns in (False, True)
            ]
            frozen[name] = parts[0]
            trainable |= {name: parts[1]} if parts[1] else {}
        elif name not in trainable:
            (trainable if name in trained else frozen)[name] = value
    return frozen, trainable


def join(frozen: dict, trainable: dict) -> dict:
    """The whole tree that `split` took apart."""
    both = frozen | trainable
    if "layers" in frozen and "layers" in trainable:
        both["layers"] = frozen["layers"] | trainable["layers"]
    return both


@dataclass(frozen=True)
class Adapter:
    """What LoRA trained for one base, without it: `params` as the trainable half of `split`, in
    numpy; `prompt`, where it is known, is the `PromptSettings` that it was trained with, as a dict.
    """

    config: AdapterConfig
    params: dict
    prompt: dict | None = None


def count(config: ModelConfig, adapters: AdapterConfig | None) -> tuple[int, int]:
    """How many numbers are trained, and how many are frozen, as PEFT counts them: the tables
    without their padding.
    """
    size = sizes(config, adapters) | {"V": config.vocab_size}
    frozen, trained = split(parameter_axes(config, adapters), adapters)
    trained_count, frozen_count = (
        sum(math.prod(size[letter] for letter in axes) for axes in jax.tree.leaves(tree))
        for tree in (trained, frozen)
    )
    return trained_count, frozen_count


def put_on_devices(params: dict, like: dict) -> dict:
    """A tree of numpy arrays as arrays on devices, with the dtypes and shardings of `like`."""

    def put(array, target):
        return jax.make_array_from_callback(
            array.shape, target.sharding, lambda index: array[index].astype(target.dtype)
        )

    def below(tree, other):
        return {
            name: below(x, other[name]) if isinstance(x, dict) else put(x, other[name])
            for name, x in tree.items()
        }

    return below(params, like)


def new_adapters(params: dict, abstract: dict, adapters: AdapterConfig, seed: int) -> dict:
    """The initial `lora` and `rows`, with which the model computes what the base does.

    `params` is the base's tree; `abstract` is the whole model's, which gives shapes, dtypes and
    shardings. As in PEFT: A is kaiming-uniform and B zero; for an embedding A is zero and B normal;
    rows start as copies of the table's rows.
    """
    wanted = {name: abstract[name] for name in ("lora", "rows") if name in abstract}

    @partial(jax.jit, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, wanted))
    def make(key, tables):
        made: dict[str, dict] = {"lora": {}} if adapters.targets else {}
        for number, name in enumerate(adapters.targets):
            a, b = abstract["lora"][name]["a"], abstract["lora"][name]["b"]
            key_of = jax.random.fold_in(key, number)
            if name == "embed":
                made["lora"][name] = {
                    "a": jnp.zeros(a.shape, a.dtype),
                    "b": jax.random.normal(key_of, b.shape, b.dtype),
                }
                continue
            # torch's kaiming_uniform_ with a = sqrt(5): a bound of 1 / sqrt(the width of what goes
            # in)
            width = math.prod(a.shape[1 + (name in LAYER_AXES) :])
            drawn = jax.random.uniform(key_of, a.shape, a.dtype, -(width**-0.5), width**-0.5)
            made["lora"][name] = {"a": drawn, "b": jnp.zeros(b.shape, b.dtype)}
        if adapters.token_ids:
            ids = jnp.array(adapters.token_ids)
            made["rows"] = {
                name: jnp.take(tables[name], ids, axis=0).astype(leaf.dtype)
                for name, leaf in abstract["rows"].items()
            }
        return made

    return make(jax.random.key(seed), {name: params[name] for name in abstract.get("rows", ())})


def side_by_side(
    adapters: Sequence[Adapter], of_rows: Sequence[int | None], config: ModelConfig
) -> Adapter:
    """Several adapters of one base as one, for a batch in which row i uses the adapter
    `of_rows[i]`, or none.

    Ranks are concatenated; for each row of the batch only its own adapter's ranks have weights
    other than 0. UserError where an adapter has whole modules trained.
    """
    for number, adapter in enumerate(adapters):
        if adapter.config.modules:
            raise UserError(
                f"adapter {number + 1} has whole modules trained"
                f" ({', '.join(adapter.config.modules)}), so it cannot share a batch with others;"
                " use it alone, or merge it"
            )
    configs = [adapter.config for adapter in adapters]
    targets = tuple(name for name in INPUTS if any(name in each.targets for each in configs))
    rank = sum(each.rank for each in configs)
    token_ids = tuple(token for each in configs for token in each.token_ids)
    together = AdapterConfig(targets, rank, alpha=rank, token_ids=token_ids, batch=len(of_rows))
    size = sizes(config, together)
    axes = {
        name: tree
        for name, tree in parameter_axes(config, together).items()
        if name in ("lora", "rows", "choice")
    }
    params = jax.tree.map(
        lambda letters: np.zeros([size[letter] for letter in letters], np.float32), axes
    )
    first_rank = first_row = 0
    for number, adapter in enumerate(adapters):
        own = adapter.config
        # This adapter's part of the concatenated ranks, and of the concatenated token rows.
        ranks = slice(first_rank, first_rank + own.rank)
        token_rows = slice(first_row, first_row + len(own.token_ids))
        for name in own.targets:
            for factor, letters in axes["lora"][name].items():
                part = [slice(None)] * len(letters)
                part[letters.index("R")] = ranks
                params["lora"][name][factor][tuple(part)] = adapter.params["lora"][name][factor]
        for name, values in adapter.params.get("rows", {}).items():
            params["rows"][name][token_rows] = values
        for row, chosen in enumerate(of_rows):
            params["choice"]["lora"][row, ranks] = own.scale * (chosen == number)
            params["choice"]["rows"][row, token_rows] = chosen == number
        first_rank, first_row = ranks.stop, token_rows.stop
    return Adapter(together, params)


def merged(path: str, piece: np.ndarray, start: int, adapter: Adapter) -> np.ndarray:
    """A piece of the base's parameter `path` ("layers.q", "embed"), its layers or rows from `start`
    on, with the adapter folded in.

    Float32 where the adapter touches it, else the piece itself.
    """
    name = path.removeprefix("layers.")
    trained, stop = adapter.params, start + len(piece)
    whole = trained.get("layers", {}).get(name) if path != name else trained.get(name)
    if whole is not None:
        return whole[start:stop]
    if name in adapter.config.targets:
        factors, scale = trained["lora"][name], np.float32(adapter.config.scale)
        inner, outer, axes = INPUTS[name], outputs(name), LAYER_AXES.get(name, TABLE_AXES)
        layer = "L" if name in LAYER_AXES else ""
        a, b = factors["a"], factors["b"]
        if layer:
            a, b = a[start:stop], b[start:stop]
        elif name == "embed":
            a = a[:, start:stop]
        else:
            b = b[start:stop]
        piece = piece.astype(np.float32) + scale * np.einsum(
            f"{layer}R{inner},{layer}{outer}R->{layer}{axes}", a, b, optimize=True
        )
    # A tied head's rows are the embedding's
    rows = trained.get("rows", {})
    if name in ("embed", "head") and rows:
        piece = piece.astype(np.float32)
        for number, token in enumerate(adapter.config.token_ids):
            if start <= token < stop:
                piece[token - start] = rows.get(name, rows["embed"])[number]
    return piece
