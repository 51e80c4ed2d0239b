"""docs/plans.md is what docs/make_plans.py prints: all plans are in it, estimates are current."""

import importlib.util

import pytest
from places import ROOT

PAGE = (ROOT / "docs" / "plans.md").read_text()


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("make_plans", ROOT / "docs" / "make_plans.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_and_overlay_is_planned(program):
    overlays = {path.stem for path in (ROOT / "configs" / "machines").glob("*.yaml")}
    assert overlays == {m for listed in program.PLANNED.values() for m in listed if ":" not in m}
    for recipe, machines in program.PLANNED.items():
        section = PAGE.split(f"## {recipe}\n")[1].split("\n## ")[0]
        lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
        assert [line.split("|")[1].strip() for line in lines] == [*map(program.topology, machines)]
        assert "does not fit" not in section


def test_pods_are_planned(program):
    lines = [line for line in PAGE.split("## Pods\n")[1].splitlines() if line.startswith("| llasa")]
    for line, (recipe, machine, changes) in zip(lines, program.PODS, strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[0] == recipe
        assert cells[1].replace("`", "") == changes
        assert (cells[2], cells[7]) == (machine, "compiled")


@pytest.mark.parametrize(
    ("recipe", "machine"),
    [
        ("llasa_1b_full", "1x24gb"),
        ("llasa_8b_full", "8x80gb"),
        ("llasa_3b_lora", "h100:1"),
        ("llasa_8b_qlora", "rtx4090:1"),
    ],
)
def test_estimates_are_current(program, recipe, machine):
    assert program.row(machine, program.planned(recipe, machine)) in PAGE, (
        "plans changed: run `python docs/make_plans.py > docs/plans.md`"
    )
