"""Mixtures: exact, seeded, each source with its own prompt, every
record once an epoch.
"""

import dataclasses
import json
import pickle
from collections import Counter

import numpy as np
import pytest
import yaml

from llasa_jax.data.batching import (
    BatchShape,
    Mix,
    Source,
    StreamShare,
    batches,
    drawn,
    draws_per_epoch,
    measure,
)
from llasa_jax.data.builder import write_dataset
from llasa_jax.data.conversations import Conversations
from llasa_jax.data.settings import SourceSettings
from llasa_jax.demo.tiny_llama import make_tiny_tokenizer
from llasa_jax.encode.mixture import codec_of, open_sources
from llasa_jax.errors import UserError
from llasa_jax.speech.prompts import Conversation, Prompter, Utterance
from llasa_jax.speech.settings import PromptSettings
from llasa_jax.train.parsing import parse_settings

SHAPE = BatchShape(accumulation=1, rows=4, length=256)


@pytest.fixture(scope="module")
def prompters():
    tokenizer = make_tiny_tokenizer()
    return {task: Prompter(tokenizer, PromptSettings(task=task)) for task in ("tts", "asr", "chat")}


@pytest.fixture(scope="module")
def sources(prompters):
    """Nine parts speech, one part chat."""
    rng = np.random.default_rng(0)
    speech = [
        Utterance("some words", rng.integers(0, 65_536, 20 + i % 90).astype(np.uint16), f"clip{i}")
        for i in range(90)
    ]
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "the lazy dog"}]
    chat = [
        Conversation([*turns, {"role": "user", "content": f"{i}"}, *turns[1:]], f"chat{i}")
        for i in range(7)
    ]
    return [Source(speech, prompters["tts"], 0.9), Source(chat, prompters["chat"], 0.1)]


