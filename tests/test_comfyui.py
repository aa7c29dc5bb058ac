"""The nodes for ComfyUI, with a fake of its interface."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import worldline
from worldline.errors import InputError
from worldline.step import Step, Video

from .fake_comfy import Components, Fake, Interrupted, VideoFromComponents
from .stub_server import Stub

FOLDER = Path(__file__).parents[1] / "integrations" / "comfyui"
NAME, PACK = "tiny-Cosmos-Predict2.5-2B", "comfyui_worldline"
OPTIONS = {"seed": 4, "num_video_frames": 5, "num_steps": 2, "guidance": 0.0, "prompt": "a ball"}
SLOTS = {
    "WorldlineLoadWorld": (
        "name STRING, checkpoint_dir STRING, offload BOOLEAN, load_options STRING?",
        "WORLD",
    ),
    "WorldlineRemoteWorld": ("url STRING, model STRING", "WORLD"),
    "WorldlineGenerateWorldVideo": (
        "world WORLD, prompt STRING, seed INT, num_video_frames INT, width INT, height INT, "
        "num_steps INT, guidance FLOAT, images IMAGE?, video VIDEO?, options STRING?",
        "IMAGE, VIDEO, STRING",
    ),
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    return Fake(monkeypatch, str(tmp_path))


@pytest.fixture
def nodes(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The pack, imported by its path as ComfyUI does it."""
    spec = importlib.util.spec_from_file_location(
        PACK, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
    )
    assert spec is not None
    assert spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, PACK, pack)
    monkeypatch.delitem(sys.modules, f"{PACK}.nodes", raising=False)
    spec.loader.exec_module(pack)
    return sys.modules[f"{PACK}.nodes"]


class Recorded:
    """A world that keeps what it was asked for."""

    name = "recorded"

    def __init__(self) -> None:
        self.given: Any = None
        self.options: dict[str, Any] = {}
        self.steps, self.closed = 0, False

    def stream(self, given: Any = None, **options: Any) -> Iterator[Step]:
        self.given, self.options = given, options
        frames = np.full((2, 4, 6, 3), 51, np.uint8)
        try:
            for done in range(3):
                self.steps += 1
                yield Step("denoise", done, 3, preview=frames[:1] if done else None)
            yield Step("done", 1, 1, frames, video=Video(frames, 12.5, {}, "a ball"))
        finally:
            self.closed = True


def test_schemas(nodes: ModuleType) -> None:
    extension = asyncio.run(nodes.comfy_entrypoint())
    found = {}
    for node in asyncio.run(extension.get_node_list()):
        schema = node.define_schema()
        inputs = (f"{s.id} {s.type}{'?' * bool(s.options.get('optional'))}" for s in schema.inputs)
        found[schema.node_id] = ", ".join(inputs), ", ".join(s.type for s in schema.outputs)
        assert schema.category == "worldline"
        defaults = [slot for slot in schema.inputs if slot.type not in ("WORLD", "IMAGE", "VIDEO")]
        assert all("default" in slot.options for slot in defaults)
    assert found == SLOTS


def test_pack() -> None:
    pack = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    project = tomllib.loads((FOLDER.parents[1] / "pyproject.toml").read_text())["project"]
    assert "comfyui" not in pack["project"]["name"].lower()
    assert pack["project"]["version"] == project["version"]
    assert {"PublisherId", "DisplayName"} <= pack["tool"]["comfy"].keys()


