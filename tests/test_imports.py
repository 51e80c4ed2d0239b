"""The rooms of `llasa_jax` import only rooms on lower floors (docs/design.md)."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "llasa_jax"
# From the top floor to the ground. Rooms on one floor do not import each other.
FLOORS = (
    "cli demo",
    "serve",
    "finetune",
    "inspect plan",
    "train",
    "align",
    "evaluate",
    "generate encode",
    "convert data",
    "model codec",
    "speech",
    "runtime pages",
    "errors",
)
FLOOR = {room: len(FLOORS) - floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}


def imports(path: Path):
    """(line, module) of every import of our own in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "llasa_jax":
            yield from ((node.lineno, f"llasa_jax.{name.name}") for name in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llasa_jax."):
            yield node.lineno, node.module
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, n.name) for n in node.names if n.name.startswith("llasa_jax"))


def test_imports_point_down():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room == "__init__":
            continue
        for line, module in imports(path):
            other = module.split(".")[1]
            if other in FLOOR and other != room and FLOOR[other] >= FLOOR[room]:
                wrong.append(f"{path.relative_to(PACKAGE.parent)}:{line} {room} imports {module}")
    assert not wrong, "move the shared part to a lower floor:\n" + "\n".join(wrong)


def test_every_room_has_a_floor():
    rooms = {p.stem for p in PACKAGE.iterdir() if p.is_dir() or p.suffix == ".py"}
    assert rooms - {"__init__", "__pycache__"} == FLOOR.keys()


def test_modules_do_not_import_in_a_circle():
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        graph[name] = {module for _, module in imports(path)} - {name}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]):
        assert name not in above, "imports in a circle: " + " -> ".join((*above, name))
        if name not in done:
            for module in graph.get(name, ()):
                visit(module, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())
