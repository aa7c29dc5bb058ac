"""Walls of the house: size, imports, families and words; `tests/data/house.json` has the limits.

A limit may fall and never rise: `python tests/test_house.py` lowers each to what it measures.
"""

from __future__ import annotations

import ast
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "worldline"
HOUSE = ROOT / "tests" / "data" / "house.json"
LIMITS = json.loads(HOUSE.read_text())
FILES = sorted(SOURCE.rglob("*.py"))

# a part imports parts of lower lines, and itself
LAYERS = (
    ("__main__",),
    ("cli",),
    ("serve", "client"),
    ("world",),
    ("train", "evaluate"),
    ("families",),
    ("opening",),
    ("guards",),
    ("family",),
    ("inputs", "locate", "memory", "request", "step", "downloads"),
    ("catalog",),
    ("text", "tokenizers", "guardrails"),
    ("weights",),
    ("losses",),
    ("fleet", "lerobot", "parallel"),
    ("nn", "sampling", "video", "report"),
    ("finite",),
    ("yaml_documents",),
    ("documents", "repositories"),
    ("shapes", "files"),
    ("errors", "events"),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}

FAMILY_FOLDERS = ("families",)
FAMILY_NAMES = r"predict2[._]5|(?<![a-z])flow|diffusion|autoregressive"
FAMILY_CLASSES = "(Autoregressive|ARTransformer|Diffusion|DiT|Denoising|Flow)"
# where families are named (beginnings of paths)
NAMING = (
    *("families/", "family.py", "catalog.py", "cli/main.py"),
    *("tokenizers/", "text/", "guardrails/", "sampling/flow.py"),
)
# file -> family that it may import: the decoder of autoregressive worlds is a diffusion network
NEIGHBOURS = {"autoregressive/decoder.py": "diffusion"}
NETWORKS = {
    "autoregressive": {"families.autoregressive.model"},
    "diffusion": {"families.diffusion.model"},
    "predict2.5": {"families.predict2_5.model"},
}

FORBIDDEN = {
    "tell": r"(?<![a-z])(?!tell\(\))(tell|tells|telling|told)(?![a-z])",
    "say": r"(?<![a-z])(say|says|saying|said)(?![a-z])",
    "shown": r"(?<![a-z])shown(?![a-z])",
    "likewise": r"likewise",
    "wherefore": r"wherefore",
    "None for none": r"None for none",
    "what is left": r"what is left",
    "does without": r"(?<![a-z])(do|does|did) without",
    "Of": r"(?-i:(?<![A-Za-z])Of (?=[a-z`]))",
}

REQUESTS = {
    "diffusion text2world": "--diffusion_transformer_dir tiny-Cosmos-Predict1-7B-Video2World "
    "--prompt ball --num_video_frames 9 --num_steps 1 --video_save_folder .",
    "autoregressive base": "--ar_model_dir tiny-Cosmos-Predict1-4B --input_type image "
    "--input_image_or_video_path picture.png --disable_diffusion_decoder --video_save_folder .",
    "predict2.5": "--model tiny-Cosmos-Predict2.5-2B -i sample.json -o .",
}
SAMPLE = {"inference_type": "text2world", "name": "ball", "prompt": "ball", "num_steps": 1}

MOST_PARAMETERS = 10
# from Python 3.12 on an f-string has tokens of its own; it counts as one, as before
F_START, F_END = (getattr(tokenize, f"FSTRING_{end}", -1) for end in ("START", "END"))
COUNTED = {tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING, F_END}


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return name_of(path)[:-3].replace("/", ".").removesuffix("__init__").rstrip(".")


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def count_lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


def count_tokens(path: Path) -> int:
    """Tokens without layout and comments; a docstring is one token, and so is an f-string."""
    count = depth = 0
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        depth -= token.type == F_END
        count += token.type in COUNTED and depth == 0
        depth += token.type == F_START
    return count


def sizes() -> Iterator[tuple[str, int, str]]:
    """Names of limits, numbers, and where."""
    lines: Counter[str] = Counter()
    for path in FILES:
        folder = part_of(path) if path.parent != SOURCE else "."
        lines.update({f"lines/{folder}": count_lines([path]), "lines": count_lines([path])})
    yield from ((name, count, "") for name, count in lines.items())
    beside = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    yield "lines of tests and benchmarks", count_lines(beside), ""
    yield "tokens", sum(map(count_tokens, FILES)), ""


def long_signatures() -> Iterator[str]:
    """Functions of more than ten parameters that are no Triton kernels."""
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if any("triton." in ast.unparse(decorator) for decorator in node.decorator_list):
                continue
            arguments = node.args
            named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            names = {one.arg for one in (*named, arguments.vararg, arguments.kwarg) if one}
            if len(names - {"self", "cls"}) > MOST_PARAMETERS:
                yield f"{name_of(path)}:{node.lineno} {node.name}"


def files_naming_families() -> Iterator[str]:
    """Files in which a family's name stands though it should not, comments and docstrings aside."""
    for path in FILES:
        code = re.sub(r'"""[\s\S]*?"""', "", ast.unparse(tree_of(path)))  # no docstrings
        found = {match.lower() for match in re.findall(FAMILY_NAMES, code, re.IGNORECASE)}
        if found and not name_of(path).startswith(NAMING):
            yield f"{name_of(path)} {sorted(found)}"


