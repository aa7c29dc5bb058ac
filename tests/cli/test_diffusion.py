"""From a prompt, an image or a clip to a video through the command line, and what may go wrong."""

from __future__ import annotations

import gc
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tqdm
from click.testing import CliRunner, Result

import worldline.loading
import worldline.locate
import worldline.video.write
from worldline.cli.diffusion import diffusion
from worldline.errors import Error, InputError
from worldline.locate import bundled_configs
from worldline.pipelines.requests import ALLOWED_FPS, DiffusionRequest
from worldline.video.read import probe
from worldline.weights.write import save

from ..conftest import frames_of
from ..tiny_diffusion import (
    CONTEXT_WIDTH,
    CONTINUOUS,
    DEFAULTS,
    TEXT2WORLD,
    TEXT_ENCODER,
    VIDEO2WORLD,
)
from .conftest import WITHOUT_UPSAMPLER, Make, Run
from .parity import check_options, variants

PROMPT = "a red ball rolls to the right"
SIZE = tuple(DEFAULTS[name] for name in ("num_video_frames", "height", "width"))
FOLDERS = ("--diffusion_transformer_dir", "--tokenizer_dir", "--prompt_upsampler_dir")
MORE_THAN_CHOICES = ("--diffusion_transformer_dir", "--num_video_frames")


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    """A file with embeddings of two prompts."""
    path = tmp_path / "embeddings.safetensors"
    save({n: torch.randn(7, CONTEXT_WIDTH) for n in ("prompt", "negative_prompt")}, path)
    return path


# --- what works


def test_text_to_video(text2world: Make, tmp_path: Path) -> None:
    result = text2world("--prompt", PROMPT)
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    assert files_in(out) == {"output.mp4", "output.txt", "output.json"}
    info = probe(out / "output.mp4", kind="video")
    assert (info.frames, info.height, info.width, info.fps) == (*SIZE, 24)
    assert (out / "output.txt").read_bytes() == PROMPT.encode()
    report = json.loads((out / "output.json").read_text())
    assert report["model"] == TEXT2WORLD
    assert report["request"]["prompt"] == PROMPT
    assert report["request"]["num_input_frames"] == 0
    stages = [stage["name"] for stage in report["run"]["stages"]]
    assert [name for name in stages if name != "read"] == ["text", "denoise", "decode"]
    for part in (str(out / "output.mp4"), "s a step", "peak memory", "seed 1"):
        assert part in result.stdout
    for part in ("encoding the prompt", f"denoising in {DEFAULTS['num_steps']} steps", "decoding"):
        assert part in result.stderr


@pytest.mark.parametrize("given", [1, 9])
def test_clip_to_video(given: int, video2world: Make, clip: Path, tmp_path: Path) -> None:
    words = ("--input_image_or_video_path", clip, "--prompt", PROMPT, "--num_input_frames", given)
    result = video2world(*words, "--video-save-name", "a.webm", "--fps", 12)
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    assert files_in(out) == {"a.webm", "a.txt", "a.json"}
    info = probe(out / "a.webm", kind="video")
    assert (info.frames, info.height, info.width, info.fps) == (*SIZE, 12)
    report = json.loads((out / "a.json").read_text())
    assert report["request"]["num_input_frames"] == given
    assert report["request"]["reinsertion"] == "corrected"
    assert report["files"]["input"]["nbytes"] == clip.stat().st_size


def test_image_to_video(video2world: Make, image: Path, tmp_path: Path) -> None:
    result = video2world("--input_image_or_video_path", image, "--prompt", PROMPT)
    assert result.exit_code == 0, result.stderr
    assert probe(tmp_path / "out" / "output.mp4", kind="video").frames == SIZE[0]


def test_a_batch_of_prompts_equals_single_ones(text2world: Make, tmp_path: Path) -> None:
    batch = tmp_path / "b.jsonl"
    batch.write_text(f'{{"prompt": "{PROMPT}"}}\n\n{{"prompt": "ünïcode"}}')
    result = text2world("--batch_input_path", batch, "--video_save_name", "unused")
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    numbers = ("0", "2")
    assert files_in(out) == {f"{n}.{end}" for n in numbers for end in ("mp4", "txt", "json")}
    assert (out / "2.txt").read_bytes() == "ünïcode".encode()
    assert f"2 of 2 videos are in {out}" in result.stdout
    assert "--video_save_name has no effect" in result.stderr
    assert text2world("--prompt", PROMPT).exit_code == 0
    first, second, alone = (frames_of(out / f"{name}.mp4") for name in ("0", "2", "output"))
    assert first == alone != second


