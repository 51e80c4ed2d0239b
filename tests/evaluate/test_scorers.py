import json
import multiprocessing
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from llasa_jax.errors import UserError
from llasa_jax.evaluate.known import DOOR, KEYS, recording
from llasa_jax.evaluate.levels import Levels
from llasa_jax.evaluate.recognisers import (
    Recogniser,
    language_code,
    paraformer,
    transformers_recogniser,
)
from llasa_jax.evaluate.scorers import Scoring, check_answers, load_scorer, load_scorers, score
from llasa_jax.evaluate.voices import Similarity, utmos, xvector

NOTHING = np.zeros(0, np.float32)


def recogniser(heard, language=""):
    """One that hears `heard`, whatever is said."""
    return Recogniser(lambda waves: [heard] * len(waves), language)


@pytest.mark.parametrize(
    ("language", "text", "heard", "wer", "cer"),
    [
        ("en", "Please close the door.", "please close the door", 0, 0),
        ("en", "Please close the door.", "please close a door", 1 / 4, 3 / 18),
        ("en", "I'd rather walk", "i would rather walk", 0, None),  # Whisper's normaliser
        ("en", "He has twenty dollars", "he has $20", 0, None),
        ("", "Grüß Gott, alle", "grüß gott", 1 / 3, None),
        ("zh", "你好，世界", "你号世界", 1 / 4, 1 / 4),
        ("zh", "汉语", "漢語", 0, 0),  # traditional characters
        ("", "今日は晴れ", "今日は雨", 2 / 5, 2 / 5),  # Japanese by its script
        ("en", "yes", "yes yes no", 2, None),  # more errors than words
        ("en", "...", "yes", np.nan, np.nan),
    ],
)
def test_error_rates(language, text, heard, wer, cer):
    found = recogniser(heard, language)([np.zeros(16_000, np.float32)], [text])
    np.testing.assert_allclose(found["wer"], wer)
    if cer is not None:
        np.testing.assert_allclose(found["cer"], cer)


def test_a_wave_without_speech_is_all_errors():
    found = recogniser("please close the door", "en")([NOTHING], ["Close it"])
    assert (found["wer"][0], found["cer"][0]) == (1, 1)


def test_languages():
    assert [language_code(name) for name in ("", "en", "en-GB", "German", "ZH_cn")] == [
        *("", "en", "en", "de", "zh")
    ]
    with pytest.raises(UserError, match="the language 'klingon' is not known"):
        language_code("klingon")
    with pytest.raises(UserError, match="pocketsphinx knows English only, not 'de'"):
        load_scorer("pocketsphinx", language="de")


def test_pocketsphinx_hears_what_a_grammar_allows(tmp_path):
    rules = tmp_path / "world.gram"
    door = "please close the door behind you"
    for sentences, heard in ((f"{door} | zebra", {door}), ("zebra | yellow", {"zebra", "yellow"})):
        rules.write_text(f"#JSGF V1.0;\ngrammar world;\npublic <sentence> = {sentences};\n")
        scorer = load_scorer(f"pocketsphinx:{rules}")
        assert scorer.transcribe([recording("rms_1")])[0] in heard


@pytest.mark.parametrize(
    "rules", [None, "nothing of the kind", "#JSGF V1.0;\ngrammar a;\npublic <a> = qzxv;\n", b"\xff"]
)
def test_a_grammar_that_is_none(tmp_path, rules):
    place = tmp_path / "world.gram"
    if rules is not None:
        place.write_bytes(rules if isinstance(rules, bytes) else rules.encode())
    with pytest.raises(UserError, match=r"PocketSphinx does not take the grammar .*world\.gram"):
        load_scorer(f"pocketsphinx:{place}")


def test_pocketsphinx_hears_the_recordings():
    scorer = load_scorer("pocketsphinx")  # which checks rms_1 too
    assert scorer.transcribe([recording("rms_2")]) == ["i left my keys on the table"]
    assert scorer([recording("rms_2"), NOTHING], [KEYS, KEYS])["wer"].tolist() == [0, 1]


