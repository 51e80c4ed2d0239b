"""LoRA runs from end to end: trained, resumed, exported to PEFT and merged, begun from PEFT's
adapters, spoken with side by side.
"""

import dataclasses
import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from peft import LoraConfig, PeftModel, get_peft_model
from reference import hf_llama
from tiny_run import lines_of, losses, make_clips, settings_for
from transformers import AutoModelForCausalLM

from llasa_jax.convert import model_folder
from llasa_jax.convert.export_hf import export_hf
from llasa_jax.convert.import_hf import import_hf
from llasa_jax.convert.peft_adapter import open_adapter
from llasa_jax.convert.verify import verify
from llasa_jax.demo.tiny_llama import make_tiny_tokenizer
from llasa_jax.errors import UserError
from llasa_jax.finetune import begin_with
from llasa_jax.generate.decode import generate_codes
from llasa_jax.generate.sampling import SamplingSettings
from llasa_jax.generate.speaker import load
from llasa_jax.model.axes import parameter_axes, sizes
from llasa_jax.model.lora import adapter_config, split
from llasa_jax.model.settings import LoraSettings
from llasa_jax.model.sharding import make_mesh
from llasa_jax.train.loop import train

TOKENS = ["<|SPEECH_GENERATION_START|>", "<|SPEECH_GENERATION_END|>"]
EVERY_TARGET = ["q", "k", "v", "o", "gate", "up", "down", "embed", "head"]
# Tied as 1B and 3B are, then as 8B; what is adapted and trained besides.
KINDS = {
    "all": (
        False,
        LoraSettings(rank=4, alpha=8.0, targets=EVERY_TARGET, rslora=True, train_also=["norms"]),
    ),
    "tables": (True, LoraSettings(rank=4, alpha=8.0, targets=["q", "embed", "head"])),
    "rows": (True, LoraSettings(rank=4, alpha=32.0, train_also=TOKENS)),
    "whole": (True, LoraSettings(rank=4, targets=["v"], train_also=["embed"])),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A tied model and one that is not, in HF's format and ours."""
    folder = tmp_path_factory.mktemp("bases")
    tokenizer = make_tiny_tokenizer()
    for tied in (True, False):
        hf = folder / f"hf-{tied}"
        hf_llama(tied=tied, vocab=len(tokenizer), initializer_range=0.05).save_pretrained(hf)
        tokenizer.save_pretrained(hf)
        import_hf(str(hf), folder / f"ours-{tied}")
    return folder


def lora_settings(bases, out, kind, **changes):
    tied, lora = KINDS[kind] if isinstance(kind, str) else kind
    settings = settings_for(
        bases / f"ours-{tied}",
        out,
        train={"steps": 4, "save_every": 2, **changes.pop("train", {})},
        optimizer=changes.pop("optimizer", {"learning_rate": 5e-2}),
        mesh=changes.pop("mesh", {"data": 2, "fsdp": 2, "tensor": 2}),
        **changes,
    )
    return dataclasses.replace(settings, lora=lora)


@pytest.fixture(scope="module")
def trained(bases, tmp_path_factory):
    return train(
        lora_settings(bases, tmp_path_factory.mktemp("runs") / "rows", "rows"),
        [make_clips()],
        [make_clips()[:3]],
    )


def some_run(bases, folder, kind):
    """A LoRA run's folder as training leaves it, with all that is trained at work."""
    tied, lora = KINDS[kind]
    base = bases / f"ours-{tied}"
    config, origin = model_folder.read_description(base)
    adapters = adapter_config(lora, config, make_tiny_tokenizer().get_vocab())
    model_folder.copy_description(base, folder)
    told = {"base": str(base), "adapters": dataclasses.asdict(adapters)}
    model_folder.write_description(folder, config, origin | {"prompt": {}, "lora": told})
    rng = np.random.default_rng(0)
    size = sizes(config, adapters)
    _, axes = split(parameter_axes(config, adapters), adapters)
    params = jax.tree.map(
        lambda letters: rng.normal(0, 0.2, [size[letter] for letter in letters]).astype(np.float32),
        axes,
    )
    model_folder.save_params(folder / "checkpoints" / "1", params)
    return folder


def our_logits(folder, tokens, **options):
    graphdef, params, _, _ = load(folder, "float32", **options)
    return np.asarray(logits_of(graphdef, params, tokens))


@partial(jax.jit, static_argnums=0)
def logits_of(graphdef, params, tokens):
    model = nnx.merge(graphdef, params)
    return model.logits(
        model(
            tokens,
            jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
            jnp.ones_like(tokens),
        )
    )


def their_logits(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens).long()).logits.numpy()


