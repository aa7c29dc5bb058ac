"""Every example runs; every benchmark can be imported."""

import runpy
from pathlib import Path

import pytest

FOLDER, BENCHMARKS = (Path(__file__).parents[1] / name for name in ("examples", "benchmarks"))


ARGUMENTS = {
    "continue_clip.py": ["out.mp4"],
    "several_futures.py": ["out.png", "1"],
    "side_by_side.py": ["out.gif", "2"],
}


@pytest.mark.parametrize("script", ARGUMENTS)
def test_example(script: str, tmp_path: Path) -> None:
    name, *others = ARGUMENTS[script]
    runpy.run_path(str(FOLDER / script))["main"](str(tmp_path / name), *others)
    assert (tmp_path / name).stat().st_size > 0


def test_every_example_is_tested() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == ARGUMENTS.keys()


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    assert runpy.run_path(str(script))["__doc__"]
