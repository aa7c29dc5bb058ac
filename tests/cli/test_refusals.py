"""What is wrong in a command line is refused by name; --help does not wait for torch."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from worldline.cli.main import main
from worldline.video.write import write_video

from ..conftest import moving
from .conftest import run_words
from .results import check_mentions, check_refused

TINY = "--diffusion_transformer_dir tiny-Cosmos-Predict1-7B-Video2World --prompt x"
TEXT = f"diffusion text2world {TINY} --video_save_folder out"
CONTINUE = f"diffusion video2world {TINY} --video_save_folder out --input_image_or_video_path"
BASE = "autoregressive base --video_save_folder out --input_image_or_video_path"
TINY_BASE = f"{BASE} clip.mp4 --ar_model_dir tiny-Cosmos-Predict1-4B"
PROMPTED = "autoregressive video2world --video_save_folder out --input_image_or_video_path clip.mp4"
TINY_PROMPTED = f"{PROMPTED} --ar_model_dir tiny-Cosmos-Predict1-5B-Video2World"
SAMPLES = "predict2.5 -i good.json -o out"
TINY_SAMPLES = f"{SAMPLES} --model tiny-Cosmos-Predict2.5-2B"
LONG = "--enable_autoregressive --chunk_size"

# in a folder with: a sample good.json; a video clip.mp4; an empty picture.png; text in noise.mp4; a
# folder of notes; a.gif of 3 frames. Command -> further words -> what is mentioned
REFUSED: dict[str, dict[str, str]] = {
    "diffusion text2world": {
        "": "--prompt --batch_input_path --prompt_embeddings",
        "--prompt x": "checkpoints --checkpoint_dir Cosmos-Predict1-7B-Text2World",
        "--prompt x --checkpoint_dir notes": "notes Cosmos-Predict1-7B-Text2World",
        "--prompt x --diffusion_transformer_dir tiny-no": "tiny-no tiny-Cosmos-Predict1-7B",
        "--prompt x --diffusion_transformer_dir ''": "--diffusion_transformer_dir empty",
        "--prompt x --batch_input_path b": "--prompt --batch_input_path",
        "--batch_input_path nowhere.jsonl": "nowhere.jsonl",
        "--batch_input_path notes": "notes",
        "--batch_input_path ''": "--batch_input_path empty",
    },
    TEXT: {
        "--guardrail_dir ''": "--guardrail_dir empty",
        "--tokenizer_dir ''": "--tokenizer_dir empty",
        "--prompt ''": "--prompt empty",
        "--prompt ' '": "--prompt empty",
        "--prompt \udcff": "--prompt",
        "--steps 3": "--steps --num_steps",
        "--num_input_frames 1": "--num_input_frames",
        "--input_image_or_video_path a.mp4": "--input_image_or_video_path",
        "--sampler heun": "--sampler heun edm_euler res_2ab res_1euler res_2mid",
        "--text_encoder_dtype float16": "--text_encoder_dtype bfloat16 float32",
        "--height 0": "--height 0",
        "--width 2000000": "--width 2000000",
        "--num_video_frames -7": "--num_video_frames -7",
        "--seed -1": "--seed -1",
        "--seed 4294967296": "--seed 4294967296",
        "--guidance -0.5": "--guidance -0.5",
        "--guidance nan": "--guidance nan",
        "--guidance inf": "--guidance inf",
        "--num_steps 0": "--num_steps 0 1",
        "--num_steps 1001": "--num_steps 1001 1000",
        "--fps 0.999": "--fps 0.999 1",
        "--fps 241": "--fps 241 240",
        "--fps nan": "--fps nan",
        "--fps 101 --video_save_name x.gif": "101 100",
        "--preview_every -1": "--preview_every -1",
        "--num_gpus 2 --device mps": "--device mps 2",
        "--num_gpus -1": "--num_gpus -1",
        "--data_parallel 0": "--data_parallel 0 1 auto",
        "--num_gpus many": "--num_gpus many integer auto",
        "--seed -1 --fps 0": "--seed -1 --fps 0",
        "--video_save_name x.avi": "--video_save_name x.avi .mkv",
        "--video_save_name x.jpg": "--video_save_name x.jpg",
        "--video_save_name ''": "--video_save_name",
        "--video_save_folder clip.mp4/x": "clip.mp4/x",
    },
    CONTINUE: {
        "picture.png": "picture.png",
        "noise.mp4": "noise.mp4",
        "nowhere.mp4": "nowhere.mp4",
        "''": "--input_image_or_video_path empty",
        "clip.mp4 --batch_input_path x": "--input_image_or_video_path --batch_input_path",
        "clip.mp4 --num_input_frames 5": "--num_input_frames 5 1 9",
        "clip.mp4 --reinsertion april": "--reinsertion april corrected march_2025",
        "a.gif --num_input_frames 9": "a.gif 3 9",
    },
    f"diffusion video2world {TINY}": {"": "--input_image_or_video_path --batch_input_path"},
    "diffusion video2world --input_image_or_video_path clip.mp4": {
        "": "checkpoints --checkpoint_dir"
    },
    "autoregressive base": {"": "--input_image_or_video_path --batch_input_path"},
    BASE: {
        "noise.mp4 --ar_model_dir tiny-Cosmos-Predict1-4B": "noise.mp4",
        "clip.mp4": "checkpoints --checkpoint_dir",
        "clip.mp4 --ar_model_dir ''": "--ar_model_dir empty",
        "clip.mp4 --ar_model_dir tiny-nothing": "tiny-nothing tiny-Cosmos-Predict1-4B",
    },
    TINY_BASE: {
        "--seed -1": "--seed -1",
        "--top_p 2": "--top_p 2",
        "--num_video_frames 0": "--num_video_frames 0",
    },
    PROMPTED: {
        "--prompt x": "checkpoints --checkpoint_dir",
        "--prompt x --text_encoder_dir ''": "--text_encoder_dir empty",
        "--prompt x --batch_size 0": "--batch_size 0",
    },
    TINY_PROMPTED: {
        "--prompt ''": "--prompt empty",
        "--prompt x --rollout frames": "--rollout frames tokens pixels",
    },
    "predict2.5": {
        "": "-i",
        "-i": "-i",
        "-i -o x": "-i",
        "-i good.json": "-o",
        "-o out": "-i",
        "good.json": "good.json PARAMS_FILE OUTPUT_DIR",
        "good.json b c": "good.json PARAMS_FILE OUTPUT_DIR",
        "good.json out -o out": "good.json PARAMS_FILE OUTPUT_DIR",
        "-i '' -o out": "-i",
        "'' out": "-i",
        "-i *.nothing -o out": "*.nothing .json",
        "-i . -o out": ". .json .yaml",
    },
    SAMPLES: {
        "": "2B/post-trained download",
        "--steps 3": "--steps --num_steps",
        "--name b": "--name",
        "--model 2B/distilled": "2B/distilled 2B/post-trained 14B/pre-trained",
        "--model 2B/posttrained": "2B/posttrained 2B/post-trained",
        "--model tiny-nothing": "tiny-nothing tiny-Cosmos-Predict2.5-2B",
        "--model ''": "--model empty",
        "--checkpoint-path nowhere.pt": "nowhere.pt",
        "--checkpoint_path ''": "--checkpoint_path empty",
        "--checkpoint_path nowhere.pt --model mine": "--model mine 2B/post-trained",
        "--guardrail_dir ''": "--guardrail_dir empty",
        "--profile": "--profile",
        "--config-file x.py": "--config_file x.py --schedule",
        "--context-parallel-size 0": "--context_parallel_size 0",
        "--schedule linear": "--schedule linear karras shifted",
        "-o clip.mp4/x": "clip.mp4/x",
        "--inference-type video2world": "good.json 'good' input_path video2world",
        "--inference_type world": "--inference_type world text2world image2world video2world",
        "--input_path ''": "--input_path empty",
        "--resolution 32": "--resolution '32'",
        "--prompt x --prompt_path x": "--prompt --prompt_path",
        "--prompt_path nowhere.txt": "--prompt_path nowhere.txt",
        "--enable_autoregressive maybe": "--enable_autoregressive maybe",
    },
    TINY_SAMPLES: {
        "--inference-type image2world --input-path noise.mp4": "good.json 'good' noise.mp4",
        "-i notes/a.json": "notes/a.json name",
        "--guidance -1": "--guidance -1",
        "--guidance nan": "--guidance nan",
        "--seed -1": "--seed -1",
        "--num_steps 0": "--num_steps 0",
        "--num_output_frames 0": "--num_output_frames 0",
        "--num_output_frames 10000000000000": "--num_output_frames 10000000000000",
        f"{LONG} 9 --chunk-overlap 2": "--chunk_overlap 2 1",
        f"{LONG} 5 --chunk-overlap 5": "chunk_size 5",
    },
    "checkpoints download": {"": "", "Cosmos-Predict1-4C": "Cosmos-Predict1-4C Cosmos-Predict1-4B"},
    "tokenize encode": {
        "nowhere.mp4": "nowhere.mp4",
        "noise.mp4": "noise.mp4",
        "clip.mp4": "checkpoints",
        "clip.mp4 --tokenizer_dir ''": "--tokenizer_dir empty",
        "clip.mp4 --tokenizer_dir tiny-nothing": "tiny-nothing",
    },
    "tokenize decode": {
        "nowhere.safetensors": "nowhere.safetensors",
        "x --tokenizer_dir ''": "--tokenizer_dir empty",
    },
    "tokenize reconstruct": {
        "": "--video_pattern",
        "--video_pattern clip.mp4": "--checkpoint",
    },
    "demo": {"--seed -1": "--seed -1"},
}


def ends(lines: Sequence[Sequence[str]], folder: Path) -> list[tuple[int, str, bool]]:
    """Status and standard error of command lines that run one after another in a process.

    And whether torch was imported by then.
    """
    script = "import contextlib, io, json, sys\nfrom worldline.cli.main import main\nfound = []\n"
    script += f"for words in json.loads({json.dumps(json.dumps(lines))}):\n"
    script += "    with contextlib.redirect_stderr(io.StringIO()) as errors:\n"
    script += "        try: main(words)\n"
    script += "        except SystemExit as end: status = end.code\n"
    script += "    found.append((status, errors.getvalue(), 'torch' in sys.modules))\n"
    script += "print(); print(json.dumps(found))"
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return [(end, errors, torch) for end, errors, torch in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture
def folder(clip: Path, tmp_path: Path) -> Path:
    (tmp_path / "clip.mp4").symlink_to(clip)
    (tmp_path / "picture.png").touch()
    (tmp_path / "noise.mp4").write_text("hello")
    sample = {"name": "good", "inference_type": "text2world", "prompt": "x"}
    (tmp_path / "good.json").write_text(json.dumps(sample))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.json").write_text("{}")
    write_video(moving(3, 8, 8), tmp_path / "a.gif", 25)
    return tmp_path


def test_refusals(folder: Path) -> None:
    asked = [
        ([*command.split(), *shlex.split(words)], mentioned)
        for command, further in REFUSED.items()
        for words, mentioned in further.items()
    ]
    found = ends([words for words, _ in asked], folder)
    for (words, mentioned), (end, message, _) in zip(asked, found, strict=True):
        assert end == 2, f"{words}: {message}"
        check_mentions(message, mentioned)
        assert "----" not in message
    assert not (folder / "out").exists()


@pytest.mark.parametrize("command", [TEXT, f"{CONTINUE} clip.mp4", f"{BASE} clip.mp4", SAMPLES])
def test_several_processes(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.chdir(folder)
    check_refused(run_words(command.split()), "WORLD_SIZE 4 torchrun", folder)


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
    found = [(end, torch) for end, _, torch in ends(asked, tmp_path)]
    assert found == [(0, False)] * len(asked)
