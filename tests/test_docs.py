"""README and docs: every command parses, every setting exists, every link of README leads to a
file, and the page of settings is what its program prints.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from llasa_jax import cli
from llasa_jax.train.parsing import parse_settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDED = ["--out=x", "--model.path=x", "--data.path=x"]


def commands():
    """(page, command) of every command of ours in a page or at the head of a recipe."""
    for page in [*PAGES, *sorted((ROOT / "configs").rglob("*.yaml"))]:
        text = page.read_text().replace("\\\n", " ")
        found = re.findall(r"^(?:[#$] *)?(llasa-jax .*)$", text, re.M)
        yield from ((page.name, " ".join(command.split())) for command in found)


def blocks(language: str):
    for page in PAGES:
        for block in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S):
            yield page.name, block


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_commands_parse(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command, comments=True)[1:]
    if words == ["--help"] or words[1:] == ["--help"]:
        return
    args, settings = cli.new_parser().parse_known_args(words)
    if not args.takes_settings or getattr(args, "encode", False):
        assert not settings
        return
    if getattr(args, "config", None):
        settings = [*(f"--config={config}" for config in args.config), *settings]
    parse_settings(settings)


@pytest.mark.parametrize(("page", "block"), list(blocks("yaml")))
def test_settings_in_yaml_blocks_exist(page, block, tmp_path):
    path = tmp_path / "block.yaml"
    path.write_text(block)
    given = "sources:" in block
    parse_settings([*(NEEDED[:2] if given else NEEDED), f"--config={path}"])


def test_there_are_commands_and_blocks():
    assert len(list(commands())) > 30
    assert len(list(blocks("yaml"))) > 2


def test_links_of_readme_lead_to_files():
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text()):
            if not target.startswith("http"):
                assert (ROOT / target).exists(), f"{name} links to {target}, which does not exist"


def test_readme_is_about_one_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110


def test_the_page_of_settings_is_current():
    program = [sys.executable, "docs/make_settings.py"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "docs/settings.md").read_text(), (
        "settings changed: run `python docs/make_settings.py > docs/settings.md`"
    )
