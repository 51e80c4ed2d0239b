"""HF's checkpoints in and out again. "Equal" means bit for bit: nothing is computed."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

from llasa_jax.convert.export_hf import export_hf
from llasa_jax.convert.hf_files import locate
from llasa_jax.convert.import_hf import import_hf
from llasa_jax.convert.model_folder import (
    CHECKPOINTS,
    HF_FOLDER,
    PARAMS,
    chunking,
    load_params,
    read_description,
    write_description,
)
from llasa_jax.convert.names import EMBED, HEAD, places
from llasa_jax.convert.safetensors_io import INDEX, SafetensorsFolder
from llasa_jax.convert.verify import verify
from llasa_jax.demo.tiny_llama import make_tiny_llama, make_tiny_tokenizer
from llasa_jax.model.sharding import abstract_params, make_mesh

ONE_FILE, MANY_FILES = "5GB", "40KB"


@pytest.fixture(scope="module")
def text_tokenizer():
    return make_tiny_tokenizer(extend=False)


@pytest.fixture(scope="module")
def make_text(tmp_path_factory, text_tokenizer):
    """Makes a text model's checkpoint, which is small; `sizes` override the config's."""

    def make(**options):
        folder = tmp_path_factory.mktemp("text") / "tiny-text"
        make_tiny_llama(folder, text_tokenizer, **({"dtype": "bfloat16"} | options))
        return folder

    return make


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A checkpoint with Llasa's own vocabulary, bfloat16 and tied, and what its import made."""
    folder = tmp_path_factory.mktemp("speaking")
    make_tiny_llama(
        folder / "tiny-llasa", make_tiny_tokenizer(), dtype="bfloat16", num_hidden_layers=1
    )
    (folder / "tiny-llasa" / "README.md").write_text(
        "---\nlicense: cc-by-nc-4.0\ntags: [x]\n---\n# Llasa\n"
    )
    import_hf(folder / "tiny-llasa", folder / "model")
    return folder / "tiny-llasa", folder / "model"


