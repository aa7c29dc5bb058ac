"""What is wrong at first sight is told at once: torch, which takes seconds, is not imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from worldline.cli import main

from .conftest import WITHOUT_PARTS, WITHOUT_UPSAMPLER

TINY = ("--diffusion_transformer_dir", "tiny-Cosmos-Predict1-7B-Video2World", "--prompt", "x")
TEXT2WORLD = ("diffusion", "text2world")
VIDEO2WORLD = ("diffusion", "video2world", *TINY, "--input_image_or_video_path")
BASE = ("autoregressive", "base", *WITHOUT_PARTS, "--input_image_or_video_path")
RELEASED = (*TEXT2WORLD, *WITHOUT_UPSAMPLER, "--prompt", "x")

# in a folder with: a video clip.mp4; an empty picture.png; text in noise.mp4; a folder of notes
REFUSED = (
    TEXT2WORLD,
    (*TEXT2WORLD, "--prompt", "x"),
    (*TEXT2WORLD, "--prompt", ""),
    (*TEXT2WORLD, *TINY, "--steps", "3"),
    (*TEXT2WORLD, *TINY, "--sampler", "heun"),
    (*TEXT2WORLD, *TINY, "--height", "100"),
    (*TEXT2WORLD, *TINY, "--num_video_frames", "10"),
    (*TEXT2WORLD, *TINY, "--seed", "-1"),
    (*TEXT2WORLD, *TINY, "--fps", "0"),
    (*TEXT2WORLD, *TINY, "--num_gpus", "2"),
    (*TEXT2WORLD, *TINY, "--video_save_name", "x.avi"),
    (*TEXT2WORLD, *TINY, "--video_save_folder", "clip.mp4/x"),
    (*TEXT2WORLD, *TINY, "--tokenizer_dir", "nowhere"),
    (*TEXT2WORLD, *TINY, "--text_encoder_dir", "nowhere"),
    (*TEXT2WORLD, *TINY, "--prompt_embeddings", "nowhere"),
    (*TEXT2WORLD, "--diffusion_transformer_dir", "tiny-nothing", "--prompt", "x"),
    RELEASED,
    (*RELEASED, "--checkpoint_dir", "notes"),
    (*VIDEO2WORLD, "picture.png"),
    (*VIDEO2WORLD, "noise.mp4"),
    (*VIDEO2WORLD, "nowhere.mp4"),
    (*VIDEO2WORLD, "clip.mp4", "--num_input_frames", "9", "--batch_input_path", "x"),
    ("autoregressive", "base"),
    (*BASE, "noise.mp4"),
    (*BASE, "clip.mp4", "--seed", "-1"),
    (*BASE, "clip.mp4", "--top_p", "2"),
    (*BASE, "clip.mp4"),
    (*BASE, "clip.mp4", "--ar_model_dir", "tiny-nothing"),
    ("tokenize", "encode", "nowhere.mp4"),
    ("tokenize", "encode", "noise.mp4"),
    ("tokenize", "encode", "clip.mp4"),
    ("tokenize", "encode", "clip.mp4", "--tokenizer_dir", "tiny-nothing"),
    ("tokenize", "decode", "nowhere.safetensors"),
    ("tokenize", "reconstruct"),
    ("evaluate", "nowhere"),
    ("evaluate", "notes"),
    ("evaluate", ".", "--output", "x.txt"),
    ("evaluate", ".", "--num_input_frames", "99"),
    ("demo", "--seed", "-1"),
)


def statuses(lines: list[tuple[str, ...]], folder: Path) -> dict[str, object]:
    """Run command lines one after another in a process; return those that import torch as True."""
    script = "import json, sys\nfrom worldline.cli import main\nfound = {}\n"
    script += f"for words in json.loads({json.dumps(json.dumps(lines))}):\n"
    script += "    try: main(words)\n"
    script += "    except SystemExit as end: found[' '.join(words)] = end.code\n"
    script += "    if 'torch' in sys.modules: found[' '.join(words)] = True; break\n"
    script += "print(); print(json.dumps(found))"
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture
def folder(clip: Path, tmp_path: Path) -> Path:
    (tmp_path / "clip.mp4").symlink_to(clip)
    (tmp_path / "picture.png").touch()
    (tmp_path / "noise.mp4").write_text("hello")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.json").write_text("{}")
    return tmp_path


def test_refusals_import_no_torch(folder: Path) -> None:
    found = statuses([*REFUSED], folder)
    assert found == {" ".join(words): 2 for words in REFUSED}


def pages(command: click.Command, *words: str) -> list[tuple[str, ...]]:
    found = [(*words, "--help")]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            found += pages(below, *words, name)
    return found


def test_help_imports_no_torch(tmp_path: Path) -> None:
    asked = pages(main)
    assert ("diffusion", "video2world", "--help") in asked
    assert statuses(asked, tmp_path) == {" ".join(words): 0 for words in asked}
