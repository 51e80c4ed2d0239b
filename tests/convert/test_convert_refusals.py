"""What a converter must not take, and what it leaves behind when it fails: nothing."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from llasa_jax.convert import safetensors_io
from llasa_jax.convert.export_hf import export_hf
from llasa_jax.convert.hf_config import HARMLESS, HONOURED, ONLY, model_config
from llasa_jax.convert.import_hf import import_hf
from llasa_jax.convert.model_folder import PARAMS
from llasa_jax.convert.params_io import ParamsWriter
from llasa_jax.convert.safetensors_io import INDEX, SINGLE, SafetensorsWriter, parse_size
from llasa_jax.demo.tiny_llama import make_tiny_llama, make_tiny_tokenizer
from llasa_jax.errors import UserError
from llasa_jax.model.config import ModelConfig, RopeScaling
from llasa_jax.runtime.writing import new_folder

V4 = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 193_800,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131_072,
    "torch_dtype": "bfloat16",
}
V5 = {name: value for name, value in V4.items() if not name.startswith(("rope", "torch"))} | {
    "rope_parameters": V4["rope_scaling"] | {"rope_theta": 500_000.0},
    "head_dim": 64,
    "dtype": "bfloat16",
}
HERE = Path("config.json")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "sharded"
    make_tiny_llama(
        folder,
        make_tiny_tokenizer(extend=False),
        dtype="bfloat16",
        max_shard_size="40KB",
        tie_word_embeddings=False,
    )
    return folder


@pytest.fixture
def hf(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "hf"))


def refuses(hf, match):
    """The import fails with one sentence that has `match`, and leaves nothing under any name."""
    out = hf.parent / "out"
    out.mkdir()
    with pytest.raises(UserError, match=match) as error:
        import_hf(hf, out / "model")
    assert "\n" not in str(error.value)
    assert list(out.iterdir()) == []


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_both_spellings_of_a_config_mean_the_same():
    assert model_config(V4, HERE) == model_config(V5, HERE)
    assert model_config(V5, HERE).rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert model_config(V5, HERE).head_dim == 64


def test_defaults_are_hfs_own():
    """A config that leaves fields out means what transformers takes it to mean."""
    ours, theirs = model_config({"model_type": "llama"}, HERE), LlamaConfig()
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("head_dim", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope_scaling is None


def test_every_field_of_hfs_config_is_known():
    known = HONOURED | HARMLESS | ONLY.keys()
    assert set(LlamaConfig().to_dict()) <= known
    assert {
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "torch_dtype",
        "dtype",
        "quantization_config",
    } <= known


@pytest.mark.parametrize("field", sorted(HONOURED - {"architectures", "dtype", "torch_dtype"}))
def test_every_honoured_field_has_a_reader(field):
    """Another value makes another model, or is refused; `architectures` and the type are checked
    elsewhere.
    """
    other = {
        "model_type": "qwen2",
        "hidden_size": 1024,
        "tie_word_embeddings": False,
        "partial_rotary_factor": 0.5,
        "rope_scaling": None,
        "rope_theta": 1e6,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
    }.get(field, 4)
    config = V5 if field == "rope_parameters" else V4

    def meaning(config):
        try:
            return model_config(config, HERE)
        except UserError as error:
            return str(error)

    assert meaning(config | {field: other}) != meaning(config)
    assert isinstance(meaning(config | {field: other}), ModelConfig) or field in meaning(
        config | {field: other}
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "mistral"),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("hidden_act", "gelu"),
        ("attention_dropout", 0.1),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}),
        ("rope_scaling", {"rope_type": "longrope"}),
        ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}),
        ("rope_scaling", {**V4["rope_scaling"], "high_freq_factor": 1.0}),
        ("rope_theta", 0),
        ("partial_rotary_factor", 0.5),
        ("head_dim", 63),
        ("num_key_value_heads", 7),
        ("rms_norm_eps", "tiny"),
        ("vocab_size", -1),
        ("hidden_size", "2048"),
        ("tie_word_embeddings", "yes"),
        ("num_hidden_layers", 10**9),
        ("vocab_size", 10**12),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", float("inf")),
        ("rope_theta", float("nan")),
        ("rope_scaling", {**V4["rope_scaling"], "factor": float("nan")}),
        ("use_qk_norm", True),
        ("attn_logit_softcapping", 50),
        ("auto_map", {"AutoModel": "model.Mine"}),
    ],
)
def test_config_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=field):
        model_config(V4 | {field: value}, HERE)


def test_truncated_shard(hf):
    shard = hf / "model-00002-of-00009.safetensors"
    shard = shard if shard.exists() else sorted(hf.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 10)
    refuses(hf, f"{shard.name} is truncated")


def test_a_header_cut_off(hf):
    shard = sorted(hf.glob("*.safetensors"))[0]
    os.truncate(shard, 20)
    refuses(hf, f"{shard.name} is truncated")


def test_a_damaged_header(hf):
    shard = sorted(hf.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[8:12] = b"%%%%"
    shard.write_bytes(data)
    refuses(hf, "damaged header")


def test_index_names_an_absent_file(hf):
    shard = sorted(hf.glob("*.safetensors"))[-1]
    shard.unlink()
    refuses(hf, f"names {shard.name}")


def test_index_names_a_tensor_that_its_file_lacks(hf):
    index = json.loads((hf / INDEX).read_text())
    index["weight_map"]["model.extra.weight"] = sorted(hf.glob("*.safetensors"))[0].name
    (hf / INDEX).write_text(json.dumps(index))
    refuses(hf, r"model\.extra\.weight")


def rewrite_header(shard, change):
    """Rewrites a safetensors file's header, as bytes, and keeps its tensors."""
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = change(json.loads(data[8 : 8 + length]))
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    shard.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


