"""A family of one folder and one line runs through everything that the others run through."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import worldline
from worldline import memory
from worldline.errors import InputError
from worldline.family import FAMILIES
from worldline.memory import Memory
from worldline.opening import plan
from worldline.weights.checkpoint import save

from .cli.conftest import run_words
from .cli.results import alter, files_in
from .conftest import frames_of, moving
from .families.worlds import PLAIN, open_named
from .offloading import check_offloading

FOLDER = Path(__file__).parent / "toy_family"


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "toy", "tests.toy_family")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkpoint folder with the folder `toy`."""
    (tmp_path / "checkpoints" / "toy").mkdir(parents=True)
    folder = tmp_path / "checkpoints" / "toy"
    mix = torch.eye(4) * 0.9
    save({"toy.change.weight": mix}, folder / "model.safetensors")
    write_codec(folder, 4)
    (folder / "config.json").write_text(json.dumps({"num_video_frames": 5}))
    return folder.parent


def write_codec(folder: Path, channels: int) -> None:
    folder.mkdir(exist_ok=True)
    tensors = {"encode.weight": torch.eye(channels, 3), "decode.weight": torch.eye(3, channels)}
    save(tensors, folder / "codec.safetensors")


def load(root: Path, **options: object) -> worldline.World:
    return worldline.load("toy", checkpoint_dir=root, disable_guardrail=True, **options)


def test_it_is_small() -> None:
    files = (FOLDER / "request.py", FOLDER / "family.py")
    assert sum(len(path.read_text().splitlines()) for path in files) <= 150


def test_load_and_generate(root: Path, clip: Path, tmp_path: Path) -> None:
    world = load(root)
    video = world.generate(clip, strength=0.5)
    assert video.frames.shape == (5, 32, 48, 3)  # the model's own length
    means = [frame.mean() for frame in video.frames]
    assert all(later < 0.97 * earlier for earlier, later in pairwise(means))
    assert video.report["parameters"] == 16
    assert [stage["name"] for stage in video.report["run"]["stages"]] == [
        *("read", "encode", "denoise", "decode")
    ]
    assert json.loads(video.save(tmp_path / "o.mp4").with_suffix(".json").read_text())
    for options, message in (
        ({"strength": 2}, "strength is 2"),
        ({"strenght": 1}, "strenght: no such option; did you mean strength"),
    ):
        with pytest.raises(worldline.InputError, match=message):
            world.generate(clip, **options)
    with pytest.raises(worldline.InputError, match="toy continues a clip"):
        world.generate()


def test_it_takes_no_adapter(root: Path) -> None:
    with pytest.raises(InputError, match="lora='toy': toy takes no adapter"):
        load(root, lora="toy")


def test_in_one_batch_as_alone(root: Path) -> None:
    world, clips = load(root), [moving()[:3], moving()[5:9]]
    steps = world.stream_batch(clips, [{}, {"seed": 3}], strength=0.3)
    videos = {index: step.video for index, step in steps if step.video is not None}
    for index, input in enumerate(clips):
        alone = world.generate(input, strength=0.3)
        assert np.array_equal(videos[index].frames, alone.frames)


def test_the_command_and_resume(root: Path, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["toy", "--checkpoint_dir", root, "--input_image_or_video_path", clip]
    words += ["--disable_guardrail", "--video_save_folder", out]
    made = run_words([*words, "--strength", 0.5])
    assert made.exit_code == 0, made.output
    assert files_in(out) == {"output.mp4", "output.json"}
    first = (out / "output.mp4").stat().st_mtime_ns, frames_of(out / "output.mp4")
    again = run_words([*words, "--strength", "0.5", "--resume", "--offload_codec"])
    assert "before" in again.stdout
    assert (out / "output.mp4").stat().st_mtime_ns == first[0]
    for more in (["--strength", "0.4"], ["--num_video_frames", "6"]):
        other = run_words([*words, *more, "--resume"])
        assert other.exit_code == 0, other.output
        assert frames_of(out / "output.mp4") != first[1]
    run_words([*words, "--strength", 0.5, "--resume"])
    assert frames_of(out / "output.mp4") == first[1]
    codec = root / "toy" / "codec.safetensors"
    weights = codec.read_bytes()
    alter(codec)
    rerun = run_words([*words, "--strength", 0.5, "--resume"])
    codec.write_bytes(weights)
    assert "made again" in rerun.stderr
    wrong = run_words([*words, "--strength", "2"])
    assert wrong.exit_code == 2
    assert "--strength is 2" in wrong.stderr


def test_the_short_command_and_help(root: Path, clip: Path, tmp_path: Path) -> None:
    words = ["generate", "toy", "--checkpoint_dir", root]
    made = run_words([*words, clip, "--disable_guardrail", "-o", tmp_path / "short.gif"])
    assert made.exit_code == 0, made.output
    assert files_in(tmp_path) >= {"short.gif", "short.json"}
    for result in (run_words([*words, "--help"]), run_words(["toy", "--help"])):
        for flag in ("--strength", "--offload_network", "--codec_dir", "--resume"):
            assert flag in result.output
    assert "[default: 5]" in run_words([*words, "--help"]).output  # of the model
    assert "toy" in run_words(["--help"]).output


@pytest.mark.parametrize("flags", [("offload_codec", "offload_network"), ("offload_network",)])
def test_offloading(
    flags: tuple[str, ...], root: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = {"offload_codec": "Codec", "offload_network": "Linear"}
    used = ("Codec", "Linear", "Codec")
    check_offloading(
        lambda **more: load(root, **more), clip, {}, networks, used, flags, monkeypatch
    )


def test_memory_plan(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_named("toy", root)
    found = plan(opened, [opened.family.request.parse({"num_video_frames": 3})], PLAIN)
    frame, codec, network = 32 * 48 * 4 * 4, 2 * 3 * 4 * 4, 4 * 4 * 4
    assert found.flags == ("offload_codec", "offload_network")
    assert found.peak() == 3 * frame + codec + network
    assert found.peak(("offload_network",)) == 3 * frame + codec + network  # while it computes
    assert found.peak(found.flags) == 3 * frame + codec
    free = Memory(found.peak() - 1, 10**9)
    fit = found.fit(torch.device("cuda"), free)
    assert (fit.fits, fit.flags) == (True, found.flags)
    monkeypatch.setattr(memory, "device_memory", lambda device: free)
    with pytest.raises(
        worldline.InsufficientMemoryError, match="offload_codec=True, offload_network=True"
    ):
        found.refuse_unless_fits(torch.device("cuda"), ())


def test_parts_are_checked(root: Path) -> None:
    write_codec(root / "wide", 5)
    with pytest.raises(worldline.CheckpointError, match=r"wide.* 5 channels, .* 4"):
        load(root, codec_dir="wide")
    save({"encode.weight": torch.eye(4, 3)}, root / "toy" / "codec.safetensors")
    with pytest.raises(worldline.CheckpointError, match=r"decode\.weight"):
        load(root)
    with pytest.raises(worldline.InputError, match="offload_tokenizer: no such option"):
        load(root, offload_tokenizer=True)
