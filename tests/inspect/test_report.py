"""The page holds together: well-formed, nothing from outside, and its numbers are those of the
records.
"""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from llasa_jax.cli import main
from llasa_jax.data.builder import write_dataset
from llasa_jax.errors import UserError
from llasa_jax.inspect.report import report
from llasa_jax.inspect.scan import scan
from llasa_jax.pages import pictures
from llasa_jax.speech.prompts import Utterance

TEXT = "the quick brown fox jumps over the lazy dog, "


class Page(HTMLParser):
    """Checks that every element is closed in order, and collects what is in headings, cells, tiles
    and pictures.
    """

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert self.open == ["html"] or not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def clip(i, **fields):
    rng = np.random.default_rng(i)
    text = TEXT * rng.integers(1, 4)
    row = {
        "id": f"clip{i:03d}",
        "text": text,
        "codes": rng.integers(0, 65_536, 3 * len(text) + i).astype(np.uint16),
    }
    return {"speaker": "ada", "description": "", "language": "en", **row, **fields}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    clips = [clip(i, speaker="ada" if i < 60 else "<b>&ben") for i in range(80)]
    clips[7] |= {"codes": np.full(2000, 12345, np.uint16), "text": "</td><script>alert(1)</script>"}
    clips[9] |= {"codes": clips[11]["codes"], "text": "Two clips, one sound"}
    folder = tmp_path_factory.mktemp("report") / "voice & co"
    write_dataset(
        folder,
        {"train": iter(clips), "validation": (clip(i, language="") for i in range(100, 110))},
        {"codec": "my codec"},
    )
    bad = [
        {"id": f"b{i}", "audio": "x", "reason": f"/a/b{i}.wav: silent; record it again"}
        for i in range(5)
    ]
    bad.append({"id": "k", "reason": "no end: the row was cut", "kept": True})
    folder.with_name("voice & co.bad.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in bad)
    )
    return folder


def test_the_page(folder, tmp_path, prompter):
    text = report(folder, tmp_path / "r.html", prompter, max_length=1024).read_text()
    page = Page(text)
    assert not [
        tag
        for tag, attributes in page.tags
        if tag in ("script", "img", "link", "iframe") or "src" in attributes or "href" in attributes
    ]
    assert not re.search(r"https?://|url\(|@import", text)
    assert sum(tag == "svg" for tag, _ in page.tags) >= 8
    assert not re.search(r"\b(nan|inf|None)\b", text)
    words = " ".join(page.words)
    for heading in (
        "Health",
        "Hours by speaker",
        "Hours by language",
        "How long clips are",
        "How many tokens they are",
        "Packed for training",
        "Text against speech",
        "Suspicious pairs",
        "The codebook",
        "The commonest codes",
        "The rarest codes",
        "Duplicates",
        "Left out",
    ):
        assert heading in words
    for fact in (
        "voice & co",
        "codes of my codec",
        "<b>&ben",
        "no language named",
        "80 train, 10 validation",
        "12345",
    ):
        assert fact in words
    assert "</td><script>alert(1)</script>" in words
    assert "clip009, clip011" in words or "clip011, clip009" in words
    assert "5 clips, when the dataset was made" in words
    assert "color-scheme: light dark" in text
    assert "prefers-color-scheme: dark" in text


def test_numbers_are_the_records(folder, tmp_path, prompter):
    words = " ".join(
        Page(report(folder, tmp_path / "r.html", prompter, max_length=1024).read_text()).words
    )
    rows = [clip(i) for i in range(80)]
    rows[7]["codes"], rows[9]["codes"] = np.zeros(2000), rows[11]["codes"]
    train = sum(len(row["codes"]) for row in rows)
    total = train + sum(len(clip(i)["codes"]) for i in range(100, 110))
    assert f"{total / 50 / 60:.0f} min of speech" in words
    # What is drawn is what is packed: every row at least half full, and far better than padded.
    full, padded = re.search(
        r"Rows are ([\d.]+)% full; padded, with one clip a row, ([\d.]+)%", words
    ).groups()
    assert 70 < float(full) <= 100
    assert float(padded) < float(full)


def test_without_a_tokenizer_and_in_part(folder, tmp_path):
    words = " ".join(Page(report(folder, tmp_path / "r.html", sample=20).read_text()).words)
    assert "20 of 80 clips of train looked at" in words
    assert "Packed for training" not in words
    assert "80 train, 10 validation" in words