def change_first(**values):
    def change(header):
        name = next(name for name in header if name != "__metadata__")
        return header | {name: header[name] | values}

    return change


@pytest.mark.parametrize(
    "change",
    [
        change_first(data_offsets=["0", "64"]),
        change_first(data_offsets=[-64, 0]),
        change_first(data_offsets=[0, 64, 128]),
        change_first(shape=["4", 4]),
        change_first(shape=[1 << 62, 4]),
        change_first(dtype=5),
        lambda header: header | {"other": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
        lambda header: [1, 2],
        lambda header: {"a": None},
        lambda header: b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        lambda header: b'{"\xff": 1}',
        lambda header: (
            {"x" * 1_000_000: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}} | header
        ),
    ],
)
def test_malicious_headers_are_one_sentence(hf, change):
    rewrite_header(sorted(hf.glob("*.safetensors"))[0], change)
    out = hf.parent / "out"
    with pytest.raises(UserError) as error:
        import_hf(hf, out)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 2000


def test_a_header_that_claims_30_gigabytes(hf):
    shard = sorted(hf.glob("*.safetensors"))[0]
    with shard.open("r+b") as file:
        file.write((30 << 30).to_bytes(8, "little"))
        file.truncate(31 << 30)  # of holes
    refuses(hf, "damaged header")


