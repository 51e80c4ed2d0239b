"""PEFT's `adapter_config.json` of a LoRA adapter, read to the last field: each is honoured, known
to mean nothing for the logits, or refused by name.
"""

import re
from pathlib import Path
from typing import Any

from llasa_jax.convert.names import LAYER
from llasa_jax.errors import UserError
from llasa_jax.model.axes import INPUTS, LAYER_AXES
from llasa_jax.model.config import AdapterConfig, ModelConfig
from llasa_jax.model.lora import adapter_config
from llasa_jax.model.settings import LoraSettings

TARGETS = {name: LAYER[name].rpartition(".")[2] for name in INPUTS if name in LAYER} | {
    "embed": "embed_tokens",
    "head": "lm_head",
}
# PEFT's names of whole modules match whatever ends in them.
WHOLE = {
    "norms": ("input_layernorm", "post_attention_layernorm", "norm"),
    "embed": ("embed_tokens",),
    "head": ("lm_head",),
}
# What is read, with the type of each.
NUMBER = (int, float)
TYPES: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": NUMBER,
    "lora_dropout": NUMBER,
    "use_rslora": (bool,),
    "base_model_name_or_path": (str, type(None)),
    "target_modules": (list, str),
    "modules_to_save": (list, type(None)),
    "layers_to_transform": (list, int, type(None)),
    "layers_pattern": (list, str, type(None)),
    "trainable_token_indices": (list, dict, type(None)),
    "ensure_weight_tying": (bool,),
}
# Of no effect on the logits: bookkeeping, and settings of what `init_lora_weights` does.
HARMLESS = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
}
# How the factors began, where the base's weights stay what they are. PiSSA, OLoRA, LoftQ, CorDA and
# LoRA-GA take the first factors' product out of the base: such an adapter is one of another base.
INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def read_config(
    values: dict[str, Any], config: ModelConfig, where: Path
) -> tuple[AdapterConfig, set[tuple[str, int | None]]]:
    """The adapter that a config describes, for a model of this geometry, and which matrices have
    factors: our names with the layer (None for tables). UserError names `where`, the field, and why
    it is refused.
    """
    if values.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is {values.get('peft_type')!r}, and only LORA is read")
    for field, value in values.items():
        if field in TYPES:
            kinds = TYPES[field]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                raise UserError(f"{where}: {field} is {value!r}, which it cannot be; correct it")
        elif field == "init_lora_weights":
            _check_init(value, where)
        elif field == "bias":
            if value != "none":
                raise UserError(
                    f"{where}: bias is {value!r}, which is not done here; only 'none' is read"
                )
        elif field not in HARMLESS and value not in (None, False, [], {}):
            raise UserError(
                f"{where}: {field} is {value!r}, which is not done here; only adapters without it"
                " are read"
            )
    if values.get("r", 8) < 1:
        raise UserError(f"{where}: r is {values['r']}, which is no adapter; correct it")
    matrices = _targets(values, config, where)
    modules = _modules(values, config, where)
    tokens = _tokens(values, config, where)
    settings = LoraSettings(
        rank=values.get("r", 8),
        alpha=values.get("lora_alpha", 8),
        dropout=values.get("lora_dropout", 0.0),
        targets=sorted({name for name, _ in matrices}),
        rslora=values.get("use_rslora", False),
        train_also=[*modules, *map(str, tokens)],
    )
    try:
        adapters = adapter_config(settings, config, {str(token): token for token in tokens})
    except UserError as error:
        raise UserError(f"{where} asks for what this model cannot have: {error}") from None
    assert adapters is not None  # the rank is not 0
    return adapters, matrices


def _check_init(value: object, where: Path) -> None:
    if isinstance(value, str | bool | None) and value in INITS:
        return
    raise UserError(
        f"{where}: init_lora_weights is {value!r}, which changes the base's weights, so this"
        " adapter alone is not what was trained; save it again with PEFT's"
        " save_pretrained(FOLDER, path_initial_model_for_weight_conversion=INITIAL_ADAPTER), which"
        " makes a plain LoRA of it"
    )