def test_known_answers_refuse_what_does_not_work():
    for heard, language, said in (
        ("the weather is fine", "en", "hears 'the weather is fine' in a recording that says"),
        ("", "de", "it hears nothing in a recording of speech"),
    ):
        with pytest.raises(UserError, match=said):
            check_answers(recogniser(heard, language), "asr:bad")
    check_answers(recogniser(DOOR, "en"), "asr:good")
    check_answers(recogniser("bitte", "de"), "asr:german")
    with pytest.raises(UserError, match="two voices .* more alike than two recordings of one"):
        check_answers(Similarity(lambda wave: np.ones(3)), "speaker:bad")


@pytest.fixture(scope="module")
def ctc(tmp_path_factory):
    """A tiny wav2vec 2 with random weights, as its class saves it."""
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
    )

    folder = tmp_path_factory.mktemp("ctc")
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghij"]
    (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(letters)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(letters),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16,) * 7,
        feat_extract_norm="layer",
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        initializer_range=1.0,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    return folder


def test_a_recogniser_of_transformers(ctc):
    from transformers import AutoModelForCTC, AutoProcessor

    waves = [recording("rms_1"), recording("slt_2"), recording("rms_2")[:20_000]]
    heard = transformers_recogniser(str(ctc), batch=2).transcribe([*waves, NOTHING])
    processor, model = AutoProcessor.from_pretrained(ctc), AutoModelForCTC.from_pretrained(ctc)
    for wave, text in zip(waves, heard, strict=False):
        with torch.inference_mode():
            logits = model(**processor(wave, sampling_rate=16_000, return_tensors="pt")).logits
        assert text == processor.batch_decode(logits.argmax(-1))[0].strip() != ""
    assert heard[-1] == ""
    with pytest.raises(UserError, match=r"the scorer asr:.* does not work here: it hears"):
        load_scorer(f"asr:{ctc}", language="en")