def test_a_local_world(nodes: ModuleType, fake: Fake) -> None:
    with torch.inference_mode():  # as ComfyUI runs its nodes
        loaded = nodes.LoadWorld.execute(NAME, "", False)
        [world] = loaded.args
        assert "guardrails: off" in loaded.ui
        assert fake.unloads == 1
        size = {"width": 192, "height": 128}
        made = nodes.GenerateWorldVideo.execute(world, **OPTIONS, **size)
        frames, video, report = made.args
        again = nodes.GenerateWorldVideo.execute(world, **OPTIONS, **size)
    assert (again.args[0] == frames).all()
    assert (frames.shape, frames.dtype) == ((5, 128, 192, 3), torch.float32)
    assert (float(frames.min()) >= 0, float(frames.max()) <= 1) == (True, True)
    local = worldline.load(NAME).generate(**OPTIONS, **size)
    assert ((frames * 255).round().numpy() == local.frames).all()
    assert video.get_components().frame_rate == local.fps
    assert video.get_components().images is frames
    facts = json.loads(report)
    assert (facts["seed"], facts["prompt"], facts["request"]["num_steps"]) == (4, "a ball", 2)
    assert all(facts["value"] <= facts["max_value"] for facts in fake.progress)
    assert isinstance(fake.progress[-1]["preview_image"], Image.Image)


def test_offload_sets_every_flag_of_the_family(nodes: ModuleType, fake: Fake) -> None:
    [world] = nodes.LoadWorld.execute(NAME, "", True, '{"dtype": "float32"}').args
    assert "offload_diffusion_model" in world.opened.options.offloaded


def test_a_remote_world(nodes: ModuleType, fake: Fake, tmp_path: Path) -> None:
    asked = Recorded()

    def make(fields: dict[str, Any], input: Path | None) -> Iterator[Step]:
        return asked.stream(input, **fields)

    with Stub(tmp_path, make, guardrails=True) as stub:
        connected = nodes.RemoteWorld.execute(f" {stub.url} ", "")
        assert "guardrails: on" in connected.ui
        [world] = connected.args
        frames, _, report = nodes.GenerateWorldVideo.execute(world, **OPTIONS).args
    assert frames.shape == (2, 4, 6, 3)
    assert bool((frames == 51 / 255).all())
    assert asked.options == {**OPTIONS, "model": world.name}
    assert json.loads(report)["seed"] == 4


def test_an_interrupt_ends_between_steps(nodes: ModuleType, fake: Fake, tmp_path: Path) -> None:
    fake.patience = 1
    world = Recorded()
    with pytest.raises(Interrupted):
        nodes.GenerateWorldVideo.execute(world, **OPTIONS)
    assert (world.steps, world.closed) == (2, True)

    def endless(fields: dict[str, Any], input: Path | None) -> Iterator[Step]:
        while not stub.cancelled:
            yield Step("denoise", 1, 2)

    fake.looks = 0
    with Stub(tmp_path, endless) as stub:
        [remote] = nodes.RemoteWorld.execute(stub.url, "").args
        with pytest.raises(Interrupted):
            nodes.GenerateWorldVideo.execute(remote, **OPTIONS)
        assert stub.cancelled == [*stub.jobs]


def test_inputs(nodes: ModuleType, fake: Fake) -> None:
    run = nodes.GenerateWorldVideo.execute
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), np.uint8)
    images = torch.from_numpy(frames).float() / 255
    world = Recorded()
    zeros = {"num_video_frames": 0, "width": 0, "height": 0, "num_steps": 0}
    run(world, "  ", 0, **zeros)
    assert (world.given, world.options) == (None, {"seed": 0})
    run(world, "", 0, images[:1], options='{"temperature": 0.5, "seed": 9}', **zeros)
    assert isinstance(world.given, Image.Image)
    assert (np.asarray(world.given) == frames[0]).all()
    assert world.options == {"seed": 9, "temperature": 0.5}
    run(world, "", 0, images)
    assert (world.given == frames).all()
    clear = torch.cat([images, torch.zeros(3, 4, 6, 1)], dim=-1)
    run(world, "", 0, clear)
    assert (world.given == 255).all()
    one = VideoFromComponents(Components(images[:1] * 2 - 0.5, nodes.Fraction(8)))
    run(world, "", 0, video=one)
    assert world.given.shape == (1, 4, 6, 3)  # a clip of one frame is a clip
    with pytest.raises(InputError, match="video"):
        run(world, "", 0, images, one)
    for text in ("{", "[1]", "3"):
        with pytest.raises(InputError, match="options"):
            run(world, "", 0, options=text)