def test_one_clip_alone(tmp_path):
    write_dataset(
        tmp_path / "one",
        {"train": iter([clip(0, codes=np.array([5], np.uint16), speaker="", language="")])},
        {},
    )
    text = report(tmp_path / "one", tmp_path / "r.html").read_text()
    Page(text)
    assert "nan" not in text
    assert "No clip was left out" in text


def test_command(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").is_file()
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "new.html")]) == 2
    assert "no dataset of codes" in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "torn")
    next((tmp_path / "torn").glob("*validation*")).unlink()
    with pytest.raises(UserError, match="lacks llasa_speech-validation"):
        report(tmp_path / "torn", tmp_path / "new.html")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sample", "0"], "argument --sample: must be at least 1"),
        (["--sample", "-1"], "argument --sample: must be at least 1"),
        (["--max-length", "0"], "argument --max-length: must be at least 2"),
        (["--max-length", "-1"], "argument --max-length: must be at least 2"),
        (["--max-length", "10000000000"], "argument --max-length: must be at least 2"),
        (["--out", ""], "--out is '.'"),
        (["--out", "."], "--out is '.'"),
        (["--out", "no/such/r.html"], "no/such: no such folder"),
    ],
)
def test_what_cannot_be_written_is_refused_at_once(folder, arguments, said, capsys):
    assert main(["report", str(folder), *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("max_length", [1, 50])
def test_no_clip_fits(folder, tmp_path, prompter, max_length):
    page = report(folder, tmp_path / "r.html", prompter, max_length=max_length).read_text()
    assert f"No clip fits a row of {max_length} tokens." in " ".join(Page(page).words)


def test_a_damaged_list_of_bad_clips_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "voice")
    (tmp_path / "voice.bad.jsonl").write_text('{"id": "a", "reason": "x"}\n{"id": "b"\n')
    with pytest.raises(UserError, match=r"voice.bad.jsonl, line 2"):
        report(tmp_path / "voice", tmp_path / "r.html")


def test_bars_and_columns_are_to_scale():
    drawn = pictures.bars(["a", "b"], [1.0, 4.0], ["one", "four"])
    long = [float(h) + float(r) for h, r in re.findall(r'd="M\d+ \d+h([\d.]+)a([\d.]+)', drawn)]
    assert long[1] == pytest.approx(4 * long[0], rel=0.01)
    values = np.repeat([1.0, 5.0, 9.0], [10, 30, 20])
    drawn = pictures.histogram(values, "s", 8.0, "limit")
    counts = [int(count) for count in re.findall(r": (\d+) clips", drawn)]
    columns = re.findall(r'class="mark" d="M[\d.]+ [\d.]+v-([\d.]+)a[\d.]+ ([\d.]+)', drawn)
    tall = [float(straight) + float(corner) for straight, corner in columns]
    assert counts == [10, 30, 20]
    assert [t / tall[0] for t in tall] == pytest.approx([1, 3, 2], rel=0.02)
    assert ">limit<" in drawn


def test_packed_rows_show_each_clip():
    rows = np.array([[1] * 30 + [2] * 50 + [0] * 20, [1] * 100])
    drawn = pictures.packed_rows(rows, width=1000)
    assert [int(n) for n in re.findall(r"<title>(\d+) tokens", drawn)] == [30, 50, 100]
    assert [float(w) for w in re.findall(r'class="mark[^>]*width="([\d.]+)"', drawn)] == [
        298,
        498,
        998,
    ]


def test_numbers_are_short():
    assert [pictures.number(n) for n in (0, 7, 2.5, 12.5, 950, 12_345, 2_000_000)] == [
        "0",
        "7",
        "2.5",
        "12.5",
        "950",
        "12.3k",
        "2M",
    ]
    assert [pictures.span(s) for s in (4.21, 130, 5400, 1e6)] == [
        "4.2 s",
        "2 min",
        "1.5 h",
        "278 h",
    ]


def test_a_scan_counts_every_code_once():
    clips = [Utterance("a", np.array(codes, np.uint16)) for codes in ([1, 1, 2], [65_535], [1])]
    one = scan(clips, 10)
    assert {int(code): int(one.usage[code]) for code in np.flatnonzero(one.usage)} == {
        1: 3,
        2: 1,
        65_535: 1,
    }
    assert (one.codes.tolist(), one.distinct.tolist(), one.tokens) == ([3, 1, 1], [2, 1, 1], None)
    assert one.code_digests[1] != one.code_digests[2]
    assert scan(clips, 2).indices.tolist() == [0, 2]
