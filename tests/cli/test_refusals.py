"""What is wrong at first sight is told at once: torch, which takes seconds, is not imported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from worldline.cli import main
from worldline.video.write import write_video

from ..conftest import moving
from .conftest import WITHOUT_PARTS, WITHOUT_UPSAMPLER

TINY = ("--diffusion_transformer_dir", "tiny-Cosmos-Predict1-7B-Video2World", "--prompt", "x")
TEXT2WORLD = ("diffusion", "text2world")
VIDEO2WORLD = ("diffusion", "video2world", *TINY, "--input_image_or_video_path")
BASE = ("autoregressive", "base", *WITHOUT_PARTS, "--input_image_or_video_path")
PROMPTED = ("autoregressive", "video2world", *WITHOUT_PARTS, "--input_image_or_video_path")
FLOW = ("predict2.5",)
SAMPLES = (*FLOW, "-i", "good.json", "-o", "out")
UNGUARDED = (*SAMPLES, "--disable-guardrails")
RELEASED = (*TEXT2WORLD, *WITHOUT_UPSAMPLER, "--prompt", "x")

# in a folder with: a sample good.json; a video clip.mp4; an empty picture.png; text in noise.mp4; a
# folder of notes and two folders of pictures of 8 x 8 that move; each line with words of what is
# told
REFUSED: dict[tuple[str, ...], str] = {
    TEXT2WORLD: "no prompt",
    (*TEXT2WORLD, "--prompt", "x"): "no checkpoint folder checkpoints",
    (*VIDEO2WORLD[:2], "--input_image_or_video_path", "clip.mp4"): "no checkpoint folder",
    (*TEXT2WORLD, *TINY, "--guardrail_dir", ""): "--guardrail_dir is empty",
    ("checkpoints", "download"): "nothing is named",
    ("checkpoints", "download", "Cosmos-Predict1-4C"): "did you mean",
    (*TEXT2WORLD, "--prompt", ""): "--prompt is empty",
    (*TEXT2WORLD, *TINY, "--steps", "3"): "--steps",
    (*TEXT2WORLD, *TINY, "--sampler", "heun"): "'heun' is not one of",
    (*TEXT2WORLD, *TINY, "--height", "0"): "height is 0",
    (*TEXT2WORLD, *TINY, "--num_video_frames", "-7"): "num_video_frames is -7",
    (*TEXT2WORLD, *TINY, "--seed", "-1"): "seed is -1",
    (*TEXT2WORLD, *TINY, "--fps", "0"): "fps is 0",
    (*TEXT2WORLD, *TINY, "--num_gpus", "2"): "give --num_gpus 1",
    (*TEXT2WORLD, *TINY, "--video_save_name", "x.avi"): "cannot write .avi",
    (*TEXT2WORLD, *TINY, "--video_save_folder", "clip.mp4/x"): "cannot be written",
    (*TEXT2WORLD, *TINY, "--tokenizer_dir", ""): "--tokenizer_dir is empty",
    (*TEXT2WORLD, *TINY, "--tokenizer_dir", "nowhere"): "(--tokenizer_dir)",
    (*TEXT2WORLD, *TINY, "--text_encoder_dir", "nowhere"): "(--text_encoder_dir)",
    (*TEXT2WORLD, *TINY, "--prompt_embeddings", "nowhere"): "nowhere: no such file",
    (*TEXT2WORLD, "--diffusion_transformer_dir", "tiny-nothing", "--prompt", "x"): "no bundled",
    RELEASED: "no checkpoint folder checkpoints",
    (*RELEASED, "--checkpoint_dir", "notes"): "notes holds: no folder",
    (*VIDEO2WORLD, "picture.png"): "picture.png is empty",
    (*VIDEO2WORLD, "noise.mp4"): "noise.mp4 is not an mp4",
    (*VIDEO2WORLD, "nowhere.mp4"): "nowhere.mp4: no such file",
    (*VIDEO2WORLD, "clip.mp4", "--batch_input_path", "x"): "exclude each other",
    ("autoregressive", "base"): "no input",
    (*BASE, "noise.mp4"): "noise.mp4 is not an mp4",
    (*BASE, "clip.mp4", "--seed", "-1"): "seed is -1",
    (*BASE, "clip.mp4", "--top_p", "2"): "top_p is 2",
    (*BASE, "clip.mp4"): "no checkpoint folder checkpoints",
    (*BASE, "clip.mp4", "--ar_model_dir", ""): "--ar_model_dir is empty",
    (*BASE, "clip.mp4", "--ar_model_dir", "tiny-nothing"): "no bundled model tiny-nothing",
    (*BASE, "clip.mp4", "--num_video_frames", "0"): "num_video_frames is 0; it must be 1",
    (*PROMPTED, "clip.mp4"): "prompt",
    (*PROMPTED, "clip.mp4", "--prompt", ""): "prompt is empty",
    (*PROMPTED, "clip.mp4", "--prompt", "x"): "no checkpoint folder checkpoints",
    (*PROMPTED, "clip.mp4", "--text_encoder_dir", "", "--prompt", "x"): "dir is empty",
    (*PROMPTED, "clip.mp4", "--prompt_embeddings", "nowhere"): "nowhere: no such file",
    (*PROMPTED, "clip.mp4", "--prompt", "x", "--batch_size", "0"): "0 is neither auto nor",
    (*PROMPTED, "clip.mp4", "--prompt", "x", "--rollout", "frames"): "'frames' is not one of",
    (
        *(*PROMPTED, "clip.mp4", "--prompt", "x", "--ar_model_dir", "tiny-Cosmos-Predict1-4B"),
        *("--text_encoder_dir", "nowhere"),
    ): "(--text_encoder_dir)",
    FLOW: "no samples: give -i FILE",
    (*FLOW, "-i"): "-i needs a file",
    (*FLOW, "-i", "good.json"): "no output folder",
    (*FLOW, "-i", "*.nothing", "-o", "out"): "no file has such a name",
    (*FLOW, "notes/a.json", "out", "more"): "3 plain arguments",
    (*SAMPLES, "--steps", "3"): "--steps",
    SAMPLES: "`worldline checkpoints download 2B/post-trained` fetches it",
    (*UNGUARDED, "--model", "2B/distilled"): "released names are 2B/post-trained",
    (*UNGUARDED, "--model", "tiny-nothing"): "no bundled model tiny-nothing",
    UNGUARDED: "no checkpoint folder checkpoints",
    (*UNGUARDED, "--checkpoint-path", "nowhere.pt"): "nowhere.pt",
    (*UNGUARDED, "--profile"): "does not profile",
    (*UNGUARDED, "--config-file", "x.py"): "runs no configuration in Python",
    (*UNGUARDED, "--context-parallel-size", "8"): "give --context_parallel_size 1",
    (*UNGUARDED, "--prompt_embeddings", "nowhere"): "nowhere: no such file",
    (*UNGUARDED, "-o", "clip.mp4/x"): "cannot be written",
    (*UNGUARDED, "-i", "notes/a.json"): "notes/a.json: name: it is missing",
    (*UNGUARDED, "--inference-type", "video2world"): "input_path: video2world needs one",
    (*UNGUARDED, "--guidance", "-1"): "--guidance: -1.0: ",
    (*UNGUARDED, "--enable-autoregressive", "--chunk-overlap", "2"): "chunk_overlap is 2",
    (*UNGUARDED, "--inference-type", "image2world", "--input-path", "noise.mp4"): "is not an mp4",
    ("tokenize", "encode", "nowhere.mp4"): "nowhere.mp4",
    ("tokenize", "encode", "noise.mp4"): "noise.mp4 is not an mp4",
    ("tokenize", "encode", "clip.mp4"): "no checkpoint folder checkpoints",
    ("tokenize", "encode", "clip.mp4", "--tokenizer_dir", ""): "--tokenizer_dir is empty",
    ("tokenize", "encode", "clip.mp4", "--tokenizer_dir", "tiny-nothing"): "no bundled tokenizer",
    ("tokenize", "decode", "nowhere.safetensors"): "nowhere.safetensors",
    ("tokenize", "decode", "x", "--tokenizer_dir", ""): "--tokenizer_dir is empty",
    ("tokenize", "reconstruct"): "give --video_pattern",
    ("tokenize", "reconstruct", "--video_pattern", "clip.mp4"): "give one of --checkpoint",
    ("evaluate", "nowhere"): "nowhere: no such folder",
    ("evaluate", "notes"): "notes holds no videos",
    ("evaluate", ".", "--output", "x.txt"): "must end in .json",
    ("evaluate", ".", "--num_input_frames", "99"): "99 of them input",
    ("evaluate", "small", "--reference", "true"): "needs 11 x 11",
    ("demo", "--seed", "-1"): "seed",
}


def ends(lines: Sequence[tuple[str, ...]], folder: Path) -> list[tuple[object, str]]:
    """Run command lines one after another in a process; return how each ends, and what it tells.

    The first that imports torch ends in "torch", and is the last.
    """
    script = "import contextlib, io, json, sys\nfrom worldline.cli import main\nfound = []\n"
    script += f"for words in json.loads({json.dumps(json.dumps(lines))}):\n"
    script += "    with contextlib.redirect_stderr(io.StringIO()) as told:\n"
    script += "        try: main(words)\n"
    script += "        except SystemExit as end: status = end.code\n"
    script += "    torch = 'torch' in sys.modules\n"
    script += "    found.append(('torch' if torch else status, told.getvalue()))\n"
    script += "    if torch: break\n"
    script += "print(); print(json.dumps(found))"
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [(end, told) for end, told in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture
def folder(clip: Path, tmp_path: Path) -> Path:
    (tmp_path / "clip.mp4").symlink_to(clip)
    (tmp_path / "picture.png").touch()
    (tmp_path / "noise.mp4").write_text("hello")
    sample = {"name": "good", "inference_type": "text2world", "prompt": "x"}
    (tmp_path / "good.json").write_text(json.dumps(sample))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.json").write_text("{}")
    for name in ("small", "true"):
        write_video(moving(3, 8, 8), tmp_path / name / "a.gif", 25)
    return tmp_path


def test_refusals_import_no_torch(folder: Path) -> None:
    found = ends([*REFUSED], folder)
    for (words, message), (end, told) in zip(REFUSED.items(), found, strict=False):
        assert end == 2, f"{words}: {told}"
        assert message in told, words
    assert len(found) == len(REFUSED)


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
    assert [end for end, _ in ends(asked, tmp_path)] == [0] * len(asked)
