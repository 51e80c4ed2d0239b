"""A model is a folder of ours, a run's, a Hugging Face checkpoint's or a hub id; what tells it from
others are its weights, and a bit that is not as it was saved is found wherever they are read.
"""

import dataclasses
import json
import os
import shutil

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny_run import losses, make_clips, settings_for
from transformers import AutoModelForCausalLM, AutoTokenizer

from llasa_jax.convert import export_hf as export_module
from llasa_jax.convert import params_io
from llasa_jax.convert.export_hf import export_hf
from llasa_jax.convert.import_hf import import_hf
from llasa_jax.convert.model_folder import (
    HF_FOLDER,
    PARAMS,
    load_params,
    load_tokenizer,
    open_model,
    read_description,
    restore_params,
    save_params,
    write_description,
)
from llasa_jax.convert.names import places
from llasa_jax.convert.peft_adapter import open_adapter
from llasa_jax.convert.safetensors_io import SafetensorsFolder
from llasa_jax.convert.verify import verify
from llasa_jax.demo.tiny_llama import make_tiny_llama, make_tiny_tokenizer
from llasa_jax.errors import UserError
from llasa_jax.generate.speaker import load
from llasa_jax.inspect.model_checks import check_tokenizer
from llasa_jax.model.checksum import checksums
from llasa_jax.model.settings import LoraSettings
from llasa_jax.model.sharding import abstract_params, make_mesh
from llasa_jax.plan.plan import model_geometry
from llasa_jax.speech.settings import PromptSettings
from llasa_jax.train.loop import train
from llasa_jax.train.parsing import parse_settings
from llasa_jax.train.run_folder import asked_as_before


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny-llasa"
    tokenizer = make_tiny_tokenizer()
    make_tiny_llama(folder, tokenizer, num_hidden_layers=2, max_shard_size="5MB", dtype="float32")
    return folder