def test_whisper(tmp_path, monkeypatch):
    """The real class with random weights: asked for a language, in batches, and beyond 30 s."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    tokenizer = WhisperTokenizer({c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, [])
    special = "endoftext startoftranscript en de translate transcribe startofprev notimestamps"
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"<|{name}|>" for name in special.split()]}
    )
    tokenizer.add_tokens([f"<|{at * 0.02:.2f}|>" for at in range(1501)])
    tokenizer.pad_token = tokenizer.eos_token = "<|endoftext|>"
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in special.split()}
    end = ids["endoftext"]
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=ids["startoftranscript"],
        init_std=1.0,
    )
    model = WhisperForConditionalGeneration(config).eval()
    generation = model.generation_config
    generation.is_multilingual, generation._from_model_config = True, False
    generation.lang_to_id = {f"<|{name}|>": ids[name] for name in ("en", "de")}
    generation.task_to_id = {name: ids[name] for name in ("transcribe", "translate")}
    generation.no_timestamps_token_id = ids["notimestamps"]
    generation.prev_sot_token_id = ids["startofprev"]
    generation.suppress_tokens = generation.begin_suppress_tokens = None
    generation.max_initial_timestamp_index = 50
    model.save_pretrained(tmp_path)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(tmp_path)

    asked, generate = [], WhisperForConditionalGeneration.generate

    def asking(self, *inputs, **options):
        names = ("language", "num_beams", "task")
        if "language" in options:  # not when it calls itself
            asked.append({name: options[name] for name in names})
        return generate(self, *inputs, **options | {"max_new_tokens": 8})

    monkeypatch.setattr(WhisperForConditionalGeneration, "generate", asking)
    waves = [recording("rms_1"), recording("slt_2"), recording("rms_2")]
    scorer = transformers_recogniser(str(tmp_path), language="de", batch=2)
    heard = scorer.transcribe(waves)
    assert heard == [scorer.transcribe([wave])[0] for wave in waves]
    assert {tuple(sorted(each.items())) for each in asked} == {
        (("language", "de"), ("num_beams", 1), ("task", "transcribe"))
    }
    assert len(set(heard)) > 1
    long = np.concatenate([waves[0]] * 14)
    assert len(long) > 30 * 16_000
    assert all(scorer.transcribe([long, waves[1]]))


def test_a_model_that_is_no_recogniser_is_refused(tmp_path):
    for name, said in ((f"asr:{tmp_path}", "recogniser"), (f"speaker:{tmp_path}", "verifier")):
        with pytest.raises(UserError, match=rf"the (speech |speaker )?{said} .* cannot be loaded"):
            load_scorer(name)


def test_a_speaker_verifier_of_transformers(tmp_path):
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        tdnn_dim=(16, 16, 16, 16, 32),
        xvector_output_dim=16,
    )
    model = WavLMForXVector(config).eval()
    model.save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    one, other = recording("rms_1"), recording("slt_2")
    found = xvector(str(tmp_path))([one, one, one, NOTHING], [""] * 4, [other, one, None, one])
    extract = Wav2Vec2FeatureExtractor()
    with torch.inference_mode():
        a, b = (
            model(**extract(wave, sampling_rate=16_000, return_tensors="pt")).embeddings[0]
            for wave in (one, other)
        )
    cosine = float(torch.cosine_similarity(a, b, dim=0))
    np.testing.assert_allclose(found["similarity"], [cosine, 1, np.nan, np.nan], atol=1e-5)


@pytest.mark.slow
def test_the_light_scorers_know_voices_and_noise():
    pytest.importorskip("resemblyzer", exc_type=ImportError)
    scorers = load_scorers(["resemblyzer", "dnsmos"])  # which checks the known answers
    rms, slt = recording("rms_2"), recording("slt_2")
    found, heard = score(scorers, [rms, slt, NOTHING], [KEYS] * 3, [recording("rms_1")] * 3)
    same, other, none = found["similarity"]
    assert same > 0.75 > 0.65 > other
    assert np.isnan(none)
    assert set(found) == {
        *("similarity", "dnsmos", "dnsmos_signal", "dnsmos_background", "dnsmos_p808")
    }
    assert 1 < found["dnsmos"][0] < 5
    assert np.isnan(found["dnsmos"][2])
    assert heard == ["", "", ""]


def test_utmos_from_a_copy_of_its_repository(tmp_path):
    (tmp_path / "hubconf.py").write_text(
        "import torch\n"
        "class Quiet(torch.nn.Module):\n"
        "    def forward(self, waves, sr):\n"
        "        assert sr == 16000\n"
        "        return 5 - waves.std(1)\n"
        "def utmos22_strong(**kwargs):\n"
        "    return Quiet()\n"
    )
    wave = recording("rms_1")
    found = load_scorer(f"utmos:{tmp_path}")([wave, NOTHING])
    np.testing.assert_allclose(found["utmos"], [5 - wave.std(ddof=1), np.nan], rtol=1e-5)
    (tmp_path / "hubconf.py").write_text("1/0\n")
    with pytest.raises(UserError, match="UTMOS cannot be loaded from"):
        utmos(str(tmp_path))


def test_paraformer_is_asked_as_funasr_wants_it(monkeypatch):
    class AutoModel:
        def __init__(self, model, **options):
            assert (model, options["device"]) == ("paraformer-zh", "cpu")

        def generate(self, input, fs, **options):
            assert fs == 16_000
            return [{"key": "a", "text": f" 你 好 {len(wave)}"} for wave in input]

    funasr = types.SimpleNamespace(AutoModel=AutoModel)
    monkeypatch.setitem(sys.modules, "funasr", funasr)
    waves = [np.zeros(500, np.float32), np.zeros(600, np.float32)]
    assert paraformer().transcribe(waves) == ["你 好 500", "你 好 600"]
    with pytest.raises(UserError, match="paraformer knows Chinese, not 'de'"):
        paraformer(language="de")


@pytest.mark.parametrize(
    ("scorer", "module", "fix"),
    [
        ("pocketsphinx", "jiwer", r"pip install llasa-jax\[evaluate\]"),
        ("pocketsphinx", "pocketsphinx", r"pip install llasa-jax\[evaluate\]"),
        ("dnsmos", "speechmos.dnsmos", r"pip install llasa-jax\[evaluate\]"),
        ("resemblyzer", "resemblyzer", "pip install --no-deps resemblyzer"),
        ("paraformer", "funasr", r"pip install llasa-jax\[paraformer\]"),
    ],
)
def test_a_missing_package_is_named(scorer, module, fix, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=fix):
        load_scorer(scorer)


def test_unknown_scorers_and_twins_are_refused(ctc):
    for name in ("wisper", "asr:", "levels:x", ""):
        with pytest.raises(UserError, match="there is no scorer"):
            load_scorer(name)
    with pytest.raises(UserError, match="levels and levels both measure head"):
        load_scorers(["levels", "levels"])


def tone(seconds, level=0.5):
    at = np.arange(round(16_000 * seconds)) / 16_000
    return (level * np.sin(2 * np.pi * 400 * at)).astype(np.float32)


def test_levels():
    silence = np.zeros(16_000, np.float32)
    hiss = tone(0.5, 0.5e-2)  # 40 dB below the speech
    wave = np.concatenate([silence[:3200], tone(1), silence[:8000], tone(0.5), hiss])
    found = load_scorer("levels")([wave, silence, NOTHING], ["Ten: letters!"] * 3, [None] * 3)
    numbers = {name: values[0] for name, values in found.items()}
    assert numbers == pytest.approx(
        {
            "head": 0.2,
            "longest_pause": 0.5,
            "tail": 0.5,
            "tail_noise": 0.01,
            "pace": 2.0 * 50 / 10,  # codes, by letters
            "seconds": 2.7,
            "silence": 60 / 135,  # frames of 20 ms
        },
        rel=1e-3,
    )
    assert found["seconds"].tolist() == [2.7, 1, 0]
    assert found["silence"][1:].tolist() == [1, 1]
    assert all(np.isnan(found[name][1:]).all() for name in Levels.higher_is_better)


@pytest.mark.slow
def test_scoring_in_processes_beside():
    with Scoring(["levels", "pocketsphinx"], processes=2) as scoring:
        assert scoring.higher_is_better["wer"] is False
        assert len(multiprocessing.active_children()) == 2
        first, second, again = (
            scoring.submit([recording(name)], [KEYS], [None])
            for name in ("rms_2", "rms_1", "rms_1")
        )
        assert first.result().transcripts == ["i left my keys on the table"]
        assert second.result().numbers["wer"][0] > 0.5
        # Which process scores it, and after what, changes nothing.
        assert second.result().of(0) == again.result().of(0)
    with pytest.raises(UserError, match="there is no scorer 'x'"):
        Scoring(["x"], processes=2)
    assert not multiprocessing.active_children()


def test_scorers_end_with_a_process_that_is_killed():
    code = (
        "import multiprocessing, time\n"
        "from llasa_jax.evaluate.scorers import Scoring\n"
        "if __name__ == '__main__':\n"
        "    scoring = Scoring(['levels'])\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        beside = int(process.stdout.readline())
        assert alive(beside)
        process.kill()
    deadline = time.monotonic() + 20
    while alive(beside):
        assert time.monotonic() < deadline, f"process {beside} is still there"
        time.sleep(0.1)


def alive(number):
    """Whether a process runs; one that has ended may still be listed, as a zombie (Linux)."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
