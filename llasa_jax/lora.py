"""LoRA: which of a model's parameters are trained and which stay frozen, and where adapters begin.

The arithmetic is in `llasa_jax.model`. Reference: PEFT's `LoraModel`, whose factors, scaling and start these are.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from llasa_jax.config import AdapterConfig, ModelConfig
from llasa_jax.errors import UserError
from llasa_jax.model import INPUTS, LAYER_AXES, outputs, sizes
from llasa_jax.settings import LoraSettings

# What can be trained whole, and the parameters that it is.
MODULES = {"norms": ("attn_norm", "mlp_norm", "norm"), "embed": ("embed",), "head": ("head",)}
# Beyond this many, rows by themselves cost more than they save.
MOST_ROWS = 1024


def adapter_config(settings: LoraSettings, config: ModelConfig, token_ids: dict[str, int]) -> AdapterConfig | None:
    """What `settings` ask for in a model of this geometry, with the vocabulary `token_ids`; None for full finetuning.

    UserError for a target that does not exist, a rank that no matrix has, and what cannot be trained besides.
    """
    if not settings.rank:
        if settings != LoraSettings():
            raise UserError("lora.rank is 0, which trains the whole model, but other lora settings are given; give a rank of at least 1")
        return None
    if not settings.targets:
        raise UserError(f"lora.targets is empty; name some of {', '.join(INPUTS)}")
    for name in settings.targets:
        if name not in INPUTS or (name in MODULES and name in settings.train_also):
            why = (
                "is trained whole by lora.train_also; take it out of one"
                if name in INPUTS
                else f"does not exist; there are {', '.join(INPUTS)}"
            )
            raise UserError(f"the target {name} of lora.targets {why}")
        size, most = sizes(config), []
        for letters in (INPUTS[name], outputs(name)):
            most.append(math.prod(size[letter] for letter in letters))
        if not 0 < settings.rank <= min(most):
            raise UserError(f"lora.rank is {settings.rank}, but {name} is a matrix of {most[1]} x {most[0]}; choose 1 to {min(most)}")
    if not 0 <= settings.dropout < 1:
        raise UserError(f"lora.dropout is {settings.dropout}; give a share of at least 0 and under 1")
    modules, tokens = (tuple(x for x in settings.train_also if (x in MODULES) == whole) for whole in (True, False))
    if "head" in modules and config.tie_word_embeddings:
        raise UserError("lora.train_also has head, which this model ties to the embedding; name embed, which trains both")
    unknown = [token for token in tokens if token not in token_ids]
    if unknown:
        raise UserError(f"lora.train_also has {unknown[0]}, which is neither {', '.join(MODULES)} nor a token of the model's tokenizer")
    if tokens and {"embed", "head"} & {*modules, *settings.targets}:
        raise UserError("lora.train_also trains rows of the tables, and a table is trained or adapted as well; leave one of them out")
    if len(tokens) > MOST_ROWS:
        raise UserError(f"lora.train_also names {len(tokens)} tokens, more than {MOST_ROWS}; train the whole tables, embed and head")
    scale = settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)
    rows = tuple(sorted({token_ids[token] for token in tokens}))
    return AdapterConfig(tuple(name for name in INPUTS if name in settings.targets), settings.rank, scale, settings.dropout, modules, rows)


def split(params: dict, adapters: AdapterConfig | None) -> tuple[dict, dict]:
    """A parameter tree, or one in its shape, as two: what is frozen and what is trained. Without adapters all of it is trained."""
    if adapters is None:
        return {}, params
    trained = {name for module in adapters.modules for name in MODULES[module]}
    frozen, trainable = {}, {name: params[name] for name in ("lora", "rows") if name in params}
    for name, value in params.items():
        if name == "layers":
            parts = [{key: leaf for key, leaf in value.items() if (key in trained) == learns} for learns in (False, True)]
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


def new_adapters(params: dict, abstract: dict, adapters: AdapterConfig, seed: int) -> dict:
    """`lora` and `rows` as training begins with them: such that the model is still what it was.

    `params` is the base's tree, `abstract` the whole model's, whose shapes, types and shardings they get. As PEFT: A is
    kaiming-uniform and B zero; for an embedding A is zero and B normal; rows are the table's own.
    """
    wanted = {name: abstract[name] for name in ("lora", "rows") if name in abstract}

    @partial(jax.jit, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, wanted))
    def make(key, tables):
        made = {"lora": {}} if adapters.targets else {}
        for number, name in enumerate(adapters.targets):
            a, b = abstract["lora"][name]["a"], abstract["lora"][name]["b"]
            key_of = jax.random.fold_in(key, number)
            if name == "embed":
                made["lora"][name] = {"a": jnp.zeros(a.shape, a.dtype), "b": jax.random.normal(key_of, b.shape, b.dtype)}
                continue
            # torch's kaiming_uniform_ with a = sqrt(5): a bound of 1 / sqrt(the width of what goes in)
            width = math.prod(a.shape[1 + (name in LAYER_AXES) :])
            drawn = jax.random.uniform(key_of, a.shape, a.dtype, -(width**-0.5), width**-0.5)
            made["lora"][name] = {"a": drawn, "b": jnp.zeros(b.shape, b.dtype)}
        if adapters.rows:
            ids = jnp.array(adapters.rows)
            made["rows"] = {name: jnp.take(tables[name], ids, axis=0).astype(leaf.dtype) for name, leaf in abstract["rows"].items()}
        return made

    return make(jax.random.key(seed), {name: params[name] for name in abstract.get("rows", ())})