def test_a_batch_of_clips(video2world: Make, clip: Path, image: Path, tmp_path: Path) -> None:
    lines = [{"visual_input": str(path), "prompt": PROMPT} for path in (clip, image)]
    result = video2world("--batch_input_path", write_lines(tmp_path / "b.jsonl", *lines))
    assert result.exit_code == 0, result.stderr
    ends = ("mp4", "txt", "json")
    assert files_in(tmp_path / "out") == {f"{n}.{end}" for n in "01" for end in ends}


@pytest.mark.parametrize(
    ("flag", "value", "other"),
    [
        ("--seed", 1, 2),
        ("--guidance", 2, 0),
        ("--negative_prompt", "fog", ""),
        ("--sampler", "edm_euler", "res_2ab"),
        ("--fps", 12, 40),
        ("--num_steps", 2, 3),
    ],
)
def test_flags_decide(
    flag: str, value: object, other: object, text2world: Make, tmp_path: Path
) -> None:
    for number, chosen in enumerate((value, other, value)):
        words = ("--prompt", PROMPT, flag, chosen, "--video_save_name", f"{number}.mkv")
        result = text2world(*words)
        assert result.exit_code == 0, result.stderr
    first, second, third = (frames_of(tmp_path / "out" / f"{number}.mkv") for number in range(3))
    assert first == third != second


def test_bundled_worlds_have_their_own_defaults(
    run: Run, bundled_diffusion: dict[str, Any], tmp_path: Path
) -> None:
    fixed = ("--diffusion_transformer_dir", f"tiny-{VIDEO2WORLD}", "--prompt", PROMPT)
    words: tuple[object, ...] = (*fixed, "--video_save_folder", tmp_path / "out")
    assert run("diffusion", "text2world", *words).exit_code == 0
    report = json.loads((tmp_path / "out" / "output.json").read_text())
    assert report["model"] == f"tiny-{VIDEO2WORLD}"
    for name in DEFAULTS:
        assert report["request"][name] == bundled_diffusion[name]
    words = (*words, "--num-steps", 35, "--num_video_frames", 9, "--seed", 4, "--height", 32)
    result = run("diffusion", "text2world", *words)
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "out" / "output.json").read_text())
    assert report["request"]["num_steps"] == 35  # given, though it is the flag's own default
    assert report["request"]["num_video_frames"] == 9
    assert report["request"]["width"] == bundled_diffusion["width"]


def test_embeddings_in_place_of_the_text_encoder(
    video2world: Make, clip: Path, own_worlds: Path, embeddings: Path, tmp_path: Path
) -> None:
    shutil.rmtree(own_worlds / TEXT_ENCODER)
    words = ("--input_image_or_video_path", clip, "--prompt_embeddings", embeddings)
    result = video2world(*words, "--text_encoder_dtype", "float32", checkpoint_dir=own_worlds)
    assert result.exit_code == 0, result.stderr
    assert "--text_encoder_dtype has no effect: embeddings are given" in result.stderr
    report = json.loads((tmp_path / "out" / "output.json").read_text())
    assert report["request"]["prompt"] is None
    resumed = video2world(*words, "--resume", checkpoint_dir=own_worlds)
    assert "nothing left to do" in resumed.stdout
    os.utime(embeddings, (1, 1))
    resumed = video2world(*words, "--resume", checkpoint_dir=own_worlds)
    assert "was made in another way" in resumed.stderr


def test_embeddings_alone_make_a_video(text2world: Make, embeddings: Path, tmp_path: Path) -> None:
    result = text2world("--prompt_embeddings", embeddings)
    assert result.exit_code == 0, result.stderr
    assert files_in(tmp_path / "out") == {"output.mp4", "output.json"}
    assert "embeddings: denoising" in result.stderr
    words = ("--prompt_embeddings", embeddings, "--prompt", PROMPT, "--video_save_name", "both")
    assert text2world(*words).exit_code == 0
    alone, both = (frames_of(tmp_path / "out" / f"{name}.mp4") for name in ("output", "both"))
    assert alone == both


@pytest.mark.parametrize(
    ("name", "rates"),
    [("a.mp4", ALLOWED_FPS), ("a.webm", ALLOWED_FPS), ("a.mkv", ALLOWED_FPS), ("a.gif", (1, 100))],
)
def test_the_fastest_and_slowest_rate(
    name: str, rates: tuple[int, ...], text2world: Make, tmp_path: Path
) -> None:
    for fps in rates:
        words = ("--prompt", PROMPT, "--fps", fps, "--video_save_name", name)
        result = text2world(*words, "--preview_every", 1)
        assert result.exit_code == 0, result.stderr
        assert f"fps is {fps}; the released models know 12 to 40" in result.stderr
        info = probe(tmp_path / "out" / name, kind="video")
        assert info.frames == SIZE[0]
        assert info.fps == fps