def _targets(
    values: dict[str, Any], config: ModelConfig, where: Path
) -> set[tuple[str, int | None]]:
    """The matrices that PEFT puts adapters on: as `check_target_module_exists` there."""
    targets = values.get("target_modules")
    available = ", ".join(TARGETS.values())
    if targets is None:
        raise UserError(f"{where}: target_modules is missing; name some of {available}")
    names: dict[str, tuple[str, int | None]] = {
        f"model.layers.{layer}.{LAYER[name]}": (name, layer)
        for name in TARGETS
        if name in LAYER_AXES
        for layer in range(config.num_hidden_layers)
    }
    names |= {"model.embed_tokens": ("embed", None), "lm_head": ("head", None)}
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except (re.error, RecursionError) as error:
            raise UserError(
                f"{where}: target_modules is {targets[:200]!r}, which is not a regular expression"
                f" ({error}); correct it"
            ) from None
        if targets.lower() == "all-linear":
            found = {name for name in names if names[name][0] in LAYER_AXES}
        else:
            found = {name for name in names if pattern.fullmatch(name)}
    else:
        for target in targets:
            if not isinstance(target, str) or not any(map(_suffix_of(target), names)):
                raise UserError(
                    f"{where}: the target {str(target)[:200]} is no part of this model; there are"
                    f" {available}"
                )
        found = {
            name
            for name in names
            if name in targets
            or (any(name.endswith(f".{target}") for target in targets) and _in_layers(name, values))
        }
    if not found:
        raise UserError(
            f"{where}: target_modules with layers_to_transform matches no part of this model;"
            f" there are {available}"
        )
    return {names[name] for name in found}


def _suffix_of(target: str):
    return lambda name: name == target or name.endswith(f".{target}")


def _in_layers(name: str, values: dict[str, Any]) -> bool:
    """Whether `layers_to_transform`, if given, has the layer of a module."""
    layers = values.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = values.get("layers_pattern") or ["[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if match:
            number = int(match[1])
            return number in layers if isinstance(layers, list) else number == layers
    return False


def _modules(values: dict[str, Any], config: ModelConfig, where: Path) -> list[str]:
    """Our names of the modules that are trained whole."""
    whole = values.get("modules_to_save") or []
    if not all(isinstance(name, str) for name in whole):
        raise UserError(f"{where}: modules_to_save is {whole!r}; name modules in it")
    last = {name.rpartition(".")[2] for name in whole}
    modules = [module for module, names in WHOLE.items() if last & set(names)]
    tables = {"embed", "head"} & set(modules)
    if not config.tie_word_embeddings:
        return modules
    tying = values.get("ensure_weight_tying", False)
    if tying and {"embed_tokens", "lm_head"} & {
        name.rpartition(".")[2] for name in _listed(values.get("target_modules"))
    }:
        raise UserError(
            f"{where}: ensure_weight_tying with a table among target_modules ties its factors to"
            " the other table, which is not done here; merge the adapter into its base with PEFT's"
            " merge_and_unload and import that model"
        )
    if len(tables) == 1 and not tying:
        # PEFT trains a copy of one table; the other stays what the base has.
        raise UserError(
            f"{where}: modules_to_save has only {WHOLE[tables.pop()][0]}, which this model ties to"
            " the other table, and ensure_weight_tying is false, so that the two are no longer"
            " one; merge the adapter into its base with PEFT's merge_and_unload and import that"
            " model"
        )
    return [module for module in modules if module != "head"] + (
        ["embed"] if tables == {"head"} else []
    )


def _listed(targets: object) -> list[str]:
    return [str(target) for target in targets] if isinstance(targets, list) else []


def _tokens(values: dict[str, Any], config: ModelConfig, where: Path) -> list[int]:
    """The tokens whose rows of the tables are trained."""
    tokens = values.get("trainable_token_indices") or []
    lists = list(tokens.values()) if isinstance(tokens, dict) else [tokens]
    for ids in lists:
        if not isinstance(ids, list) or not all(
            type(token) is int and 0 <= token < config.vocab_size for token in ids
        ):
            raise UserError(
                f"{where}: trainable_token_indices is {str(tokens)[:200]}, but must be ids below"
                f" {config.vocab_size}; use the adapter's own base"
            )
    if len({tuple(sorted(ids)) for ids in lists}) > 1:
        raise UserError(
            f"{where}: trainable_token_indices differ between the tables; only the same in both are"
            " read"
        )
    return lists[0] if lists else []
