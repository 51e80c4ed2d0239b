"""The letters that name every dimension of the model, in tensor names, einsum strings and the
sharding table.

B rows of a batch, T tokens, S cache slots, L layers, V vocabulary (padded), D model width, N query
heads, K key-value heads, H head width, F MLP width, R rank of an adapter, X rows of the tables that
are trained by themselves.
"""

from llasa_jax.model.config import AdapterConfig, ModelConfig

LAYER_AXES = {
    "attn_norm": "D",
    "q": "NHD",
    "k": "KHD",
    "v": "KHD",
    "o": "DNH",
    "mlp_norm": "D",
    "gate": "FD",
    "up": "FD",
    "down": "DF",
}
TABLE_AXES = "VD"
# The letters that a product with a weight sums over; the others are those of its result.
INPUTS = {
    "q": "D",
    "k": "D",
    "v": "D",
    "o": "NH",
    "gate": "D",
    "up": "D",
    "down": "F",
    "embed": "V",
    "head": "D",
}


def sizes(config: ModelConfig, adapters: AdapterConfig | None = None) -> dict[str, int]:
    """What each letter of the alphabet stands for in this model."""
    of_adapters = (
        {"R": adapters.rank, "X": len(adapters.token_ids), "B": adapters.batch} if adapters else {}
    )
    return {
        "L": config.num_hidden_layers,
        "V": config.padded_vocab_size,
        "D": config.hidden_size,
        "N": config.num_attention_heads,
        "K": config.num_key_value_heads,
        "H": config.head_dim,
        "F": config.intermediate_size,
    } | of_adapters


def parameter_axes(config: ModelConfig, adapters: AdapterConfig | None = None) -> dict:
    """The parameter tree with each weight's dimensions, as letters, in place of the weight."""
    tables = ("embed",) if config.tie_word_embeddings else ("embed", "head")
    tree = {
        "layers": {name: f"L{axes}" for name, axes in LAYER_AXES.items()},
        "norm": "D",
    } | dict.fromkeys(tables, TABLE_AXES)
    return tree | (adapter_axes(adapters, tables) if adapters else {})


def adapter_axes(adapters: AdapterConfig, tables: tuple[str, ...]) -> dict:
    """What adapters add to the parameter tree: `lora`, two factors per target, PEFT's lora_A [rank,
    in] and lora_B [out, rank]; and `rows`, replacement rows for each of `tables`.

    With a batch also `choice`: for each row of the batch, the weight of every rank and of every
    replacement row.
    """
    lora = {}
    for name in adapters.targets:
        layer, inner, outer = ("L" if name in LAYER_AXES else ""), INPUTS[name], outputs(name)
        lora[name] = {"a": f"{layer}R{inner}", "b": f"{layer}{outer}R"}
    added = ({"lora": lora} if lora else {}) | (
        {"rows": dict.fromkeys(tables, "XD")} if adapters.token_ids else {}
    )
    return added | ({"choice": {"lora": "BR", "rows": "BX"}} if adapters.batch else {})


def outputs(name: str) -> str:
    """The letters of the result of a product with a weight."""
    return LAYER_AXES.get(name, TABLE_AXES).replace(INPUTS[name], "")