def tensors_of(folder):
    """Every tensor's bytes, as the safetensors library reads them."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return {
        name: (
            tensor.dtype,
            tuple(tensor.shape),
            tensor.contiguous().view(torch.uint8).numpy().tobytes(),
        )
        for name, tensor in found.items()
    }


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("shards", [ONE_FILE, MANY_FILES])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_exact(make_text, tmp_path, tied, shards):
    hf = make_text(tie_word_embeddings=tied, max_shard_size=shards)
    assert (len(list(hf.glob("*.safetensors"))) >= 8) is (shards == MANY_FILES)
    import_hf(hf, tmp_path / "model")
    export_hf(tmp_path / "model", tmp_path / "out", max_shard_size=shards)
    assert tensors_of(tmp_path / "out") == tensors_of(hf)
    assert (HEAD in tensors_of(hf)) is not tied
    small = [
        path.name for path in hf.iterdir() if path.suffix != ".safetensors" and path.name != INDEX
    ]
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    } <= set(small)
    for name in small:
        assert (tmp_path / "out" / name).read_bytes() == (hf / name).read_bytes(), name
    if shards != ONE_FILE:
        ours, theirs = (
            json.loads((folder / INDEX).read_text()) for folder in (tmp_path / "out", hf)
        )
        assert ours["metadata"] == theirs["metadata"]
        assert ours["weight_map"].keys() == theirs["weight_map"].keys()


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_imported_weights_restore_onto_devices_and_train_on(make_text, tmp_path, devices, dtype):
    """Into a run's checkpoint and out of it again: as Orbax reads what we stream, and as we read
    what Orbax writes.
    """
    hf = make_text(tie_word_embeddings=False, hidden_size=64, num_key_value_heads=2)
    import_hf(hf, tmp_path / "model")
    mesh = (
        make_mesh(fsdp=devices // 2, tensor=2)
        if devices == 8
        else make_mesh(devices=jax.devices()[:1])
    )
    params = load_params(tmp_path / "model", mesh, dtype)
    assert len(params["layers"]["q"].sharding.device_set) == devices
    source = load_numpy(hf / "model.safetensors")
    config, _ = read_description(tmp_path / "model")
    for name, place in places(config).items():
        *above, leaf = place.path.split(".")
        ours = np.asarray((params[above[0]] if above else params)[leaf])
        ours = ours if place.layer is None else ours[place.layer]
        rows = ours.reshape(-1, *place.shape[1:])
        np.testing.assert_array_equal(
            rows[: place.shape[0]], source[name].astype(dtype), err_msg=name
        )
        assert not rows[place.shape[0] :].any(), "padding must be zero"

    run = tmp_path / "run"
    write_description(run, *read_description(tmp_path / "model"))
    shutil.copytree(tmp_path / "model" / HF_FOLDER, run / HF_FOLDER)
    with ocp.CheckpointManager((run / CHECKPOINTS).absolute()) as manager:
        for step in (0, 3):
            stepped = jax.tree.map(lambda weight, step=step: weight * (1 + step), params)
            manager.save(
                step,
                args=ocp.args.Composite(
                    **{PARAMS: ocp.args.StandardSave(stepped, save_args=chunking(params))}
                ),
            )
    export_hf(run, tmp_path / "first", step=0, max_shard_size=MANY_FILES)
    assert tensors_of(tmp_path / "first") == tensors_of(hf)
    export_hf(run, tmp_path / "latest")
    latest = load_numpy(tmp_path / "latest" / "model.safetensors")
    assert latest[EMBED].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(latest[EMBED], source[EMBED] * ml_dtypes.bfloat16(4))


def test_a_whole_stack_in_one_chunk_exports_too(make_text, tmp_path):
    """A run that was saved without our chunking, as Orbax would by itself."""
    hf = make_text()
    import_hf(hf, tmp_path / "model")
    params = load_params(tmp_path / "model", make_mesh(), jnp.float32)
    shutil.rmtree(tmp_path / "model" / PARAMS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((tmp_path / "model" / PARAMS).absolute(), params)
    export_hf(tmp_path / "model", tmp_path / "out")
    assert tensors_of(tmp_path / "out") == tensors_of(hf)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("axes", [(1, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_straight_onto_a_mesh(make_text, tmp_path, axes, tied):
    hf = make_text(tie_word_embeddings=tied, max_shard_size=MANY_FILES, dtype="float32")
    import_hf(hf, tmp_path / "model")
    mesh = make_mesh(*axes, devices=jax.devices()[: int(np.prod(axes))])
    config, _ = read_description(tmp_path / "model")
    for dtype in (jnp.float32, jnp.bfloat16):
        ours, expected = (
            load_params(hf, mesh, dtype),
            load_params(tmp_path / "model", mesh, dtype),
        )
        target = abstract_params(config, mesh, dtype)
        for (path, a), b, t in zip(
            jax.tree.leaves_with_path(ours),
            jax.tree.leaves(expected),
            jax.tree.leaves(target),
            strict=True,
        ):
            assert (a.shape, a.dtype, a.sharding.is_equivalent_to(t.sharding, a.ndim)) == (
                t.shape,
                t.dtype,
                True,
            ), path
            np.testing.assert_array_equal(a, b, err_msg=str(path))


def test_speaking_model_round_trip(speaking, tmp_path):
    """Only generation_config changes: the speech's end joins the stops, and padding stops being
    <|eot_id|>.
    """
    hf, model = speaking
    export_hf(model, tmp_path / "out", verify=True)
    assert tensors_of(tmp_path / "out") == tensors_of(hf)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (hf / name).read_bytes(), name
    before, after = (
        json.loads((folder / "generation_config.json").read_text())
        for folder in (hf, tmp_path / "out")
    )
    vocab = json.loads((hf / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in vocab}
    assert after["eos_token_id"] == [*before["eos_token_id"], ids["<|SPEECH_GENERATION_END|>"]]
    assert after["pad_token_id"] == ids["<|finetune_right_pad_id|>"]
    assert {**after, "eos_token_id": 0, "pad_token_id": 0} == {
        **before,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def test_verify_measures(speaking, make_text, tmp_path, capsys):
    hf, model = speaking
    result = verify(hf, model)
    assert result.equal
    assert result.agreement == 1
    assert result.tokens == 128
    assert "agreement 100.00%" in capsys.readouterr().out
    other = make_text(seed=1, tie_word_embeddings=False)
    import_hf(make_text(tie_word_embeddings=False), tmp_path / "model")
    result = verify(other, tmp_path / "model")
    assert not result.equal
    assert result.agreement < 0.5


def test_dtype_is_a_setting(make_text, tmp_path):
    hf = make_text(dtype="float32")
    import_hf(hf, tmp_path / "model", dtype="bfloat16")
    export_hf(tmp_path / "model", tmp_path / "out")
    source, out = (
        load_file(hf / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert all(
        torch.equal(out[name], tensor.bfloat16().float()) and out[name].dtype == torch.float32
        for name, tensor in source.items()
    )
    export_hf(tmp_path / "model", tmp_path / "half", dtype="bfloat16", verify=True)
    assert all(
        tensor.dtype == torch.bfloat16
        for tensor in load_file(tmp_path / "half" / "model.safetensors").values()
    )
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_mixed_dtypes_come_back_as_they_were(make_text, tmp_path):
    hf = make_text()
    tensors = {
        name: t.float() if "norm" in name else t
        for name, t in load_file(hf / "model.safetensors").items()
    }
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    import_hf(hf, tmp_path / "model")
    export_hf(tmp_path / "model", tmp_path / "out")
    assert tensors_of(tmp_path / "out") == tensors_of(hf)


def test_duplicate_head_of_a_tied_model(make_text, tmp_path, recwarn):
    hf = make_text()
    tensors = load_file(hf / "model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBED].clone()}, hf / "model.safetensors", {"format": "pt"})
    import_hf(hf, tmp_path / "same")
    assert not [w for w in recwarn if "lm_head" in str(w.message)]
    export_hf(tmp_path / "same", tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == tensors.keys()
    different = tensors[EMBED].clone()
    different[-1, -1] += 1
    save_file(tensors | {HEAD: different}, hf / "model.safetensors", {"format": "pt"})
    with pytest.warns(
        UserWarning, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"
    ):
        import_hf(hf, tmp_path / "different")
    export_hf(tmp_path / "different", tmp_path / "out2")
    assert tensors_of(tmp_path / "out2") == tensors_of(tmp_path / "out")
    # Where only the head was stored it is the embedding, as in transformers.
    only_head = {HEAD if name == EMBED else name: tensor for name, tensor in tensors.items()}
    save_file(only_head, hf / "model.safetensors", {"format": "pt"})
    import_hf(hf, tmp_path / "head")
    export_hf(tmp_path / "head", tmp_path / "out3")
    assert tensors_of(tmp_path / "out3") == tensors_of(tmp_path / "out")


def test_old_buffers_are_left_out(make_text, tmp_path):
    hf = make_text()
    tensors = load_file(hf / "model.safetensors")
    save_file(
        tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
        hf / "model.safetensors",
        {"format": "pt"},
    )
    import_hf(hf, tmp_path / "model")
    export_hf(tmp_path / "model", tmp_path / "out")
    assert tensors_of(tmp_path / "out").keys() == tensors.keys()


def test_base_model_is_a_name_and_never_a_path(speaking, tmp_path):
    hf, model = speaking
    _, source = read_description(model)
    assert source["base_model"] == "tiny-llasa"
    assert source["license"] == "cc-by-nc-4.0"
    cached = tmp_path / "models--HKUSTAudio--Llasa-1B" / "snapshots" / "abc"
    cached.mkdir(parents=True)
    assert locate(str(cached)) == (cached, "HKUSTAudio/Llasa-1B")


def test_our_reader_agrees_with_the_library(make_text):
    hf = make_text(max_shard_size=MANY_FILES)
    ours, theirs = SafetensorsFolder(hf), tensors_of(hf)
    assert ours.tensors.keys() == theirs.keys()
    for name, (_, shape, data) in theirs.items():
        assert ours.read(name).tobytes() == data
        assert (
            ours.read(name, 1, 3).tobytes()
            == data[len(data) // shape[0] :][: 2 * len(data) // shape[0]]
        )