def test_notes_of_what_has_no_effect(text2world: Make) -> None:
    flags = ("--offload_guardrail_models", "--offload_prompt_upsampler")
    offload = ("--offload_tokenizer", "--offload_diffusion_transformer")
    valued = ("--prompt_upsampler_dir", "x", "--word_limit_to_skip_upsampler", 3)
    result = text2world("--prompt", PROMPT, *flags, *offload, *valued)
    assert result.exit_code == 0, result.stderr
    for flag in (*flags, *offload, *valued[::2]):
        assert result.stderr.count(f"{flag} has no effect") == 1
    result = text2world("--prompt", PROMPT, "--guidance", 0, "--negative_prompt", "fog")
    assert "--negative_prompt has no effect: guidance 0" in result.stderr


def test_previews_come_and_go(
    text2world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float]] = []

    def spy(frames: Any, path: Path, fps: float) -> None:
        real(frames, path, fps)
        if ".preview" in path.name:
            info = probe(path, kind="video")
            seen.append((info.frames, info.fps))

    real = worldline.video.write.write_video
    monkeypatch.setattr(worldline.video.write, "write_video", spy)
    words = ("--prompt", PROMPT, "--preview_every", 2, "--num_steps", 5, "--fps", 16)
    result = text2world(*words)
    assert result.exit_code == 0, result.stderr
    assert seen == [(1 + (SIZE[0] - 1) // 8, 16 / 8)] * 2  # one for the 8 frames of a latent one
    assert result.stderr.count("output.preview.mp4") == 1
    assert files_in(tmp_path / "out") == {"output.mp4", "output.txt", "output.json"}


def test_a_preview_replaces_and_deletes_no_other_file(text2world: Make, tmp_path: Path) -> None:
    other = tmp_path / "out" / "output.preview.mp4"
    other.parent.mkdir()
    other.write_bytes(b"another")
    result = text2world("--prompt", PROMPT, "--preview_every", 1)
    assert result.exit_code == 0, result.stderr
    assert other.read_bytes() == b"another"
    assert (tmp_path / "out" / "output.mp4").exists()
    assert result.stderr.count(f"no preview: {other} is not of this run, and stays") == 1


def test_seconds_per_step_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from worldline.cli.run import follow
    from worldline.world import Step, Video

    def steps() -> Iterator[Step]:
        yield Step("text", 0, 1)
        for done in range(3):
            yield Step("denoise", done, 2)
        yield Step("done", 2, 2, video=Video(np.zeros((1, 2, 2, 3), np.uint8), 24))

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    follow(steps(), "a ball")
    shown = capsys.readouterr().err
    assert "a ball" in shown
    assert "s/step" in shown


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_of_a_video_in_parts(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A later part goes on where the one before ended, and only its own steps take its time."""
    from worldline.cli.run import follow
    from worldline.world import Step, Video

    begun = []

    class Bar(tqdm.tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            begun.append((options["initial"], options["total"]))
            super().__init__(**options)

    def steps() -> Iterator[Step]:
        for part in range(3):
            for done in range(5):
                yield Step("denoise", 4 * part + done, 12)
            yield Step("decode", part, 3)
        yield Step("done", 12, 12, video=Video(np.zeros((1, 2, 2, 3), np.uint8), 24))

    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    with caplog.at_level("INFO"):
        follow(steps(), "a ball")
    told = [message for message in caplog.messages if "denoising" in message]
    assert begun == ([(0, 12), (4, 12), (8, 12)] if terminal else [])
    line = "a ball: denoising in 12 steps"
    assert told == ([] if terminal else [line, f"{line}, 4 are done", f"{line}, 8 are done"])


# --- parity


@pytest.mark.parametrize("variant", variants("diffusion/inference/text2world.py"))
def test_every_flag_of_text2world(variant: dict[str, Any]) -> None:
    check_options(
        "diffusion", "text2world", variant, of_a_generation=FOLDERS, more=MORE_THAN_CHOICES
    )


@pytest.mark.parametrize("variant", variants("diffusion/inference/video2world.py"))
def test_every_flag_of_video2world(variant: dict[str, Any]) -> None:
    check_options(
        "diffusion", "video2world", variant, of_a_generation=FOLDERS, more=MORE_THAN_CHOICES
    )


@pytest.mark.parametrize("name", ["text2world", "video2world"])
def test_the_help_tells_released_and_bundled_defaults(name: str, run: Run) -> None:
    told = " ".join(run("diffusion", name, "--help").stdout.split())
    options = {option.name: option for option in diffusion.commands[name].params}
    configs = [json.loads(path.read_text()) for path in bundled_configs("diffusion").values()]
    own = [config for config in configs if "num_steps" in config]
    assert own  # a diffusion world is bundled
    for option in ("num_steps", "guidance", "num_video_frames", "height", "width", "fps"):
        values = " or ".join(dict.fromkeys(str(config[option]) for config in own))
        assert f"[default: {options[option].default}; bundled {values}]" in told
    assert "[default: bfloat16, as released; bundled " in told
    assert "[default: that of the release; bundled " in told


def test_damaged_bundled_files_and_those_of_other_commands_have_no_defaults_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    of_flow, damaged = "Cosmos-Predict2.5-2B", "{"
    own = {TEXT2WORLD: damaged, VIDEO2WORLD: '{"num_steps": 7}', of_flow: '{"num_steps": 9}'}
    for name, text in own.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    monkeypatch.setattr(worldline.locate, "BUNDLED", tmp_path)
    module = Path(sys.modules["worldline.cli.diffusion"].__file__ or "")
    imported_anew = runpy.run_path(str(module))["diffusion"]
    result = CliRunner().invoke(imported_anew, ["text2world", "--help"])
    assert result.exit_code == 0
    told = " ".join(result.stdout.split())
    assert "[default: 35; bundled 7]" in told
    assert "[default: 121]" in told


# --- wrong words and inputs

BAD_NUMBERS = [
    (["--seed", "-1"], "seed is -1"),
    (["--seed", 2**32], "seed is 4294967296"),
    (["--guidance", "-0.5"], "guidance is -0.5"),
    (["--guidance", "nan"], "guidance is nan"),
    (["--guidance", "inf"], "guidance is inf"),
    (["--num_steps", 0], "num_steps is 0"),
    (["--num_steps", -3], "num_steps is -3"),
    (["--fps", 0], "fps is 0"),
    (["--fps", -1], "fps is -1"),
    (["--fps", 241], "fps is 241.0; it must be 1 to 240"),
    (["--fps", 101, "--video_save_name", "x.gif"], "a GIF shows 100 frames a second at most"),
    (["--fps", 3000000000], "fps is 3000000000.0; it must be 1 to 240"),
    (["--num_video_frames", 10], "num_video_frames is 10; it must be 1 + 8k and at most"),
    (["--num_video_frames", 21], "num_video_frames is 21; it must be 1 + 8k and at most"),
    (["--num_video_frames", 19], "the nearest is 17"),
    (["--num_video_frames", 117], "num_video_frames is 117; it must be 1 + 8k and at most"),
    (["--num_video_frames", 0], "num_video_frames is 0"),
    (["--num_video_frames", 16385], "num_video_frames is 16385"),
    (["--height", 40], "height is 40; it must be a multiple of 16 and at most"),
    (["--height", 9], "height is 9; it must be a multiple of 16 and at most"),
    (["--height", 0], "height is 0"),
    (["--width", 100], "width is 100; it must be a multiple of 16"),
    (["--width", 16000], "width is 16000"),
    (["--preview_every", -1], "-1 is not in the range x>=0"),
    (["--num_gpus", 2], "--num_gpus is 2; this version runs on 1 GPU: give --num_gpus 1"),
    (["--video_save_name", "x.avi"], "cannot write .avi"),
    (["--video_save_name", ""], "is no name"),
    (["--diffusion_transformer_dir", "Nowhere"], "no folder"),
    (["--diffusion_transformer_dir", "tiny-Nowhere"], "no bundled model tiny-Nowhere"),
    (["--checkpoint_dir", "nowhere"], "no checkpoint folder nowhere"),
    (["--tokenizer_dir", "Nowhere"], "no folder Nowhere (--tokenizer_dir)"),
    (["--text_encoder_dir", "Nowhere"], "no folder Nowhere (--text_encoder_dir)"),
    (["--prompt_embeddings", "nowhere.pt"], "--prompt_embeddings nowhere.pt: no such file"),
    (["--prompt_embeddings", ""], "--prompt_embeddings is empty"),
    (["--device", "abacus"], "no device abacus here"),
    (["--sampler", "heun"], "'edm_euler', 'res_2ab'"),
    (["--text_encoder_dtype", "float16"], "'bfloat16', 'float32'"),
    (["--sampler", "res_2mid", "--num_steps", 1], "num_steps is 1"),
]


@pytest.mark.parametrize(("words", "message"), BAD_NUMBERS)
@pytest.mark.usefixtures("forbid_weights")
def test_wrong_words_of_text2world(
    words: list[Any], message: str, text2world: Make, tmp_path: Path
) -> None:
    refused(text2world("--prompt", PROMPT, *words), message, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *(([*words, "CLIP", "TEXT"], message) for words, message in BAD_NUMBERS),
        (["TEXT"], "give --input_image_or_video_path or --batch_input_path"),
        (["CLIP"], "a Video2World model needs --prompt"),
        (["CLIP", "--prompt", " "], "--prompt is empty"),
        (["CLIP", "--prompt", ""], "--prompt is empty"),
        (["CLIP", "TEXT", "--batch_input_path", "b"], "exclude each other"),
        (["TEXT", "--batch_input_path", "b"], "--prompt and --batch_input_path exclude each other"),
        (["TEXT", "--input_image_or_video_path", ""], "--input_image_or_video_path is empty"),
        (["TEXT", "--input_image_or_video_path", "nowhere.mp4"], "nowhere.mp4: no such file"),
        (["IMAGE", "TEXT", "--num_input_frames", 9], "is an image, which has 1 frame, but"),
        (["SHORT", "TEXT", "--num_input_frames", 9], "has 5 frames, but --num_input_frames is 9"),
        (["CLIP", "TEXT", "--num_input_frames", 5], "'1', '9'"),
        (["CLIP", "TEXT", "--num_input_frames", 9, "--num_video_frames", 9], "nothing is left"),
        (["CLIP", "TEXT", "--num_video_frames", 1], "nothing is left"),
        (["CLIP", "TEXT", "--reinsertion", "april"], "'corrected', 'march_2025'"),
        (
            ["CLIP", "TEXT", "--reinsertion", "march_2025", "--sampler", "res_2ab"],
            "edm_euler, not res_2ab",
        ),
    ],
)
@pytest.mark.usefixtures("forbid_weights")
def test_wrong_words_of_video2world(
    words: list[Any],
    message: str,
    video2world: Make,
    clip: Path,
    short_clip: Path,
    image: Path,
    tmp_path: Path,
) -> None:
    inputs = {"CLIP": clip, "SHORT": short_clip, "IMAGE": image}
    spelled: list[object] = []
    for word in words:
        if word in inputs:
            spelled += ["--input_image_or_video_path", inputs[word]]
        else:
            spelled += ["--prompt", PROMPT] if word == "TEXT" else [word]
    refused(video2world(*spelled), message, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --prompt, --batch_input_path or --prompt_embeddings"),
        (["--prompt_embeddings", ""], "--prompt_embeddings is empty"),
        (["--prompt", "", "--prompt_embeddings", "e"], "--prompt is empty"),
        (["--prompt", "x \udcff"], "--prompt is no valid text"),
        (["--prompt", ""], "--prompt is empty"),
        (["--prompt", " \n"], "--prompt is empty"),
        (["--prompt", "x", "--batch_input_path", "b"], "exclude each other"),
        (["--prompt", "x", "--input_image_or_video_path", "a.mp4"], "diffusion video2world"),
        (["--batch_input_path", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--batch_input_path", "."], "is a folder, which holds no prompts"),
        (["--batch_input_path", "b", "--prompt_embeddings", "e"], "every line would give the same"),
        (["--prompt", "x", "--num_input_frames", 1], "No such option"),
    ],
)
@pytest.mark.usefixtures("forbid_weights")
def test_wrong_prompts(words: list[Any], message: str, text2world: Make, tmp_path: Path) -> None:
    refused(text2world(*words), message, tmp_path)


def refused(result: Result, message: str, folder: Path) -> None:
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr.splitlines()[-1]
    assert result.stdout == ""
    assert not list(folder.rglob("*.mp4"))
    assert not (folder / "out").exists()


@pytest.mark.usefixtures("forbid_weights")
def test_bad_lines_are_told_at_once(
    text2world: Make, video2world: Make, clip: Path, image: Path, tmp_path: Path
) -> None:
    batch = write_lines(tmp_path / "t.jsonl", {"prompt": "x"}, {"prompt": ""}, {"visual": 1}, "x")
    result = text2world("--batch_input_path", batch)
    assert result.exit_code == 2
    assert "3 of 4 inputs cannot be used" in result.stderr
    for number in (2, 3, 4):
        assert re.search(rf"line {number}: .*\(output {number - 1}\.mp4\)\n", result.stderr)
    lines = [
        {"visual_input": str(clip), "prompt": "x"},
        {"visual_input": str(image), "prompt": "x"},
        {"visual_input": str(clip)},
        {"visual_input": "nowhere.mp4", "prompt": "x"},
    ]
    batch = write_lines(tmp_path / "v.jsonl", *lines)
    words = ("--batch_input_path", batch, "--num_input_frames", 9)
    result = video2world(*words, checkpoint_dir=tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "3 of 4 inputs cannot be used" in result.stderr
    for number in (2, 3, 4):
        assert re.search(rf"line {number}: .*\(output {number - 1}\.mp4\)\n", result.stderr)


@pytest.mark.parametrize("command", ["text2world", "video2world"])
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((), ["--disable_prompt_upsampler", "--disable_guardrail"]),
        (("--disable_guardrail",), ["--disable_prompt_upsampler"]),
        (("--disable_prompt_upsampler",), ["--disable_guardrail"]),
    ],
)
def test_released_models_run_as_released(
    command: str,
    given: tuple[str, ...],
    told: list[str],
    run: Run,
    clip: Path,
    diffusion_worlds: Path,
    forbid_weights: None,
) -> None:
    words = ["--checkpoint_dir", diffusion_worlds]
    if command == "video2world":
        words += ["--input_image_or_video_path", clip]
    if command == "text2world" or "--disable_prompt_upsampler" in given:
        words += ["--prompt", PROMPT]  # else the upsampler would have to describe the clip
    result = run("diffusion", command, *words, *given)
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    named = [word for word in last.split() if word.startswith("--disable")]
    assert sorted(named) == sorted(told)
    assert last.count("worldline checkpoints download") == len(told)


@pytest.mark.usefixtures("forbid_weights")
def test_the_other_kind_of_model(
    text2world: Make, video2world: Make, clip: Path, small_world: Path, base: Any, tmp_path: Path
) -> None:
    continued = ("--input_image_or_video_path", clip, "--prompt", PROMPT)
    words = ("--diffusion_transformer_dir", TEXT2WORLD)
    result = video2world(*continued, *words)
    refused(result, f"{TEXT2WORLD} is a Text2World model, which continues no input", tmp_path)
    words = ("--diffusion_transformer_dir", VIDEO2WORLD)
    result = text2world("--prompt", PROMPT, *words)
    refused(result, f"{VIDEO2WORLD} is a Video2World model, which needs an image", tmp_path)
    words = ("--diffusion_transformer_dir", small_world / "Cosmos-Predict1-4B")
    refused(video2world(*continued, *words), "is no diffusion transformer", tmp_path)


@pytest.mark.usefixtures("forbid_weights")
def test_missing_text_encoder(text2world: Make, own_worlds: Path, tmp_path: Path) -> None:
    shutil.rmtree(own_worlds / TEXT_ENCODER)
    result = text2world("--prompt", PROMPT, checkpoint_dir=own_worlds)
    refused(result, f"no folder {TEXT_ENCODER} in", tmp_path)
    assert "--prompt_embeddings" in result.stderr
    path = own_worlds / "one.safetensors"
    save({"prompt": torch.randn(3, CONTEXT_WIDTH)}, path)
    words = ("--prompt", PROMPT, "--prompt_embeddings", path)
    result = text2world(*words, checkpoint_dir=own_worlds)
    refused(result, "has no negative_prompt: add its embedding, or give --guidance 0", tmp_path)


@pytest.mark.usefixtures("forbid_weights")
def test_several_processes(text2world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    result = text2world("--prompt", PROMPT)
    assert result.exit_code == 2
    assert "4 processes (WORLD_SIZE)" in result.stderr


@pytest.mark.usefixtures("forbid_weights")
def test_an_output_never_replaces_an_input(text2world: Make, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    batch = write_lines(out / "0.json", {"prompt": PROMPT})
    result = text2world("--batch_input_path", batch)
    assert result.exit_code == 2
    assert f"{batch} is an input; choose another --video_save_folder" in result.stderr


@pytest.mark.usefixtures("forbid_weights")
def test_a_preview_never_replaces_an_input(video2world: Make, clip: Path, tmp_path: Path) -> None:
    source = tmp_path / "out" / "a.preview.mp4"
    source.parent.mkdir()
    shutil.copy(clip, source)
    words = ("--input_image_or_video_path", source, "--prompt", PROMPT, "--video_save_name", "a")
    result = video2world(*words, "--preview_every", 1)
    assert result.exit_code == 2
    assert f"{source} is an input; choose another --video_save_folder or" in result.stderr


@pytest.mark.parametrize("fps", [1e-4, 0.999, 240.5, 2e6, float("inf"), float("nan")])
def test_rates_that_no_file_can_hold(fps: float) -> None:
    with pytest.raises(InputError, match=r"fps is .*; it must be 1 to 240"):
        DiffusionRequest(prompt=PROMPT, fps=fps)


# --- interrupted, resumed


def failing_stream(monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int) -> None:
    """Make the run of number `at` raise after its first step of denoising."""
    from worldline.world import DiffusionWorld

    real = DiffusionWorld.stream
    runs = iter(range(100))

    def stream(self: DiffusionWorld, *args: Any, **options: Any) -> Iterator[Any]:
        number = next(runs)
        for step in real(self, *args, **options):
            yield step
            if number == at and step.kind == "denoise" and step.done:
                raise error

    monkeypatch.setattr(DiffusionWorld, "stream", stream)


def test_ctrl_c_leaves_no_partial_video(
    text2world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_stream(monkeypatch, KeyboardInterrupt(), at=1)
    batch = write_lines(tmp_path / "b.jsonl", {"prompt": "a"}, {"prompt": "b"})
    result = text2world("--batch_input_path", batch, "--preview_every", 1)
    assert result.exit_code == 130
    assert result.stderr.endswith("worldline: interrupted\n")
    assert files_in(tmp_path / "out") == {"0.mp4", "0.txt", "0.json"}


@pytest.mark.slow
def test_a_real_interrupt(diffusion_worlds: Path, tmp_path: Path) -> None:
    """SIGINT while the sampler runs, in a process of its own."""
    out = tmp_path / "out"
    words = ["--checkpoint_dir", diffusion_worlds, "--video_save_folder", out, *WITHOUT_UPSAMPLER]
    words += ["--prompt", PROMPT, "--num_steps", 1000, "--preview_every", 1]
    running = subprocess.Popen(
        [sys.executable, "-m", "worldline", "diffusion", "text2world", *map(str, words)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    for line in running.stderr:
        if "output.preview.mp4" in line:
            break
    assert files_in(out) == {"output.preview.mp4"}
    running.send_signal(signal.SIGINT)
    assert running.stderr.read().endswith("worldline: interrupted\n")
    running.stderr.close()
    assert running.wait() == 130
    assert files_in(out) == set()


def test_one_frame(text2world: Make, tmp_path: Path) -> None:
    result = text2world("--prompt", PROMPT, "--num_video_frames", 1)
    assert result.exit_code == 0, result.stderr
    assert "1 frame of" in result.stdout
    assert probe(tmp_path / "out" / "output.mp4", kind="video").frames == 1


def test_a_batch_goes_on_after_a_bad_item(
    text2world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_stream(monkeypatch, Error("this one failed"), at=0)
    batch = write_lines(tmp_path / "b.jsonl", {"prompt": "a"}, {"prompt": "b"})
    result = text2world("--batch_input_path", batch)
    assert result.exit_code == 1
    assert "error: 1/2 “a”: this one failed" in result.stderr
    assert result.stderr.endswith("worldline: 1 of 2 inputs failed; --resume tries them alone\n")
    assert files_in(tmp_path / "out") == {"1.mp4", "1.txt", "1.json"}


def test_what_a_bad_item_held_is_freed(
    text2world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Held:
        def __init__(self) -> None:
            self.itself = self  # only the collector finds it

    error = Error("this one failed")
    error.held = held = Held()  # type: ignore[attr-defined]
    left = weakref.ref(held)
    del held
    failing_stream(monkeypatch, error, at=0)
    del error.held  # type: ignore[attr-defined]
    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(left() is None))
    batch = write_lines(tmp_path / "b.jsonl", {"prompt": "a"}, {"prompt": "b"})
    gc.disable()
    try:
        assert text2world("--batch_input_path", batch).exit_code == 1
    finally:
        gc.enable()
    assert freed == [True]


def test_out_of_memory_names_the_flags(text2world: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_stream(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried."), at=0)
    flags = ("--offload_tokenizer", "--offload_text_encoder_model")
    result = text2world("--prompt", PROMPT, *flags)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith(
        "--offload_diffusion_transformer lowers the need"
    )


def test_resume(text2world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = write_lines(tmp_path / "b.jsonl", {"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    words = ("--batch_input_path", batch, "--resume")
    out = tmp_path / "out"
    assert text2world(*words, "--preview_every", 1).exit_code == 0
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "1.json").unlink()  # as if killed between the video and its report
    write_lines(batch, {"prompt": "a"}, {"prompt": "b"}, {"prompt": "another"})
    result = text2world(*words)
    assert result.exit_code == 0
    assert f"{out / '0.mp4'} is finished" in result.stderr
    assert result.stdout.endswith(f"\n3 of 3 videos are in {out}: 2 made now, 1 there before\n")
    changed = {p.name for p in out.iterdir() if p.stat().st_mtime_ns != times[p.name]}
    assert {Path(name).stem for name in changed} == {"1", "2"}
    assert (out / "2.txt").read_text() == "another"
    # nothing is left: no weights are read
    monkeypatch.setattr(worldline.loading.parts, "load_into", None)
    result = text2world(*words)
    assert result.exit_code == 0
    assert result.stdout == f"nothing left to do in {out}: 3 of 3 videos were there before\n"


@pytest.mark.parametrize("changed", ["input", "transformer", "tokenizer", "text encoder"])
def test_resume_knows_changed_files(
    changed: str, video2world: Make, clip: Path, own_worlds: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copy(clip, tmp_path / "in.mp4"))
    words = ("--input_image_or_video_path", source, "--prompt", PROMPT, "--resume")
    assert video2world(*words, checkpoint_dir=own_worlds).exit_code == 0
    files = {
        "input": source,
        "transformer": own_worlds / VIDEO2WORLD / "model.pt",
        "tokenizer": own_worlds / CONTINUOUS / "decoder.safetensors",
        "text encoder": own_worlds / TEXT_ENCODER / "model.safetensors",
    }
    assert "is finished" in video2world(*words, checkpoint_dir=own_worlds).stderr
    os.utime(files[changed], (1, 1))
    assert "was made in another way" in video2world(*words, checkpoint_dir=own_worlds).stderr
    assert "is finished" in video2world(*words, checkpoint_dir=own_worlds).stderr


@pytest.mark.parametrize(
    ("first", "then", "finished"),
    [
        ((), ("--sampler", "edm_euler", "--rotary_precision", "bfloat16"), True),
        ((), ("--preview_every", 1), True),
        ((), ("--sampler", "res_2ab"), False),
        ((), ("--rotary_precision", "float32"), False),
        ((), ("--generation", "1.0"), False),
        (("--generation", "1.0"), (), False),
        ((), ("--text_encoder_dtype", "float32"), True),  # the default on a CPU
        ((), ("--text_encoder_dtype", "bfloat16"), False),
        (("--guidance", 0), ("--guidance", 0, "--negative_prompt", "fog"), True),
        ((), ("--negative_prompt", "fog"), False),
        (("--text_encoder_dtype", "bfloat16"), (), False),
    ],
)
def test_resume_knows_other_ways(
    first: tuple[object, ...],
    then: tuple[object, ...],
    finished: bool,
    text2world: Make,
    own_worlds: Path,
) -> None:
    (own_worlds / TEXT2WORLD).rename(own_worlds / "mine")  # a name that tells no generation
    words = ("--diffusion_transformer_dir", "mine", "--device", "cpu", "--prompt", PROMPT)
    assert text2world(*words, *first, checkpoint_dir=own_worlds).exit_code == 0
    result = text2world(*words, *then, "--resume", checkpoint_dir=own_worlds)
    assert result.exit_code == 0, result.stderr
    told = "is finished" if finished else "was made in another way"
    assert told in result.stderr


def test_resume_knows_when_no_text_is_encoded(
    text2world: Make, embeddings: Path, own_worlds: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone.safetensors"
    save({"prompt": torch.randn(7, CONTEXT_WIDTH)}, alone)
    for given, finished in ((embeddings, True), (alone, False)):
        words = ("--prompt_embeddings", given, "--device", "cpu")
        assert text2world(*words, checkpoint_dir=own_worlds).exit_code == 0
        words = (*words, "--resume", "--text_encoder_dtype", "bfloat16")
        result = text2world(*words, checkpoint_dir=own_worlds)
        assert ("is finished" in result.stderr) == finished
        (own_worlds / TEXT_ENCODER / "model.safetensors").touch()
        result = text2world(*words, checkpoint_dir=own_worlds)
        assert ("is finished" in result.stderr) == finished


def test_resume_knows_another_dtype(
    text2world: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ("--prompt", PROMPT, "--device", "cpu", "--text_encoder_dtype", "float32", "--resume")
    assert text2world(*words).exit_code == 0
    path = tmp_path / "out" / "output.json"
    report = json.loads(path.read_text())
    assert report["dtype"] == "float32"
    path.write_text(json.dumps({**report, "dtype": "bfloat16"}))  # as made on a GPU
    assert "was made in another way" in text2world(*words).stderr
    assert "is finished" in text2world(*words).stderr