@pytest.mark.parametrize(
    "weights",
    [(0.9, 0.1), (0.7, 0.3), (1, 1), (3,), (0.35, 0.15, 0.3, 0.2), (1e-3, 1.0), (5, 2.5, 1)],
)
def test_every_window_has_its_share(weights):
    whole = [
        round(weight * 1000 / np.gcd.reduce([round(weight * 1000) for weight in weights]))
        for weight in weights
    ]
    period, mix = sum(whole), Mix(weights)
    picks = [mix[k] for k in range(3 * period)]
    for start in {0, 1, period // 3, period, 2 * period - 1}:
        assert Counter(source for source, _ in picks[start : start + period]) == dict(
            enumerate(whole)
        )
    for source in range(len(weights)):
        assert [at for picked, at in picks if picked == source] == list(range(3 * whole[source]))
    source, at = picks[period // 2]
    assert mix[10**15 * period + period // 2] == (source, 10**15 * whole[source] + at)
    # Never far from the exact share in between either.
    for k in range(1, period):
        counts = Counter(source for source, _ in picks[:k])
        assert all(
            abs(counts[source] - k * whole[source] / period) < len(weights)
            for source in range(len(weights))
        )


def test_order(sources):
    draws = [drawn(sources, 3)[k] for k in range(200)]
    assert [record.id for _, record in draws] == [drawn(sources, 3)[k][1].id for k in range(200)]
    assert [record.id for _, record in draws] != [drawn(sources, 4)[k][1].id for k in range(200)]
    assert Counter(source for source, _ in draws) == {0: 180, 1: 20}
    for source in range(2):
        ids = [record.id for i, record in draws if i == source]
        size = len(sources[source].records)
        epochs = [ids[at : at + size] for at in range(0, len(ids) - size + 1, size)]
        assert len(epochs) == 2
        assert set(epochs[0]) == set(epochs[1]) == {record.id for record in sources[source].records}
        assert epochs[0] != epochs[1]


@pytest.mark.parametrize("size", [1, 2, 4, 63])
def test_few_records_are_shuffled_each_epoch(sources, size):
    order = drawn([Source(sources[0].records[:size], sources[0].prompter)], 0)
    ids = [order[k][1].id for k in range(50 * size)]
    epochs = [ids[at : at + size] for at in range(0, len(ids), size)]
    assert all(set(epoch) == set(epochs[0]) and len(set(epoch)) == size for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) >= min(size, 20)


def test_one_dataset_under_two_tasks_is_in_two_orders(sources):
    draws = [drawn([sources[0]] * 2, 3)[k] for k in range(360)]
    first, second = ([record.id for i, record in draws if i == source] for source in range(2))
    assert len({tuple(ids[at : at + 90]) for ids in (first, second) for at in (0, 90)}) == 4


def test_an_epoch_is_one_pass_over_the_first_source(sources):
    assert draws_per_epoch(sources) == 100
    assert draws_per_epoch(sources[::-1]) == 70
    fit = measure(sources, 256, seed=3)
    lengths = [
        [len(source.prompter.example(record).tokens) for record in source.records]
        for source in sources
    ]
    expected = sum(lengths[0]) + sum(lengths[1]) + 3 * lengths[1][0]
    assert (fit.clips, fit.too_long, fit.tokens, fit.exact) == (100, 0, expected, True)
    assert fit.shares == pytest.approx((sum(lengths[0]) / expected, 1 - sum(lengths[0]) / expected))
    packed = list(batches(sources[:1], SHAPE, seed=0, repeat=False))
    used = sum((batch["segment_ids"].max(-1) > 0).sum() for batch in packed)
    assert measure(sources[:1], 256, seed=0).rows == pytest.approx(used, abs=1)
    loose = measure(sources, 256, seed=3, pack=False)
    assert loose.rows == 100
    assert loose.steps(1.5, SHAPE) == 38
    assert (
        f"100 clips, {expected} tokens in 100 rows of 256, {expected / 25600:.1%} full; 0 too long"
        in str(loose)
    )


@pytest.mark.parametrize("streams", [2, 3, 8])
def test_streams_share_every_source(streams):
    """The chat is every fourth draw: dealt out in turn, one of two streams would have it all."""
    mix, shares = Mix([3, 1]), [StreamShare(i, streams, seed=0) for i in range(streams)]
    blocks = [[share[k][1] for share in shares] for k in range(1000)]
    assert [sorted(block) for block in blocks] == [
        list(range(k * streams, (k + 1) * streams)) for k in range(1000)
    ]
    for stream in range(streams):
        chats = sum(mix[block[stream]][0] for block in blocks)
        assert chats == pytest.approx(250, abs=50)  # 250 of 1,000, deviating by 14


def test_validation_takes_every_source_once(sources):
    count = sum(
        batch["segment_ids"].max(-1).sum()
        for batch in batches(sources, SHAPE, seed=0, repeat=False)
    )
    assert count == 97


def test_resumes_within_a_mixture(sources):
    iterator = iter(batches(sources, SHAPE, seed=3))
    for _ in range(5):
        next(iterator)
    state, expected = iterator.get_state(), [next(iterator) for _ in range(40)]
    again = iter(batches(sources, SHAPE, seed=3))
    again.set_state(state)
    for batch in expected:
        for name, array in next(again).items():
            np.testing.assert_array_equal(array, batch[name])


LINES = [
    {
        "id": "a",
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": "Hi\u2028"},
            {"role": "assistant", "content": "Ho"},
        ],
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hé"}]},
]


def test_conversations_from_jsonl(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(
        "\n" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in LINES), encoding="utf-8"
    )
    chats = pickle.loads(pickle.dumps(Conversations(path)))
    assert len(chats) == 2
    assert chats[0] == Conversation(
        [{"role": "user", "content": "Hi\u2028"}, {"role": "assistant", "content": "Ho"}], "a"
    )
    assert chats[1].messages == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hé"},
    ]
    assert chats[1].id.endswith("chat.jsonl, line 4")


def test_a_system_text_beside_the_conversation_is_its_first_turn(tmp_path):
    path = tmp_path / "chat.jsonl"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    rows = [{"conversations": turns, "system": "Be nice."}, {"conversations": turns, "system": ""}]
    path.write_text("\n".join(map(json.dumps, rows)))
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    chats = Conversations(path)
    assert chats[0].messages == [{"role": "system", "content": "Be nice."}, *said]
    assert chats[1].messages == said


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "chat.jsonl, line 2: not JSON"),
        ("[]", "chat.jsonl, line 2: no messages"),
        ('{"text": "Hi"}', "chat.jsonl, line 2: no messages"),
        (
            '{"messages": [{"role": "tool", "content": "Hi"}]}',
            "line 2: a message has role 'tool' and content 'Hi'",
        ),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            "line 2: a message has role 'user' and content None",
        ),
        ('{"messages": [{"role": ["user"], "content": "Hi"}]}', "line 2: a message has role None"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "line 2: .* surrogate pair"),
        ('{"messages": ' + "[" * 100_000, "line 2: not JSON"),
        (
            '{"system": "a", "conversations": [{"from": "system", "value": "b"}]}',
            "line 2: has a system text beside the messages and a system turn in them",
        ),
    ],
)
def test_bad_lines_are_named(tmp_path, line, complaint):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(LINES[1]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=complaint):
        Conversations(path)[1]


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl: no such file"):
        Conversations(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="empty.jsonl: no conversations"):
        Conversations(tmp_path / "empty.jsonl")
    chat = SourceSettings(
        path=str(tmp_path / "c.jsonl"),
        validation_split="validation",
        prompt=PromptSettings(task="chat"),
    )
    with pytest.raises(UserError, match="c.jsonl: a file of conversations has no splits"):
        open_sources([chat])


SOURCES = [
    {"path": "voice", "weight": 0.9, "validation_split": "validation"},
    {"path": "c.jsonl", "weight": 0.1, "prompt": {"task": "chat"}},
]