def some_tokens(vocab, rows=2):
    tokens = np.random.default_rng(0).integers(0, vocab, (rows, 24)).astype(np.int32)
    tokens[:, 3:5] = make_tiny_tokenizer().convert_tokens_to_ids(TOKENS)
    return tokens


@pytest.mark.parametrize("kind", KINDS)
def test_out_to_peft_and_merged(kind, bases, tmp_path):
    run = some_run(bases, tmp_path / "run", kind)
    base = AutoModelForCausalLM.from_pretrained(bases / f"hf-{KINDS[kind][0]}")
    tokens = some_tokens(base.config.vocab_size)
    untouched = their_logits(base, tokens)
    ours = our_logits(run, tokens)
    export_hf(run, tmp_path / "adapter", lora="adapter")
    export_hf(run, tmp_path / "merged", lora="merge", verify=True)
    as_adapter = their_logits(PeftModel.from_pretrained(base, tmp_path / "adapter"), tokens)
    as_model = their_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tokens)
    assert np.abs(ours - untouched).max() > 1e-2
    np.testing.assert_allclose(as_adapter, ours, atol=1e-4)
    np.testing.assert_allclose(as_model, ours, atol=1e-4)


@pytest.mark.filterwarnings("ignore:the loss is")
def test_a_run_learns_keeps_only_what_it_trained_and_resumes(bases, trained, tmp_path):
    run = trained
    numbers = losses(run)
    assert numbers[4] < numbers[1] - 0.1
    assert [line["validation_loss"] for line in lines_of(run) if "validation_loss" in line]
    config, source = model_folder.read_description(run)
    adapters, base = model_folder.adapters_of(source)
    assert base == bases / "ours-True"
    stored = {path.name for path in (run / "checkpoints" / "4" / "params").iterdir()}
    layout = json.loads((run / "checkpoints" / "4" / "params" / "_METADATA").read_text())[
        "tree_metadata"
    ]
    assert {key.split("'")[1] for key in layout} == {"lora", "rows"}, stored
    about = model_folder.read_about(run, 4)
    assert about["base"] == str(base)
    # Stopped and gone on with, on another mesh: the same losses, dropout and all.
    settings = lora_settings(
        bases, tmp_path / "again", "rows", mesh={"data": 1, "fsdp": 4, "tensor": 2}
    )
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    again = train(settings, [make_clips()], [make_clips()[:3]])
    for step in (3, 4):
        np.testing.assert_allclose(losses(again)[step], numbers[step], rtol=1e-4)