@pytest.fixture(scope="module")
def imported(hf, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "model"
    import_hf(hf, folder)
    return folder


@pytest.fixture(scope="module")
def run(hf, tmp_path_factory):
    """A LoRA run begun from the Hugging Face folder itself."""
    lora = LoraSettings(rank=2, alpha=4.0, targets=["q", "v"])
    settings = settings_for(hf, tmp_path_factory.mktemp("runs") / "lora", train={"steps": 2})
    return train(dataclasses.replace(settings, lora=lora), [make_clips()])


def flip(path, at=-1000):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x40
    path.write_bytes(data)


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def test_a_hugging_face_folder_is_the_same_model_as_its_import(hf, imported):
    theirs, ours = open_model(hf), open_model(imported)
    assert theirs.config == ours.config
    assert theirs.origin == ours.origin
    assert theirs.fingerprint() == ours.fingerprint()
    assert len(load_tokenizer(hf)) == len(load_tokenizer(imported))
    tokenizer, reference = load_tokenizer(hf), AutoTokenizer.from_pretrained(hf)
    assert tokenizer.get_vocab() == reference.get_vocab()
    assert tokenizer.init_kwargs == reference.init_kwargs
    assert tokenizer.chat_template == reference.chat_template
    assert [finding.severity for finding in check_tokenizer(hf, load_tokenizer(hf))] == ["ok"]
    assert model_geometry(str(hf), settings_for(hf, "out")) == ours.config
    mesh = make_mesh(2, 2, 2)
    for dtype in (jnp.float32, jnp.bfloat16):
        for a, b in zip(
            jax.tree.leaves(load_params(hf, mesh, dtype)),
            jax.tree.leaves(load_params(imported, mesh, dtype)),
            strict=True,
        ):
            assert (a.dtype, a.sharding) == (b.dtype, b.sharding)
            np.testing.assert_array_equal(a, b)
    quantised = abstract_params(ours.config, mesh, jnp.bfloat16, quantization="int8")
    for a, b in zip(
        jax.tree.leaves(restore_params(hf, quantised)),
        jax.tree.leaves(restore_params(imported, quantised)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_the_fingerprint_covers_every_weight_and_nothing_else(hf, imported, tmp_path):
    known = open_model(imported).fingerprint()
    copy = shutil.copytree(imported, tmp_path / "copy")
    assert open_model(copy).fingerprint() == known
    (copy / PARAMS / params_io.CHECKSUMS).unlink()
    assert open_model(copy).fingerprint() == known  # computed from all weights
    params = load_params(imported, make_mesh(1, 8, 1), jnp.float32)
    again = tmp_path / "again"
    write_description(again, *read_description(imported))
    save_params(again, params)  # other chunks, another format
    assert open_model(again).fingerprint() == known
    for name in ("embed", "norm", "layers.down", "layers.mlp_norm"):
        *above, leaf = name.split(".")
        tree = params[above[0]] if above else params
        before = tree[leaf]
        tree[leaf] = before.at[(-1 if above else 5,) + (-1,) * (before.ndim - 1)].add(1e-3)
        shutil.rmtree(again / PARAMS)
        save_params(again, params)
        tree[leaf] = before
        assert open_model(again).fingerprint() != known, name


def test_a_release_is_asked_as_it_was_trained(imported, tmp_path):
    """Prompts other than Llasa's own are in the release's config.json, and come back from it."""
    own = PromptSettings(user="{text}", assistant_with_speaker="{speaker}{codes}").filled()
    ours = shutil.copytree(imported, tmp_path / "ours")
    config, origin = read_description(ours)
    write_description(ours, config, origin | {"prompt": dataclasses.asdict(own)})
    release, again = tmp_path / "release", tmp_path / "again"
    export_hf(ours, release)
    stored = json.loads((release / "config.json").read_text())["llasa_prompt"]
    assert set(stored) == {"user", "assistant_with_speaker"}
    import_hf(release, again)
    for folder in (release, again):
        assert load(folder, "float32")[2].settings == own
    AutoModelForCausalLM.from_pretrained(release)
    # It is trained on as it was trained, unless other prompts are given.
    given = [f"--out={tmp_path / 'run'}", "--data.path=none"]
    for folder in (release, again):
        settings = parse_settings([*given, f"--model.path={folder}"])
        assert asked_as_before(settings).prompt == own
        other = parse_settings([*given, f"--model.path={folder}", "--prompt.user=Say: {text}"])
        assert asked_as_before(other) == other
    assert asked_as_before(settings, {"user": "Read {text}"}).prompt.user == "Read {text}"

    write_description(ours, config, origin)
    export_hf(ours, tmp_path / "usual")
    settings = parse_settings([*given, f"--model.path={tmp_path / 'usual'}"])
    assert asked_as_before(settings) == settings
    assert "llasa_prompt" not in json.loads((tmp_path / "usual" / "config.json").read_text())

    (release / "config.json").write_text(
        (release / "config.json").read_text().replace('"user"', '"users"')
    )
    with pytest.raises(UserError, match="llasa_prompt cannot be read .*users"):
        open_model(release)


def test_full_finetuning_begins_at_a_hugging_face_folder(hf, imported, tmp_path):
    same = {}
    for name, model in {"hf": hf, "ours": imported}.items():
        settings = settings_for(model, tmp_path / name, train={"steps": 2})
        same[name] = losses(train(settings, [make_clips()]))
    assert same["hf"] == same["ours"]
    # The run stands alone: what it was made from may go.
    gone = shutil.move(shutil.copytree(hf, tmp_path / "source"), tmp_path / "moved")
    settings = settings_for(gone, tmp_path / "alone", train={"steps": 1})
    train(settings, [make_clips()])
    shutil.rmtree(gone)
    export_hf(tmp_path / "alone", tmp_path / "release", verify=True)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "release" / name).read_bytes() == (hf / name).read_bytes(), name
    assert "tiny-llasa" not in str(gone)
    assert read_description(tmp_path / "alone")[1]["base_model"] == "moved"
    load(tmp_path / "alone", "float32")


def test_a_moved_base_is_named_and_a_changed_one_refused(hf, imported, run, tmp_path):
    base = shutil.copytree(hf, tmp_path / "base")
    lost = shutil.copytree(run, tmp_path / "lost")
    description = json.loads((lost / "model.json").read_text())
    description["source"]["lora"]["base"] = str(tmp_path / "elsewhere")
    (lost / "model.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"elsewhere, which is not there; .*\(--base\)"):
        load(lost, "float32")
    expected = jax.tree.leaves(load(run, "float32")[1])
    for place in (base, imported):  # a copy, and the same weights in our own format
        for a, b in zip(
            jax.tree.leaves(load(lost, "float32", base=place)[1]), expected, strict=True
        ):
            np.testing.assert_array_equal(a, b)
        export_hf(lost, tmp_path / f"merged-{place.name}", lora="merge", base=place, verify=True)
        export_hf(lost, tmp_path / f"adapter-{place.name}", lora="adapter", base=place)
    assert (tmp_path / "merged-base" / "model.safetensors").read_bytes() == (
        tmp_path / "merged-model" / "model.safetensors"
    ).read_bytes()
    shard = sorted(base.glob("*.safetensors"))[-1]
    tensors = load_file(shard)
    tensors[sorted(tensors)[0]].view(-1)[3] += 1
    save_file(tensors, shard)
    for attempt in (
        lambda: load(lost, "float32", base=base),
        lambda: export_hf(lost, tmp_path / "x", lora="merge", base=base),
        lambda: export_hf(lost, tmp_path / "x", lora="adapter", base=base),
    ):
        with pytest.raises(UserError, match="adapters for another model than the one .*base now"):
            attempt()


def test_a_hub_id_is_a_model(hf, monkeypatch, tmp_path):
    asked = []

    def snapshot_download(name, allow_patterns, ignore_patterns):
        asked.append((name, "*.safetensors" in allow_patterns))
        return str(hf)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_model("HKUSTAudio/Llasa-tiny").origin["base_model"] == "HKUSTAudio/Llasa-tiny"
    assert model_geometry("HKUSTAudio/Llasa-tiny", settings_for(hf, "out")) == open_model(hf).config
    assert asked == [("HKUSTAudio/Llasa-tiny", True), ("HKUSTAudio/Llasa-tiny", False)]
    settings = settings_for("HKUSTAudio/Llasa-tiny", tmp_path / "run", train={"steps": 1})
    settings = dataclasses.replace(settings, lora=LoraSettings(rank=2, targets=["q"]))
    run = train(settings, [make_clips()])
    assert read_description(run)[1]["lora"]["base"] == "HKUSTAudio/Llasa-tiny"
    load(run, "float32")
    export_hf(run, tmp_path / "adapter", lora="adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "HKUSTAudio/Llasa-tiny"


@pytest.mark.parametrize("name", ["layers.v", "layers.attn_norm", "embed", "norm"])
def test_a_flipped_bit_of_a_model_is_found_by_every_reader(imported, tmp_path, name):
    model = shutil.copytree(imported, tmp_path / "model")
    chunk = sorted((model / PARAMS / name).glob("[0-9]*"))[-1]
    flip(chunk, -1)
    complaint = rf"model/params is damaged: the checksum of {name}( of layer 1)? is not the one"
    for attempt in (
        lambda: load_params(model, make_mesh(2, 2, 2), jnp.bfloat16),
        lambda: export_hf(model, tmp_path / "out"),
        lambda: train(settings_for(model, tmp_path / "run"), [make_clips()]),
    ):
        with pytest.raises(UserError, match=complaint):
            attempt()
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_of_a_checkpoint_is_found(imported, tmp_path):
    """A run's checkpoint, with checksums noted beside it as training does."""
    params = load_params(imported, one_device(), jnp.float32)
    run = tmp_path / "run"
    write_description(run, *read_description(imported))
    shutil.copytree(imported / HF_FOLDER, run / HF_FOLDER)
    save_params(run / "checkpoints" / "3", params)
    (run / "checkpoints" / "3" / PARAMS / params_io.CHECKSUMS).unlink()
    about = run / "checkpoints" / "3" / "about" / "metadata"
    about.parent.mkdir()
    about.write_text(json.dumps({"checksums": {"params": checksums(params)}}))
    export_hf(run, tmp_path / "good")
    notes = json.loads(about.read_text())
    notes["checksums"]["params"]["layers.q"][1] ^= 4
    about.write_text(json.dumps(notes))
    with pytest.raises(UserError, match="3/params is damaged: .* layers.q of layer 1"):
        export_hf(run, tmp_path / "bad")
    with pytest.raises(UserError, match="3/params is damaged: .* layers.q of layer 1"):
        load(run, "float32")
    about.write_text(json.dumps({"checksums": {"params": {"norm": "x"}}}))
    with pytest.raises(UserError, match="list of checksums is damaged"):
        load(run, "float32")


def test_a_flipped_bit_of_an_exported_adapter_is_found(run, hf, tmp_path):
    export_hf(run, tmp_path / "adapter", lora="adapter")
    adapter = open_adapter(tmp_path / "adapter", hf)
    for a, b in zip(
        jax.tree.leaves(adapter.params), jax.tree.leaves(open_adapter(run, hf).params), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    flip(tmp_path / "adapter" / "adapter_model.safetensors", -1)
    with pytest.raises(UserError, match=r"safetensors is damaged: the checksum of .*lora_"):
        open_adapter(tmp_path / "adapter", hf)


@pytest.mark.soak
def test_damage_to_small_files_is_one_sentence(imported, tmp_path):
    """Cut in half, not JSON, of another kind: for all that reads a model."""
    files = ["model.json", "params/_METADATA", "params/checksums.json", "params/embed/.zarray"]
    files += ["hf/tokenizer.json", "hf/tokenizer_config.json"]
    for file in files:
        model = shutil.copytree(imported, tmp_path / "model")
        whole = (model / file).read_bytes()
        for content in (whole[: len(whole) // 2], b"\xff\xfe{}", b"[1, 2]", b"", b"{" * 100_000):
            (model / file).write_bytes(content)
            with pytest.raises(UserError) as error:
                load(model, "float32")
            assert "\n" not in str(error.value)
            assert len(str(error.value)) < 1000
        shutil.rmtree(model)


def test_links_out_of_a_checkpoint_are_not_followed(hf, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("a password")
    inside = shutil.copytree(hf, tmp_path / "inside")
    (inside / "config.json").rename(inside / "the_config.json")
    (inside / "config.json").symlink_to("the_config.json")
    import_hf(inside, tmp_path / "model")
    cache = tmp_path / "models--me--tiny" / "snapshots" / "abc"
    blobs = tmp_path / "models--me--tiny" / "blobs"
    blobs.mkdir(parents=True)
    cache.mkdir(parents=True)
    for number, path in enumerate(sorted(hf.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (cache / path.name).symlink_to(os.path.relpath(blobs / str(number), cache))
    import_hf(cache, tmp_path / "cached")
    (inside / "secret.json").symlink_to(secret)
    for attempt in (
        lambda: import_hf(inside, tmp_path / "leak"),
        lambda: train(settings_for(inside, tmp_path / "leak"), [make_clips()]),
    ):
        with pytest.raises(UserError, match=r"secret\.json is a symbolic link to .*secret\.txt"):
            attempt()
        copied = [path for path in tmp_path.rglob("secret.json") if path.parent != inside]
        assert not copied


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%20b", "a[1]", "a|b", "a\\b", "ä 'b'"])
def test_any_path(imported, tmp_path, name):
    model = shutil.copytree(imported, tmp_path / name / "model")
    for a, b in zip(
        jax.tree.leaves(load_params(model, one_device(), jnp.float32)),
        jax.tree.leaves(load_params(imported, one_device(), jnp.float32)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    export_hf(model, tmp_path / name / "out")
    import_hf(tmp_path / name / "out", tmp_path / name / "again")
    AutoModelForCausalLM.from_pretrained(tmp_path / name / "out")
    assert open_model(tmp_path / name / "again").fingerprint() == open_model(imported).fingerprint()
    run = tmp_path / name / "run"  # as training writes it: one database of all arrays
    save_params(tmp_path / "checkpoint", load_params(imported, one_device(), jnp.float32))
    write_description(run, *read_description(imported))
    shutil.copytree(imported / HF_FOLDER, run / HF_FOLDER)
    shutil.copytree(tmp_path / "checkpoint", run / "checkpoints" / "3")
    export_hf(run, tmp_path / name / "exported")
    assert SafetensorsFolder(tmp_path / name / "exported").tensors.keys() == set(
        places(open_model(run).config)
    )


def test_small_pieces_export_the_same(imported, tmp_path, monkeypatch):
    """With pieces of few rows some lie wholly in a table's padding, where nothing is to write."""
    export_hf(imported, tmp_path / "large")
    params = load_params(imported, one_device(), jnp.float32)
    model = tmp_path / "model"
    write_description(model, *read_description(imported))
    shutil.copytree(imported / HF_FOLDER, model / HF_FOLDER)
    monkeypatch.setattr("llasa_jax.convert.model_folder.CHUNK_BYTES", 4096)
    save_params(model, {**params, "embed": params["embed"]})
    monkeypatch.setattr(params_io, "PIECE_BYTES", 1 << 14)
    export_hf(model, tmp_path / "small")
    assert export_module.WORKERS
    for file in sorted((tmp_path / "large").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "small" / file.name).read_bytes()


def test_verify_compares_every_tensor(hf, imported, tmp_path, capsys):
    result = verify(hf, imported)
    assert result.different == ()
    assert "all 20 tensors are equal, bit for bit" in capsys.readouterr().out
    damaged = shutil.copytree(hf, tmp_path / "damaged")
    shard = sorted(damaged.glob("*.safetensors"))[-1]
    name = sorted(load_file(shard))[0]
    flip(shard, SafetensorsFolder(damaged).tensors[name].offset)  # the least bits of a float32
    result = verify(damaged, imported)
    assert result.different == (name,)
    with pytest.raises(UserError, match=f"1 of 20 tensors differs: {name}"):
        result.check()
