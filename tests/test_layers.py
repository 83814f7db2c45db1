"""The import law of docs/architecture.md: an import goes down, or stays inside its own folder without a cycle."""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "cabochon"
ORACLE_USERS, ORACLE = ("cli.verify", "cli.baseline", "cli.peers"), "transformers"
TORCH_FREE = ("errors", "config", "variants", "formats", "chat", "kv.layout", "weights.params", "sizing")


@cache
def heights() -> dict[str, int]:
    """Room name -> layer, read from the drawing between the `layers` fences."""
    drawing = re.search(r"```layers\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.S)
    assert drawing, "docs/architecture.md has no ```layers block"
    rooms = {}
    for line in drawing[1].splitlines():
        number, _, names = line.partition(" ")
        rooms |= {name.rstrip("/"): int(number) for name in names.split()}
    return rooms


@cache
def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; a package's own name is its folder."""
    found = {}
    for path in (*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")):  # compiled modules have only the latter
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(name: str) -> tuple[tuple[str, bool], ...]:
    """(absolute dotted import, only for type checkers?) of a module; ours start with `cabochon`."""
    path = modules()[name]
    here = ["cabochon", *name.split(".")] if name else ["cabochon"]
    package = here if path.name == "__init__.py" else here[:-1]
    found = []
    for node, typing_only in _walk(ast.parse(path.read_text()), False):
        if isinstance(node, ast.Import):
            found += [(alias.name, typing_only) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            target = ".".join(filter(None, [base, node.module]))
            submodules = [f"{target}.{alias.name}" for alias in node.names]
            ours = [s for s in submodules if s.removeprefix("cabochon.") in modules()]
            found += [(s, typing_only) for s in ours or [target]]
    return tuple(found)


def _walk(tree, typing_only):
    for node in ast.iter_child_nodes(tree):
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        yield node, typing_only
        yield from _walk(node, typing_only or guarded)


def room(name: str) -> str:
    """The longest entry of the drawing that holds the module."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if ".".join(parts[:length]) in heights():
            return ".".join(parts[:length])
    raise AssertionError(f"{name} stands in no layer of docs/architecture.md")


def ours(name: str) -> list[str]:
    targets = [t.removeprefix("cabochon").removeprefix(".") for t, _ in imports(name) if t.split(".")[0] == "cabochon"]
    return [t for t in targets if t in modules() and t]


def test_imports_go_down():
    wrong = []
    for name in modules():
        if not name:
            continue
        for target in ours(name):
            mine, other = room(name), room(target)
            if mine != other and heights()[other] >= heights()[mine]:
                wrong.append(f"{name} (layer {heights()[mine]}) imports {target} (layer {heights()[other]})")
    assert not wrong, "\n".join(wrong)


def test_the_drawing_holds_no_room_that_is_not_there():
    assert not heights().keys() - modules().keys()


def test_no_cycles():
    done, path = set(), []

    def visit(name):
        assert name not in path, "cycle: " + " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for target in ours(name):
            if target != name:
                visit(target)
        path.pop()
        done.add(name)

    for name in modules():
        if name:
            visit(name)


def test_no_torch_where_it_is_not_needed():
    """Plain arithmetic and text start in milliseconds because nothing on their way imports torch."""
    reached, queue = set(), [m for m in modules() if any(m == t or m.startswith(t + ".") for t in TORCH_FREE)]
    wrong = []
    while queue:
        name = queue.pop()
        if name in reached:
            continue
        reached.add(name)
        for target, typing_only in imports(name):
            if target.split(".")[0] == "torch" and not typing_only:
                wrong.append(f"{name} imports torch")
        parents = [".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 1)]
        queue += [*(t for t in ours(name)), *(p for p in parents if p in modules())]
    assert not wrong, "\n".join(sorted(wrong))


def test_the_oracle_is_no_runtime_dependency():
    users = [n for n in modules() if n not in ORACLE_USERS and any(t.split(".")[0] == ORACLE for t, _ in imports(n))]
    assert not users, f"{users} import {ORACLE}"


def test_folders_are_one_level_deep():
    assert all(name.count(".") <= 1 for name in modules())