def write(tmp_path, **changes):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "out": "o",
                "model": {"path": "m"},
                "data": {"sources": SOURCES},
                "prompt": {"system": "Sing."},
            }
            | changes
        )
    )
    return f"--config={path}"


def test_sources_in_a_config(tmp_path):
    speech, chat = parse_settings([write(tmp_path)]).sources
    assert (speech.path, speech.split, speech.validation_split, speech.weight) == (
        "voice",
        "train",
        "validation",
        0.9,
    )
    assert (speech.prompt.task, speech.prompt.system) == ("tts", "Sing.")
    assert (chat.path, chat.weight, chat.prompt.task, chat.prompt.system) == (
        "c.jsonl",
        0.1,
        "chat",
        "",
    )
    third = parse_settings([write(tmp_path), "--data.sources+={path: more, weight: 2}"]).sources[2]
    assert (third.path, third.weight, third.prompt.system) == ("more", 2.0, "Sing.")
    (only,) = parse_settings([write(tmp_path), "--data.sources=[{path: other}]"]).sources
    assert only.path == "other"
    (simple,) = parse_settings(
        [write(tmp_path, data={"path": "voice", "validation_split": "v"})]
    ).sources
    assert simple == SourceSettings("voice", "train", "v", 1.0, speech.prompt, "offline")


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (
            {"path": "a", "weight": 0},
            r"data.sources\[1\].weight is 0.0; it must be at least 1e-06",
        ),
        ({"path": "a", "weight": -1.5}, r"data.sources\[1\].weight is -1.5"),
        ({"path": "a", "weight": float("nan")}, r"data.sources\[1\].weight is nan"),
        ({"weight": 1.0}, r"data.sources\[1\].path is not set"),
        (
            {"pth": "a"},
            r"unknown setting data.sources.pth in .*recipe.yaml; did you mean data.sources.path\?",
        ),
        (
            {"path": "a", "prompt": {"usr": "{text}"}},
            r"unknown setting data.sources.prompt.usr .* did you mean data.sources.prompt.user\?",
        ),
        (
            {"path": "a", "prompt": {"user": "{txet}"}},
            r"data.sources\[1\].prompt.user mentions {txet}",
        ),
        ({"path": "a", "prompt": {"task": "sing"}}, "sing"),
    ],
)
def test_mistakes_in_sources(tmp_path, source, complaint):
    with pytest.raises(UserError, match=complaint):
        parse_settings([write(tmp_path, data={"sources": [SOURCES[0], source]})])


def test_a_model_card_names_every_source_by_its_last_part(tmp_path):
    from llasa_jax.convert.model_card import model_card

    sources = [source | {"path": f"/home/me/{source['path']}"} for source in SOURCES]
    settings = parse_settings([write(tmp_path, data={"sources": sources})])
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(dataclasses.asdict(settings)))
    card = model_card(
        tmp_path, {"prompt": dataclasses.asdict(settings.prompt)}, "me/voice", 3, True
    )
    assert "Data: `voice`, `c.jsonl`." in card
    assert "/home" not in card
    assert "Sing." in card


def test_one_way_or_the_other(tmp_path):
    with pytest.raises(
        UserError, match="data.sources lists the datasets and their splits; leave data.path"
    ):
        parse_settings([write(tmp_path), "--data.path=voice"])


def test_a_mixture_of_two_codecs_is_refused(tmp_path):
    fields = ("id", "text", "codes", "speaker", "description", "language")
    clip = Utterance("Some words.", np.arange(60, dtype=np.uint16), "one")
    for name, fingerprint in (("ours", "f1"), ("theirs", "f2"), ("unsaid", "unknown")):
        row = {field: getattr(clip, field) for field in fields}
        write_dataset(
            tmp_path / name,
            {"train": iter([row])},
            {"codec": f"{name} codec", "fingerprint": fingerprint},
        )

    def sources(*names):
        return [SourceSettings(str(tmp_path / name), prompt=PromptSettings()) for name in names]

    assert codec_of(sources("ours", "unsaid")) == {"codec": "ours codec", "fingerprint": "f1"}
    assert codec_of(sources("unsaid")) == {}
    with pytest.raises(
        UserError,
        match="holds codes of ours codec and .* of theirs codec; encode both with the same codec",
    ):
        codec_of(sources("ours", "unsaid", "theirs"))


def test_a_mixture_speaks_with_the_prompt_of_its_first_spoken_source(tmp_path):
    chat, spoken = (
        {"path": "c.jsonl", "prompt": {"task": "chat"}},
        {"path": "voice", "prompt": {"system": "Sing softly."}},
    )
    assert (
        parse_settings([write(tmp_path, data={"sources": [chat, spoken]})]).voice.system
        == "Sing softly."
    )
    assert parse_settings([write(tmp_path, data={"sources": [chat]})]).voice.task == "chat"
