"""Every example runs; every benchmark can be imported."""

import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from worldline.errors import InputError
from worldline.step import Step, Video

from .stub_server import Stub

FOLDER, BENCHMARKS = (Path(__file__).parents[1] / name for name in ("examples", "benchmarks"))


ARGUMENTS = {
    "continue_clip.py": ["out.mp4"],
    "diffusers_style.py": ["out.mp4", "2"],
    "several_futures.py": ["out.png", "1"],
    "side_by_side.py": ["out.gif", "2"],
}


@pytest.mark.parametrize("script", ARGUMENTS)
def test_example(script: str, tmp_path: Path) -> None:
    name, *others = ARGUMENTS[script]
    runpy.run_path(str(FOLDER / script))["main"](str(tmp_path / name), *others)
    assert (tmp_path / name).stat().st_size > 0


def test_every_example_is_tested() -> None:
    others = {"gradio_space.py", "rerun_compare.py"}  # below, with a fake of what they need
    assert {path.name for path in FOLDER.glob("*.py")} == ARGUMENTS.keys() | others


def make(fields: dict[str, Any], input: Path | None) -> Iterator[Step]:
    if fields.get("seed") == "13":
        raise InputError("seed is 13")
    frames = np.full((3, 128, 192, 3), 9, np.uint8)
    yield Step("done", 1, 1, frames, video=Video(frames, 8.0))


def test_rerun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)  # as where it is not installed
    main = runpy.run_path(str(FOLDER / "rerun_compare.py"))["main"]
    with pytest.raises(SystemExit, match="rerun-sdk"):
        main()
    rerun, blueprint = ModuleType("rerun"), ModuleType("rerun.blueprint")
    logged: list[tuple[str, Any]] = []
    for name in ("Spatial2DView", "TimeSeriesView", "Horizontal"):
        setattr(blueprint, name, SimpleNamespace if name != "Horizontal" else lambda *views: views)
    functions = {
        "init": lambda name: None,
        "save": lambda path, default_blueprint: Path(path).write_bytes(b"rrd"),
        "set_time": lambda name, sequence: logged.append((name, sequence)),
        "log": lambda name, value: logged.append((name, value)),
        "Image": np.shape,
        "Scalars": float,
        "blueprint": blueprint,
    }
    vars(rerun).update(functions)
    monkeypatch.setitem(sys.modules, "rerun", rerun)
    monkeypatch.setitem(sys.modules, "rerun.blueprint", blueprint)
    with Stub(tmp_path, make) as stub:
        main(str(tmp_path / "out.rrd"), stub.url)
    assert [name for name, _ in logged] == 3 * ["frame", "truth", "prediction", "error"]
    assert logged[2] == ("prediction", (128, 192, 3))


def test_gradio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gradio, made = ModuleType("gradio"), []

    def interface(function: Any, inputs: Any, output: Any, title: str) -> Any:
        made.append(function)
        return SimpleNamespace(launch=lambda: None)

    def component(*_: Any, **__: Any) -> None: ...

    vars(gradio).update(Error=RuntimeError, Interface=interface, Progress=lambda: component)
    vars(gradio).update(dict.fromkeys(("Textbox", "Image", "Number", "Video"), component))
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    with Stub(tmp_path, make) as stub:
        monkeypatch.setenv("WORLDLINE_URL", stub.url)
        runpy.run_path(str(FOLDER / "gradio_space.py"))["main"]()
        [generate] = made
        picture = Image.new("RGB", (8, 8))
        assert Path(generate("a ball", picture, 3)).stat().st_size > 0
        with pytest.raises(RuntimeError, match="13"):
            generate("", picture, 13.0)


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    assert runpy.run_path(str(script))["__doc__"]