def peft_adapter(bases, folder, tied=True, seed=0, change_all=False, **options):
    """An adapter made by PEFT alone, all of whose factors are at work."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(bases / f"hf-{tied}")
    options = {
        "r": 8,
        "lora_alpha": 32,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    } | options
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name or (change_all and weight.requires_grad):
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return model


def test_training_goes_on_from_peft(bases, tmp_path):
    """Upstream's kind: rank 8, alpha 32, dropout 0.1 on q and v."""
    theirs = peft_adapter(bases, tmp_path / "adapter")
    settings = lora_settings(
        bases,
        tmp_path / "run",
        (True, LoraSettings(init=str(tmp_path / "adapter"))),
        optimizer={"learning_rate": 1e-12},
    )
    settings, adapter = begin_with(settings)
    assert (settings.lora.rank, settings.lora.alpha, settings.lora.targets) == (8, 32, ["q", "v"])
    tokens = some_tokens(theirs.config.vocab_size)
    expected = their_logits(theirs, tokens)
    # With next to no learning rate what comes out is what went in.
    run = train(
        dataclasses.replace(settings, train=dataclasses.replace(settings.train, steps=1)),
        [make_clips()],
        adapter=adapter,
    )
    np.testing.assert_allclose(our_logits(run, tokens), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (
            False,
            {
                "target_modules": ["q_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"],
                "use_rslora": True,
                "r": 3,
            },
        ),
        (False, {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
        (True, {"trainable_token_indices": [5, 65_900]}),
    ],
)
def test_in_from_peft(bases, tied, options, tmp_path):
    theirs = peft_adapter(bases, tmp_path, tied, **options)
    tokens = some_tokens(theirs.config.vocab_size)
    tokens[:, :2] = (5, 65_900)
    ours = our_logits(
        bases / f"ours-{tied}", tokens, adapters=[open_adapter(tmp_path, bases / f"ours-{tied}")]
    )
    np.testing.assert_allclose(ours, their_logits(theirs, tokens), atol=1e-4)


@pytest.mark.parametrize(
    ("tied", "options"),
    [
        (True, {"target_modules": ["model.layers.1.self_attn.q_proj", "mlp.up_proj"]}),
        (True, {"layers_to_transform": [1]}),
        pytest.param(
            True, {"layers_to_transform": 0, "layers_pattern": "layers"}, marks=pytest.mark.soak
        ),
        pytest.param(
            True,
            {"target_modules": r".*layers\.[01]\.(self_attn\.(k|o)|mlp\.gate)_proj"},
            marks=pytest.mark.soak,
        ),
        (False, {"target_modules": "all-linear"}),
        pytest.param(True, {"init_lora_weights": "gaussian"}, marks=pytest.mark.soak),
        pytest.param(True, {"init_lora_weights": "orthogonal"}, marks=pytest.mark.soak),
        (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        pytest.param(
            True,
            {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
            marks=pytest.mark.soak,
        ),
        pytest.param(
            True,
            {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
            marks=pytest.mark.soak,
        ),
        pytest.param(
            True,
            {"trainable_token_indices": [5, 65_900], "ensure_weight_tying": True},
            marks=pytest.mark.soak,
        ),
        pytest.param(False, {"modules_to_save": ["embed_tokens"]}, marks=pytest.mark.soak),
        pytest.param(False, {"modules_to_save": ["lm_head"]}, marks=pytest.mark.soak),
        (True, {"target_modules": ["q_proj", "embed_tokens"]}),
        pytest.param(True, {"target_modules": ["q_proj", "lm_head"]}, marks=pytest.mark.soak),
    ],
)
def test_what_is_accepted_gives_pefts_logits(bases, tied, options, tmp_path):
    """All that is trained is changed, and PEFT itself loads what it saved."""
    theirs = peft_adapter(bases, tmp_path, tied, change_all=True, **options)
    tokens = some_tokens(theirs.config.vocab_size)
    base = AutoModelForCausalLM.from_pretrained(bases / f"hf-{tied}")
    expected = their_logits(PeftModel.from_pretrained(base, tmp_path), tokens)
    model = bases / f"ours-{tied}"
    ours = our_logits(model, tokens, adapters=[open_adapter(tmp_path, model)])
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert np.abs(ours - our_logits(model, tokens)).max() > 1e-2


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base's"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora', which changes the base's"),
        ({"modules_to_save": ["embed_tokens"]}, "has only embed_tokens, which this model ties"),
        ({"modules_to_save": ["lm_head"]}, "has only lm_head, which this model ties"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "weights of its own for embed_tokens"),
        (
            {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
            "ensure_weight_tying with a table among target_modules",
        ),
    ],
)
def test_what_a_tied_model_or_a_plain_base_cannot_have(bases, options, complaint, tmp_path):
    peft_adapter(bases, tmp_path, True, change_all=True, **options)
    with pytest.raises(UserError, match=complaint):
        open_adapter(tmp_path, bases / "ours-True")


def test_several_adapters_in_one_batch(bases, trained, tmp_path):
    base = bases / "ours-True"
    made = {
        "small": peft_adapter(bases, tmp_path / "small", r=2, seed=1),
        "wide": peft_adapter(
            bases,
            tmp_path / "wide",
            r=5,
            seed=2,
            target_modules=["v_proj", "up_proj", "embed_tokens", "lm_head"],
        ),
    }
    small, wide = (open_adapter(tmp_path / name, base) for name in made)
    adapters = [wide, None, open_adapter(trained, base), small, wide]
    tokens = some_tokens(model_folder.read_description(base)[0].vocab_size, rows=5)
    together = our_logits(base, tokens, adapters=adapters)
    for row, adapter in enumerate(adapters):
        alone = our_logits(base, tokens[row : row + 1], adapters=[adapter])
        np.testing.assert_allclose(together[row : row + 1], alone, atol=1e-5)
    np.testing.assert_allclose(together[3], their_logits(made["small"], tokens[3:4])[0], atol=1e-4)
    # And as they speak: token by token, from a cache.
    graphdef, params, prompter, _ = load(base, "float32", adapters=adapters)
    greedy = SamplingSettings(temperature=0)
    spoken = generate_codes(
        graphdef, params, [prompter.opening("word 1")] * 5, prompter.vocab, 12, greedy
    )
    graphdef, params, _, _ = load(base, "float32", adapters=[wide])
    (alone,) = generate_codes(
        graphdef, params, [prompter.opening("word 1")], prompter.vocab, 12, greedy
    )
    np.testing.assert_array_equal(spoken[0].codes, alone.codes)
    np.testing.assert_array_equal(spoken[4].codes, alone.codes)
    assert len({tuple(result.codes) for result in spoken}) == 4
    with pytest.raises(UserError, match=r"adapter 2 has whole modules trained \(embed\)"):
        load(
            base,
            "float32",
            adapters=[wide, open_adapter(some_run(bases, tmp_path / "whole", "whole"), base)],
        )


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"base_model_name_or_path": "HKUSTAudio/Llasa-3B"},
            "was made for HKUSTAudio/Llasa-3B and the model here is .*hf-True",
        ),
        (
            {"r": 4},
            (
                r"it has the misshapen .*q_proj.lora_A.weight \[8, 32\] instead of \[4, 32\] and 7"
                r" more"
            ),
        ),
        ({"r": 0}, "r is 0, which is no adapter"),
        ({"r": "8"}, "r is '8', which it cannot be"),
        ({"modules_to_save": "embed_tokens"}, "modules_to_save is 'embed_tokens', which it cannot"),
        ({"trainable_token_indices": [10**9]}, "must be ids below"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'.* changes"),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
        ({"a_new_field": {"x": 1}}, "a_new_field is {'x': 1}, which is not done here"),
        ({"use_bdlora": {"x": 1}}, "use_bdlora is {'x': 1}, which is not done here"),
        ({"target_modules": ["q_proj"]}, "it has the unknown .*v_proj.lora_A.weight and 3 more"),
        (
            {"target_modules": ["q_proj", "v_proj", "c_attn"]},
            "the target c_attn is no part of this model; there are q_proj, k_proj",
        ),
        ({"use_dora": True}, "use_dora is True, which is not done here"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only LORA is read"),
    ],
)
def test_adapters_that_do_not_fit(bases, tmp_path_factory, changes, complaint):
    folder = tmp_path_factory.getbasetemp() / "good_adapter"
    if not folder.is_dir():
        peft_adapter(bases, folder)
    broken = shutil.copytree(folder, tmp_path_factory.mktemp("broken") / "adapter")
    edit_config(broken, **changes)
    with pytest.raises(UserError, match=complaint):
        open_adapter(broken, bases / "ours-True")


def test_pickles_and_strangers_are_refused(bases, trained, tmp_path):
    base = bases / "ours-True"
    peft_adapter(bases, tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model.bin")
    with pytest.raises(
        UserError, match=r"only the pickle adapter_model.bin, which can run any code"
    ):
        open_adapter(tmp_path / "a", base)
    with pytest.raises(UserError, match="holds no adapter"):
        open_adapter(tmp_path, base)
    with pytest.raises(UserError, match="were made for .*ours-True, not for .*ours-False"):
        open_adapter(trained, bases / "ours-False")
    with pytest.raises(UserError, match="is a model of its own and no adapter"):
        open_adapter(base, base)
    peft_adapter(bases, tmp_path / "b")
    settings = lora_settings(
        bases, tmp_path / "run", (True, LoraSettings(init=str(tmp_path / "b"), rank=4))
    )
    with pytest.raises(
        UserError, match=r"lora.rank is 4, but the adapter in .* has 8; leave lora.rank out"
    ):
        begin_with(settings)
    with pytest.raises(UserError, match="say whether you want its adapter alone"):
        export_hf(trained, tmp_path / "out")
    with pytest.raises(UserError, match="is no LoRA run"):
        export_hf(base, tmp_path / "out", lora="merge")
    with pytest.raises(UserError, match="is no LoRA run, so it has no base"):
        export_hf(base, tmp_path / "out", base=tmp_path)
    with pytest.raises(UserError, match="--verify compares whole models"):
        export_hf(trained, tmp_path / "out", lora="adapter", verify=True)


def test_nothing_goes_on_without_the_base_or_with_another(bases, trained, tmp_path):
    shutil.copytree(bases / "ours-True", tmp_path / "ours-True")
    settings = lora_settings(tmp_path, tmp_path / "run", "rows")
    run = shutil.copytree(trained, tmp_path / "run")
    for file in (run / "settings.yaml", run / "model.json"):
        file.write_text(
            file.read_text().replace(str(bases / "ours-True"), str(tmp_path / "ours-True"))
        )
    (tmp_path / "ours-True").rename(tmp_path / "moved")
    gone = "holds adapters for the model in .*ours-True, which is not there; put it back"
    for attempt in (
        lambda: begin_with(settings),
        lambda: load(run),
        lambda: export_hf(run, tmp_path / "out", lora="merge"),
    ):
        with pytest.raises(UserError, match=gone):
            attempt()
    shutil.copytree(bases / "ours-True", tmp_path / "ours-True")
    params = model_folder.load_params(
        tmp_path / "moved", make_mesh(1, 1, 1, devices=jax.devices()[:1]), jnp.float32
    )
    params["norm"] = params["norm"] * 1.1
    shutil.rmtree(tmp_path / "ours-True" / "params")
    model_folder.save_params(tmp_path / "ours-True", params)
    other = "holds adapters for another model than the one that is in .*ours-True now"
    with pytest.raises(UserError, match="was begun with another model than the one in .*ours-True"):
        train(settings, [make_clips()])
    for attempt in (
        lambda: load(run),
        lambda: export_hf(run, tmp_path / "out", lora="merge"),
        lambda: verify(bases / "hf-True", run),
    ):
        with pytest.raises(UserError, match=other):
            attempt()
    with pytest.raises(UserError, match="is a LoRA run; merge it"):
        train(
            dataclasses.replace(
                settings,
                out=str(tmp_path / "on top"),
                model=dataclasses.replace(settings.model, path=str(run)),
            ),
            [make_clips()],
        )
