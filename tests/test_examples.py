"""Every example runs."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("script", ["continue_clip.py", "several_futures.py"])
def test_example(script: str, tmp_path: Path) -> None:
    arguments = {"continue_clip.py": ["out.mp4"], "several_futures.py": ["out.png", "1"]}[script]
    output = tmp_path / arguments[0]
    runpy.run_path(str(FOLDER / script))["main"](str(output), *arguments[1:])
    assert output.stat().st_size > 0


def test_every_example_is_tested() -> None:
    assert {path.name for path in FOLDER.glob("*.py")} == {"continue_clip.py", "several_futures.py"}