@pytest.mark.parametrize("name", ["x" * 100_000, "../model.safetensors", "/etc/hostname", 5, None])
def test_an_index_names_files_beside_it_only(hf, name):
    index = json.loads((hf / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (hf / INDEX).write_text(json.dumps(index))
    refuses(hf, "index.json is damaged")


def test_all_wrong_names_are_told_at_once(hf):
    tensors = {}
    for shard in sorted(hf.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (hf / INDEX).unlink()
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, hf / SINGLE)
    refuses(
        hf,
        r"missing .*1\.mlp\.up_proj.*unexpected .*q_proj\.bias.*misshapen model\.norm\.weight \[3\]"
        r" instead of \[64\]",
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickles(hf, name):
    for file in [*hf.glob("*.safetensors"), hf / INDEX]:
        file.unlink()
    (hf / name).write_bytes(b"x")
    refuses(hf, "pickles .*run any code.*save_pretrained")


def test_quantised_tensors_without_a_word_in_the_config(hf):
    for file in [*hf.glob("*.safetensors"), hf / INDEX]:
        file.unlink()
    save_file({"model.embed_tokens.weight": torch.zeros(8, 8, dtype=torch.int8)}, hf / SINGLE)
    refuses(hf, "type I8.*not quantised")


def test_no_checkpoint_at_all(tmp_path):
    (tmp_path / "hf").mkdir()
    refuses(tmp_path / "hf", r"config\.json is missing")
    with pytest.raises(UserError, match="no folder and no hub id"):
        import_hf(tmp_path / "nowhere", tmp_path / "model")


def test_hub_id_without_a_network(tmp_path):
    with pytest.raises(UserError, match="HKUSTAudio/Llasa-1B .*cannot be downloaded"):
        import_hf("HKUSTAudio/Llasa-1B", tmp_path / "model")


def test_tokenizer_larger_than_the_tables(hf):
    make_tiny_tokenizer(extend=True).save_pretrained(hf)
    refuses(hf, "tokenizer has .* tokens and the model")


@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fault_is_found(tmp_path, bad, dtype):
    good = torch.linspace(-1e4, 1e4, 64)
    array = good.clone()
    array[17] = bad

    def numpy_of(tensor):
        save_file({"x": tensor.to(dtype)}, tmp_path / SINGLE)
        return safetensors_io.SafetensorsFolder(tmp_path).read("x")

    assert safetensors_io.fault(numpy_of(good)) == ""
    assert safetensors_io.fault(numpy_of(array)) == ("NaN" if bad != bad else "infinity")


def test_nan_in_a_weight_is_named(hf, tmp_path):
    shard = next(
        s
        for s in sorted(hf.glob("*.safetensors"))
        if any("down_proj" in name for name in load_file(s))
    )
    tensors = load_file(shard)
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][3, 5] = float("nan")
    save_file(tensors, shard)
    with pytest.warns(UserWarning, match=f"{name} contains NaN"):
        import_hf(hf, tmp_path / "model")
    with pytest.warns(UserWarning, match=f"{name} contains NaN"):
        export_hf(tmp_path / "model", tmp_path / "out")


def test_too_large_for_float16_is_named(hf, tmp_path):
    shard = sorted(hf.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = 1e6
    save_file(tensors, shard)
    with pytest.warns(UserWarning, match=f"{name} contains infinity as float16"):
        import_hf(hf, tmp_path / "model", dtype="float16")


def test_destination_in_use(hf, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("mine")
    import_hf(hf, tmp_path / "model")
    for convert, source in ((import_hf, hf), (export_hf, tmp_path / "model")):
        with pytest.raises(UserError, match="used already exists and is not empty"):
            convert(source, tmp_path / "used")
        assert [p.name for p in (tmp_path / "used").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    export_hf(tmp_path / "model", tmp_path / "empty")
    assert (tmp_path / "empty" / SINGLE).is_file()


@pytest.mark.parametrize("what", ["import", "export"])
def test_disk_full_half_way(hf, tmp_path, monkeypatch, what):
    out = tmp_path / "out"
    out.mkdir()
    import_hf(hf, tmp_path / "model")
    writer = ParamsWriter if what == "import" else SafetensorsWriter
    calls, really_write = [], writer.write

    def write(self, *arguments):
        calls.append(self)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        really_write(self, *arguments)

    monkeypatch.setattr(writer, "write", write)
    with pytest.raises(UserError, match=r"disk of .* is full, and nothing was left under .*/x"):
        import_hf(hf, out / "x") if what == "import" else export_hf(tmp_path / "model", out / "x")
    assert len(calls) > 12
    assert list(out.iterdir()) == []


def test_what_a_killed_import_left_is_removed(tmp_path):
    def another_process(ends: str) -> int:
        imports = "import os, pathlib; from llasa_jax.runtime.writing import new_folder"
        return subprocess.run(
            [
                sys.executable,
                "-c",
                f"{imports}\nwith new_folder(pathlib.Path({str(out)!r})): {ends}",
            ]
        ).returncode

    out = tmp_path / "out" / "model"
    assert another_process("os.kill(os.getpid(), 9)") == -9
    assert len(list(out.parent.iterdir())) == 1
    with new_folder(out) as mine:
        # One that is being filled is left alone.
        assert list(out.parent.iterdir()) == [mine]
        assert another_process("os._exit(3)") == 3
        assert mine.is_dir()
    assert out in out.parent.iterdir()


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    (others := tmp_path / ".model.1.partial").mkdir()
    with new_folder(tmp_path / "model") as partial:
        (partial / "whole").touch()
    assert (tmp_path / "model/whole").is_file()
    assert others.is_dir()  # nobody knows whether it is being filled


def test_disk_too_small_is_told_before_anything_is_written(hf, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "llasa_jax.runtime.writing.shutil.disk_usage",
        lambda _: shutil._ntuple_diskusage(10, 10, 0),
    )
    refuses(hf, "0 MB free and .* are needed")


def test_damaged_checkpoint_of_ours(hf, tmp_path):
    import_hf(hf, tmp_path / "model")
    (chunk := tmp_path / "model" / PARAMS / "layers.up" / "0.0.0").write_bytes(b"short")
    with pytest.raises(UserError, match=r"layers\.up is damaged"):
        export_hf(tmp_path / "model", tmp_path / "out")
    # A lost chunk must not read as zeros either.
    chunk.unlink()
    with pytest.raises(UserError, match=r"layers\.up is damaged"):
        export_hf(tmp_path / "model", tmp_path / "out")
    shutil.rmtree(tmp_path / "model" / PARAMS / "layers.up")
    with pytest.raises(UserError, match=r"no readable layers\.up"):
        export_hf(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "500MB", "2GiB", "1.5kb", 7, "40KB")] == [
        5 * 10**9,
        5 * 10**8,
        2 << 31 >> 1,
        1500,
        7,
        40_000,
    ]
    for text in ("", "five", "-1GB", "0", "5XB"):
        with pytest.raises(UserError, match="is no size"):
            parse_size(text)


def test_push_to_hub(hf, tmp_path, monkeypatch):
    sent = {}
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "create_repo",
        lambda self, repo, exist_ok, private: sent.update(made=repo, private=private),
    )
    monkeypatch.setattr(
        huggingface_hub.HfApi, "upload_folder", lambda self, **what: sent.update(what)
    )
    import_hf(hf, tmp_path / "model")
    export_hf(tmp_path / "model", tmp_path / "out", push_to_hub="me/voice")
    assert (sent["made"], sent["repo_id"], sent["folder_path"]) == (
        "me/voice",
        "me/voice",
        str(tmp_path / "out"),
    )
    assert sent["private"] is True
    export_hf(tmp_path / "model", tmp_path / "public", push_to_hub="me/voice", public=True)
    assert sent["private"] is False
    assert 'from_pretrained("me/voice")' in (tmp_path / "out" / "README.md").read_text()

    def fail(self, **_):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", fail)
    with pytest.raises(UserError, match="is whole but could not be uploaded to me/voice .*401"):
        export_hf(tmp_path / "model", tmp_path / "out2", push_to_hub="me/voice")