def questions_of_family() -> Iterator[str]:
    """Calls of `isinstance` with a class of a family, outside its folder."""
    for path in (path for path in FILES if part_of(path) not in FAMILY_FOLDERS):
        for node in ast.walk(tree_of(path)):
            call = ast.unparse(node) if isinstance(node, ast.Call) else ""
            if re.match(rf"isinstance\(.*(?<!\w){FAMILY_CLASSES}", call):
                yield f"{name_of(path)}:{node.lineno}"


def forbidden_words() -> Iterator[tuple[str, int, str]]:
    texts = [*FILES, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for word, pattern in FORBIDDEN.items():
        found = {p: len(re.findall(pattern, p.read_text(), re.IGNORECASE)) for p in texts}
        where = [f"{path.relative_to(ROOT)} {count}" for path, count in found.items() if count]
        yield f"word/{word}", sum(found.values()), "\n".join(where)


def closure(command: str) -> Iterator[tuple[str, int, str]]:
    """What a real request has imported of `worldline` when it is done."""
    script = (
        "import json, sys\n"
        "from worldline.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as done: assert not done.code\n"
        "ours = [m for name, m in list(sys.modules.items()) if name.split('.')[0] == 'worldline']\n"
        "json.dump([m.__file__ for m in ours], open('modules.json', 'w'))\n"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        Image.new("RGB", (192, 128), "grey").save(folder / "picture.png")
        (folder / "sample.json").write_text(json.dumps(SAMPLE))
        words = [sys.executable, "-c", script, *command.split(), *REQUESTS[command].split()]
        environment = os.environ | {"PYTHONPATH": str(SOURCE.parent)}
        subprocess.run(words, check=True, cwd=folder, env=environment)
        files = [*map(Path, json.loads((folder / "modules.json").read_text()))]
    modules = {*map(module_of, files)}
    own = command.split()[0]
    foreign = [name for name in NETWORKS if name != own and modules & NETWORKS[name]]
    yield f"closure/{command}/files", len(files), " ".join(sorted(modules))
    yield f"closure/{command}/lines", count_lines(files), ""
    yield f"closure/{command}/foreign networks", len(foreign), " ".join(foreign)


@functools.cache
def counts() -> dict[str, tuple[int, str]]:
    """Name of a limit -> number today, and where."""
    found = {name: (number, where) for name, number, where in (*sizes(), *forbidden_words())}
    for count in (long_signatures, files_naming_families, questions_of_family):
        where = [*count()]
        found[count.__name__] = (len(where), "\n".join(where))
    return found


def check(name: str, number: int, where: str) -> None:
    assert name in LIMITS, f"{name} needs a limit in {HOUSE.name}; it is {number}"
    assert number <= LIMITS[name], f"{name}: {number} of at most {LIMITS[name]}\n{where}"


@pytest.mark.parametrize("name", [name for name in LIMITS if not name.startswith("closure")])
def test_limits(name: str) -> None:
    check(name, *counts().get(name, (0, "")))


def test_everything_has_a_limit() -> None:
    assert counts().keys() <= LIMITS.keys()
    assert count_lines((ROOT / "tiny").rglob("*.py")) <= 3200


@pytest.mark.parametrize("command", REQUESTS)
def test_what_a_request_imports(command: str) -> None:
    for limit in closure(command):
        check(*limit)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that a file imports, anywhere in it."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the whole name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", FILES[1:], ids=name_of)
def test_imports_point_down(path: Path) -> None:
    own = part_of(path)
    assert own in RANK, f"{own} has no layer in LAYERS"
    for line, name in imports_of(path):
        words = name.split(".")
        if words[0] != "worldline" or (len(words) > 1 and words[1] == own):
            continue
        if len(words) == 1 or words[1] not in RANK:
            assert own in ("cli", "__main__"), f"{path}:{line}: only commands use public names"
        else:
            assert RANK[words[1]] > RANK[own], f"{path}:{line}: {own} must not import {words[1]}"


@pytest.mark.parametrize("part", [*FAMILY_FOLDERS, "tokenizers"])
def test_families_do_not_know_each_other(part: str) -> None:
    for path in sorted((SOURCE / part).rglob("*.py")):
        inside = path.relative_to(SOURCE / part)
        for line, name in imports_of(path):
            words = name.split(".")
            if words[:2] != ["worldline", part] or len(inside.parts) < 2:
                continue
            if not (SOURCE / part / words[2]).is_dir():  # shared by families
                continue
            allowed = {inside.parts[0], NEIGHBOURS.get(inside.as_posix())}
            assert words[2] in allowed, f"{path}:{line}: another family"


def test_no_circles() -> None:
    modules = {f"worldline.{module_of(path)}": path for path in FILES[1:]}
    graph = {}
    for module, path in modules.items():
        names = {name for _, name in imports_of(path)}  # a module, or a name in one
        graph[module] = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] &= modules.keys()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_no_module_hides_a_public_name() -> None:
    """An imported submodule becomes an attribute of the package, in place of what had its name."""
    import worldline

    modules = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & set(worldline.__all__)


def test_networks_know_no_device_and_no_ranks() -> None:
    for part in ("families", "nn", "sampling", "tokenizers"):
        for path in (SOURCE / part).rglob("*.py"):
            text = path.read_text()
            assert ".cuda()" not in text, path
            assert "torch.distributed" not in text, path
            assert "set_default_dtype" not in text, path


if __name__ == "__main__":
    measured = {name: number for name, (number, _) in counts().items()}
    measured |= {name: number for command in REQUESTS for name, number, _ in closure(command)}
    lowered = {name: min(number, LIMITS.get(name, number)) for name, number in measured.items()}
    HOUSE.write_text(json.dumps(lowered, indent=1, sort_keys=True) + "\n")
