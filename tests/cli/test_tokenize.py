"""Clips and images to latents or token ids and back, through the command line."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import worldline.weights.checkpoint
from tiny.clips import make_clips
from tiny.export import cosmos_tensors, draw_weights
from worldline.evaluate.metrics import psnr
from worldline.locate import BUNDLED
from worldline.tokenizers.cosmos.model import PRESETS, CosmosTokenizer
from worldline.tokenizers.cosmos.weights import open_tokenizer
from worldline.video.read import probe, read_image, read_video
from worldline.video.write import write_video
from worldline.weights.checkpoint import open_checkpoint, save

from ..conftest import moving
from .conftest import Run

DISCRETE = "tiny-Cosmos-Tokenize1-DV8x16x16-720p"
CONTINUOUS = "Cosmos-Tokenize1-CV8x8x8-720p"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip that the bundled tokenizer knows: 40 frames, sides that are no multiples of 16."""
    path = tmp_path_factory.mktemp("scenes") / "scene.mp4"
    write_video(make_clips([1_000_003], 40, 90, 150).frames[0].numpy(), path, 25)
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A continuous tokenizer with random weights, in the official layout."""
    root = tmp_path_factory.mktemp("checkpoints")
    (root / CONTINUOUS).mkdir()
    torch.manual_seed(0)
    model = CosmosTokenizer(replace(PRESETS["CV8x8x8"], channels=4, level_channels=(8, 8, 8)))
    draw_weights(model)
    for half, tensors in cosmos_tensors(model).items():
        save(tensors, root / CONTINUOUS / f"{half}.safetensors")
    return root


def test_a_clip_of_any_size_comes_back(run: Run, scene: Path, tmp_path: Path) -> None:
    words = ("--tokenizer_dir", DISCRETE, "--output_dir", tmp_path, "--device", "cpu")
    result = run("tokenize", "encode", scene, *words)
    assert result.exit_code == 0, result.stderr
    assert "40 frames of 150 x 90 in tokens 6 x 6 x 10" in result.stdout
    stored = open_checkpoint(tmp_path / "scene.safetensors")
    tokens = stored.read("tokens")
    assert tokens.dtype == torch.int32
    assert tokens.shape == (6, 6, 10)  # 41 frames of 96 x 160
    text = {name: stored.metadata[name] for name in ("tokenizer", "frames", "height", "width")}
    assert text == {"tokenizer": DISCRETE, "frames": "40", "height": "90", "width": "150"}
    assert float(stored.metadata["fps"]) == 25

    result = run("tokenize", "decode", tmp_path / "scene.safetensors", "--output_dir", tmp_path)
    assert result.exit_code == 0, result.stderr
    video, original = read_video(tmp_path / "scene.mp4"), read_video(scene)
    assert video.frames.shape == original.frames.shape
    assert video.fps == 25
    each = [psnr(a[None], b[None]) for a, b in zip(video.frames, original.frames, strict=True)]
    # as well as such a small picture can be, and no frame stands out, such as a piece's last
    assert min(each) > np.mean(each) - 4 > 18


def test_a_long_clip_is_coded_as_one(run: Run, scene: Path, tmp_path: Path) -> None:
    """The ids in the file are those of the whole clip, though it went through in pieces."""
    words = ("--tokenizer_dir", DISCRETE, "--output_dir", tmp_path, "--device", "cpu")
    assert run("tokenize", "encode", scene, *words).exit_code == 0
    frames = read_video(scene).frames
    frames = np.pad(frames, ((0, 1), (0, 6), (0, 10), (0, 0)), mode="edge")
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 255 * 2 - 1
    folder = BUNDLED / DISCRETE.removeprefix("tiny-")
    model = open_tokenizer(folder).read("cpu", torch.float32)
    tokens = open_checkpoint(tmp_path / "scene.safetensors").read("tokens")
    # a value next to a rounding boundary may fall either way
    assert (model.encode_tokens(video)[0] != tokens).float().mean() < 0.005


def test_folders_of_clips_and_images(run: Run, checkpoints: Path, tmp_path: Path) -> None:
    media, coded, out = tmp_path / "media", tmp_path / "coded", tmp_path / "out"
    media.mkdir()
    write_video(moving(9, 40, 64), media / "a.mp4", 12)
    Image.fromarray(moving(1, 21, 35)[0]).save(media / "b.png")
    write_video(moving(4, 16, 24), media / "c.gif", 10)
    write_video(moving(15, 16, 24), media / "d.gif", 30)
    (media / "notes.txt").write_text("not media")
    words = ("--checkpoint_dir", checkpoints, "--device", "cpu")
    result = run("tokenize", "encode", media, *words, "--output_dir", coded)
    assert result.exit_code == 0, result.stderr
    assert "skipped: notes.txt" in result.stderr
    shapes = {
        path.name: tuple(open_checkpoint(path).read("latents").shape) for path in coded.iterdir()
    }
    assert shapes == {
        "a.safetensors": (16, 2, 5, 8),
        "b.safetensors": (16, 1, 3, 5),
        "c.safetensors": (16, 2, 2, 3),
        "d.safetensors": (16, 3, 2, 3),
    }
    result = run("tokenize", "decode", coded, *words, "--output_dir", out)
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        *("a.json", "a.mp4", "b.json", "b.png", "c.json", "c.mp4", "d.json", "d.mp4")
    ]
    a, c, d = (probe(out / f"{name}.mp4") for name in "acd")
    assert (d.frames, d.fps) == (15, 30)  # half a second, as the GIF's delays
    assert (a.frames, a.height, a.width, a.fps) == (9, 40, 64, 12)
    assert (c.frames, c.height, c.width, c.fps) == (4, 16, 24, 10)
    assert read_image(out / "b.png").frames.shape == (1, 21, 35, 3)


def test_resuming_makes_what_is_not_there_or_differs(
    run: Run, checkpoints: Path, tmp_path: Path
) -> None:
    clips, coded, out = tmp_path / "clips", tmp_path / "coded", tmp_path / "out"
    clips.mkdir()
    for name in "ab":
        write_video(moving(9), clips / f"{name}.mp4", 25)
    words = ("--checkpoint_dir", checkpoints, "--device", "cpu", "--resume")
    encode = ("tokenize", "encode", clips, *words, "--output_dir", coded)
    decode = ("tokenize", "decode", coded, *words, "--output_dir", out)

    def folder_of(command: tuple[object, ...]) -> object:
        return command[command.index("--output_dir") + 1]

    def made(*command: object) -> set[str]:
        result = run(*command)
        assert result.exit_code == 0, result.stderr
        *lines, text = result.stdout.splitlines()
        since = f": {len(lines)} made now, 1 there before" if len(lines) < 2 else ""
        assert text == f"2 of 2 files are in {folder_of(command)}{since}"
        return {Path(line.split(":")[0]).stem for line in lines}

    assert made(*encode) == {"a", "b"}
    assert made(*decode) == {"a", "b"}
    for command in (encode, decode):
        result = run(*command)
        text = f"2 of 2 files are in {folder_of(command)}: 0 made now, 2 there before\n"
        assert result.stdout == text
    (coded / "a.safetensors").unlink()
    os.utime(clips / "b.mp4", (1, 1))  # contents decide
    assert made(*encode) == {"a"}
    whole = (coded / "a.safetensors").read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole.replace(b'"25.0"', b'"24.0"')):
        assert damaged != whole
        (coded / "a.safetensors").write_bytes(damaged)
        assert made(*encode) == {"a"}
    (out / "b.json").unlink()
    assert made(*decode) == {"a", "b"}
    (out / "b.mp4").write_bytes(b"")
    assert made(*decode) == {"b"}
    write_video(moving(17), clips / "b.mp4", 25)
    assert made(*encode) == {"b"}
    assert made(*encode, "--dtype", "bfloat16") == {"a", "b"}


def test_all_bad_inputs_are_named(run: Run, checkpoints: Path, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(clip.read_bytes()[:500])
    (tmp_path / "empty").mkdir()
    bad = (tmp_path / "broken.mp4", tmp_path / "absent.png", tmp_path / "empty", tmp_path / "a.wav")
    words = ("--checkpoint_dir", checkpoints, "--output_dir", tmp_path / "out")
    result = run("tokenize", "encode", clip, *bad, *words)
    assert result.exit_code == 2
    for path in bad:
        assert str(path) in result.stderr
    assert not (tmp_path / "out").exists()


def test_outputs_that_collide_are_refused(
    run: Run, checkpoints: Path, clip: Path, tmp_path: Path
) -> None:
    Image.fromarray(moving(1)[0]).save(tmp_path / "clip.png")
    words = ("--checkpoint_dir", checkpoints, "--output_dir", tmp_path)
    result = run("tokenize", "encode", clip, tmp_path / "clip.png", *words)
    assert result.exit_code == 2
    assert f"{clip} would both become {tmp_path / clip.stem}.safetensors" in result.stderr

    (tmp_path / "clip.png").rename(tmp_path / "CLIP.png")
    result = run("tokenize", "encode", clip, tmp_path / "CLIP.png", *words)
    assert result.exit_code == 2
    assert f"{tmp_path / 'CLIP.png'} and {clip} would both become" in result.stderr

    write_video(moving(9), tmp_path / "own.mp4", 25)
    assert run("tokenize", "encode", tmp_path / "own.mp4", *words).exit_code == 0
    before = (tmp_path / "own.mp4").read_bytes()
    result = run("tokenize", "decode", tmp_path / "own.safetensors", *words)
    assert result.exit_code == 2
    assert "it is an input" in result.stderr
    assert (tmp_path / "own.mp4").read_bytes() == before


def test_files_of_another_tokenizer_are_refused(
    run: Run, checkpoints: Path, clip: Path, tmp_path: Path
) -> None:
    words = ("--checkpoint_dir", checkpoints, "--output_dir", tmp_path)
    assert run("tokenize", "encode", clip, *words).exit_code == 0
    latents = tmp_path / "clip.safetensors"
    result = run("tokenize", "decode", latents, "--tokenizer_dir", DISCRETE, "--output_dir", "out")
    assert result.exit_code == 2
    assert "holds latents" in result.stderr

    stored = open_checkpoint(latents)
    tensor, text = stored.read("latents"), dict(stored.metadata)
    for change, wrong in (
        ({"frames": "90"}, tensor),
        ({"frames": "-1"}, tensor),
        ({"fps": "fast"}, tensor),
        ({"width": "none"}, tensor),
        ({}, tensor[:3]),
        ({}, tensor[0]),
    ):
        save({"latents": wrong}, tmp_path / "wrong.safetensors", text | change)
        result = run("tokenize", "decode", tmp_path / "wrong.safetensors", *words)
        assert result.exit_code == 2, (change, result.stderr)
        assert "wrong.safetensors" in result.stderr
    save({"weight": tensor}, tmp_path / "wrong.safetensors")
    words = (*words, "--tokenizer_dir", CONTINUOUS)
    result = run("tokenize", "decode", tmp_path / "wrong.safetensors", *words)
    assert "holds weight, the tokenizer decodes latents" in result.stderr


def test_latents_and_tokens_of_a_wrong_type_are_named(
    run: Run, checkpoints: Path, tmp_path: Path
) -> None:
    grid = (16, 1, 2, 2)
    bad = {
        "a": {"latents": torch.zeros(grid, dtype=torch.int32)},
        "b": {"latents": torch.zeros(grid, dtype=torch.bool)},
        "c": {"tokens": torch.zeros(grid[1:])},
        "d": {"tokens": torch.zeros(grid[1:], dtype=torch.bool)},
    }
    for name, tensors in bad.items():
        save(tensors, tmp_path / f"{name}.safetensors")
    save({"latents": torch.zeros(grid)}, tmp_path / "z.safetensors")
    words = ("--checkpoint_dir", checkpoints, "--output_dir", tmp_path / "out")
    result = run("tokenize", "decode", tmp_path, *words, "--tokenizer_dir", CONTINUOUS)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 4
    for name in bad:
        assert f"{name}.safetensors" in result.stderr
    assert "are needed, not torch.int32" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_refused(
    run: Run, checkpoints: Path, tmp_path: Path, wrong: float
) -> None:
    latents = torch.zeros(16, 1, 2, 2)
    latents[3, 0, 1, 0] = wrong
    save({"latents": latents}, tmp_path / "z.safetensors")
    words = ("--checkpoint_dir", checkpoints, "--output_dir", tmp_path / "out")
    path = tmp_path / "z.safetensors"
    result = run("tokenize", "decode", path, *words, "--tokenizer_dir", CONTINUOUS)
    assert result.exit_code == 2
    assert "z.safetensors: tensor latents holds" in result.stderr
    assert not list((tmp_path / "out").iterdir())


def test_a_task_that_fails_does_not_end_the_batch(
    run: Run, checkpoints: Path, tmp_path: Path
) -> None:
    """H.264 holds no video as wide as the first one."""
    for name, columns in (("a", 2051), ("b", 2)):
        save({"latents": torch.zeros(16, 1, 1, columns)}, tmp_path / f"{name}.safetensors")
    words = ("--checkpoint_dir", checkpoints, "--output_dir", tmp_path / "out")
    words = (*words, "--tokenizer_dir", CONTINUOUS, "--device", "cpu")
    result = run("tokenize", "decode", tmp_path, *words)
    assert result.exit_code == 1
    assert "1/2 " in result.stderr
    assert "a.mp4 was not written: libx264 cannot encode frames of 16408 x 8" in result.stderr
    assert "1 of 2 inputs failed" in result.stderr
    assert result.stdout.endswith(f"1 of 2 files are in {tmp_path / 'out'}\n")
    again = run("tokenize", "decode", tmp_path, *words, "--resume")
    assert "1 of 2 inputs failed" in again.stderr
    text = f"1 of 2 files are in {tmp_path / 'out'}: 0 made now, 1 there before\n"
    assert again.stdout == text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b.json", "b.mp4"]
    result = run("tokenize", "decode", tmp_path / "a.safetensors", *words)
    assert result.exit_code == 1
    assert "unexpected" not in result.stderr


@pytest.mark.parametrize(
    ("failure", "text", "goes_on"),
    [
        (RuntimeError("a kernel\nfailed"), "RuntimeError: a kernel\n", True),
        (torch.OutOfMemoryError("no 3 GB left."), "OutOfMemoryError: no 3 GB left.\n", True),
        (MemoryError(), "MemoryError\n", True),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device\n", False),
    ],
    ids=["unexpected", "device-memory", "host-memory", "full-disk"],
)
def test_what_ends_a_batch_and_what_does_not(
    run: Run,
    checkpoints: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    text: str,
    goes_on: bool,
) -> None:
    clips, out = tmp_path / "clips", tmp_path / "out"
    clips.mkdir()
    for name in "abc":
        shutil.copy(clip, clips / f"{name}.mp4")
    real = worldline.weights.checkpoint.save

    def failing(tensors: dict[str, torch.Tensor], path: Path, header: dict[str, object]) -> None:
        if path.name == "b.safetensors":
            raise failure
        real(tensors, path, header)

    monkeypatch.setattr(worldline.weights.checkpoint, "save", failing)
    words = ("--checkpoint_dir", checkpoints, "--output_dir", out, "--device", "cpu")
    result = run("tokenize", "encode", clips, *words)
    assert result.exit_code == 1
    assert text in result.stderr
    assert ("1 of 3 inputs failed" in result.stderr) == goes_on
    left = ["a.safetensors", "c.safetensors"] if goes_on else ["a.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == left


def test_latents_without_a_header_decode_whole(run: Run, checkpoints: Path, tmp_path: Path) -> None:
    save({"latents": torch.zeros(16, 2, 3, 4)}, tmp_path / "z.safetensors")
    words = ("--checkpoint_dir", checkpoints, "--output_dir", tmp_path)
    result = run("tokenize", "decode", tmp_path / "z.safetensors", *words)
    assert result.exit_code == 2
    assert "--tokenizer_dir" in result.stderr
    result = run(
        "tokenize", "decode", tmp_path / "z.safetensors", *words, "--tokenizer_dir", CONTINUOUS
    )
    assert result.exit_code == 0, result.stderr
    info = probe(tmp_path / "z.mp4")
    assert (info.frames, info.height, info.width, info.fps) == (9, 24, 32, 24)
    report = json.loads((tmp_path / "z.json").read_text())
    assert report["output"] == str(tmp_path / "z.mp4")


def test_a_tokenizer_that_is_not_there(run: Run, clip: Path, tmp_path: Path) -> None:
    for name, word in (("Cosmos-X", "Cosmos-X"), ("tiny-X", DISCRETE)):
        result = run(
            *("tokenize", "encode", clip, "--tokenizer_dir", name),
            *("--checkpoint_dir", tmp_path, "--output_dir", tmp_path),
        )
        assert result.exit_code == 2
        assert word in result.stderr


def test_reconstructing(run: Run, checkpoints: Path, tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    write_video(moving(9, 40, 64), media / "a.mp4", 12)
    Image.fromarray(moving(1, 21, 35)[0]).save(media / "b.png")
    words = ("--video_pattern", media / "*", "--checkpoint_dir", checkpoints, "--device", "cpu")
    result = run(
        *("tokenize", "reconstruct", *words),
        *("--tokenizer_type", "CV8x8x8-720p", "--save_input", "--mode", "jit"),
    )
    assert result.exit_code == 0, result.stderr
    assert "9 frames of 64 x 40" in result.stdout
    assert " dB" in result.stdout
    out = media / "reconstructions"
    assert sorted(path.name for path in out.iterdir()) == [
        *("a.mp4", "a_input.mp4", "b.png", "b_input.png")
    ]
    assert np.array_equal(
        read_image(out / "b_input.png").frames, read_image(media / "b.png").frames
    )
    halves = [checkpoints / CONTINUOUS / f"{half}.safetensors" for half in ("encoder", "decoder")]
    result = run(
        *("tokenize", "reconstruct", *words),
        *("--checkpoint_enc", halves[0], "--checkpoint_dec", halves[1]),
        *("--temporal_window", 5, "--short_size", 30, "--output_fps", 10),
        *("--output_dir", tmp_path / "windows"),
    )
    assert result.exit_code == 0, result.stderr
    info = probe(tmp_path / "windows" / "a.mp4")
    assert (info.frames, info.height, info.width, info.fps) == (9, 30, 48, 10)


def test_an_odd_clip_is_printed_as_it_is_written(
    run: Run, checkpoints: Path, tmp_path: Path
) -> None:
    path = tmp_path / "a.gif"
    write_video(moving(3, 21, 35), path, 10)
    words = ("--checkpoint_dir", checkpoints, "--device", "cpu", "--output_dir", tmp_path)
    assert "35 x 21" in run("tokenize", "encode", path, *words).stdout
    result = run("tokenize", "decode", tmp_path / "a.safetensors", *words)
    info = probe(tmp_path / "a.mp4")
    assert f"{info.width} x {info.height}" in result.stdout
    assert (info.width, info.height) == (36, 22)


def test_reconstructing_what_is_not_there(run: Run, checkpoints: Path, tmp_path: Path) -> None:
    for words, text in (
        ((), "--video_pattern"),
        (("--video_pattern", tmp_path / "*.mp4"), "fits no file"),
        (("--video_pattern", tmp_path / "*.png"), "give one of --checkpoint"),
        (("--video_pattern", tmp_path / "*.png", "--checkpoint_enc", "x"), "--checkpoint_enc with"),
    ):
        Image.fromarray(moving(1)[0]).save(tmp_path / "a.png")
        result = run("tokenize", "reconstruct", *words)
        assert result.exit_code == 2
        assert text in result.stderr
