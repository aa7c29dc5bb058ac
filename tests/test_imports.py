"""Imports point one way: down the list of layers, never between siblings, never in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "worldline"

# a part may import parts of the lines below its own, and itself
LAYERS = (
    ("__main__",),
    ("cli",),
    ("world",),
    ("pipelines", "train", "evaluate"),
    ("loading",),
    ("places", "downloads"),
    ("catalog",),
    ("models", "text", "tokenizers", "guardrails"),
    ("nn", "sampling", "weights", "parallel", "video", "report", "hub"),
    ("shapes", "files", "machine", "choices"),
    ("errors",),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of everything of ours that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name"
            if node.module == "worldline":
                yield from ((node.lineno, f"worldline.{a.name}") for a in node.names)
            elif node.module:
                yield node.lineno, node.module


def files() -> list[Path]:
    return [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(SOURCE)))
def test_direction(path: Path) -> None:
    own = part_of(path)
    assert own in RANK, f"{own} has no layer in tests/test_imports.py"
    for line, name in imported(path):
        words = name.split(".")
        assert words[0] != "tiny", f"{path}:{line}: tiny/ is not in the wheel"
        if words[0] != "worldline":
            continue
        if len(words) == 1:  # the public names
            assert own in ("cli", "__main__"), f"{path}:{line}: only commands use the public names"
            continue
        other = words[1]
        if other == own:
            continue
        assert other in RANK, f"{path}:{line}: unknown part {other}"
        assert RANK[other] > RANK[own], f"{path}:{line}: {own} must not import {other}"


def module_of(path: Path) -> str:
    words = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(words[:-1] if words[-1] == "__init__" else words)


def imported_modules(path: Path, modules: set[str]) -> set[str]:
    """Return the modules of ours that a file imports, for types alone or in a function included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"  # a module, or a name in one
                found.add(inside if inside in modules else node.module)
    return found & modules


def test_no_circles() -> None:
    paths = {module_of(path): path for path in files()}
    graph = {module: imported_modules(path, set(paths)) for module, path in paths.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("part", ["models", "tokenizers"])
def test_families_do_not_know_each_other(part: str) -> None:
    for path in sorted((SOURCE / part).rglob("*.py")):
        relative = path.relative_to(SOURCE / part)
        for line, name in imported(path):
            words = name.split(".")
            if words[:2] == ["worldline", part] and len(words) > 2 and len(relative.parts) > 1:
                assert words[2] == relative.parts[0], f"{path}:{line}: another family"


def test_no_module_hides_a_public_name() -> None:
    """An imported submodule becomes an attribute of the package, in place of what had its name."""
    import worldline

    modules = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & set(worldline.__all__)


def test_networks_know_no_device_and_no_ranks() -> None:
    for part in ("models", "nn", "sampling", "tokenizers"):
        for path in (SOURCE / part).rglob("*.py"):
            text = path.read_text()
            assert ".cuda()" not in text, path
            assert "torch.distributed" not in text, path
            assert "set_default_dtype" not in text, path
