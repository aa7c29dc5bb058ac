"""From a prompt, an image or a clip to a video through the command line, and what may go wrong."""

from __future__ import annotations

import gc
import os
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

import worldline.video.write
from worldline.cli.progress import Progress
from worldline.errors import Error
from worldline.step import Step
from worldline.video.read import probe
from worldline.weights.checkpoint import save

from ..conftest import frames_of
from ..offloading import stand_for_a_gpu
from ..tiny_diffusion import (
    CONTEXT_WIDTH,
    CONTINUOUS,
    DEFAULTS,
    TEXT2WORLD,
    TEXT_ENCODER,
    VIDEO2WORLD,
)
from .conftest import WITHOUT_UPSAMPLER, Make, Run
from .results import (
    alter,
    check_mentions,
    check_refused,
    fail_at,
    files_in,
    report_of,
    videos,
    write_lines,
)

PROMPT = "a red ball rolls to the right"
SIZE = tuple(DEFAULTS[name] for name in ("num_video_frames", "height", "width"))


@pytest.fixture
def embeddings(tmp_path: Path) -> Path:
    """A file with embeddings of two prompts."""
    path = tmp_path / "embeddings.safetensors"
    save({n: torch.randn(7, CONTEXT_WIDTH) for n in ("prompt", "negative_prompt")}, path)
    return path


def test_text_to_video(text2world: Make, tmp_path: Path) -> None:
    result = text2world("--prompt", PROMPT)
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    assert files_in(out) == videos("output")
    info = probe(out / "output.mp4")
    assert (info.frames, info.height, info.width, info.fps) == (*SIZE, 24)
    assert (out / "output.txt").read_bytes() == PROMPT.encode()
    report = report_of(tmp_path)
    assert report["model"] == TEXT2WORLD
    assert report["request"]["prompt"] == PROMPT
    assert report["request"]["num_input_frames"] == 0
    assert [stage["name"] for stage in report["run"]["stages"]] == ["text", "denoise", "decode"]
    for part in (str(out / "output.mp4"), "s a step", "peak memory", "seed 1"):
        assert part in result.stdout
    for part in ("encoding the prompt", f"denoising in {DEFAULTS['num_steps']} steps", "decoding"):
        assert part in result.stderr


def test_the_line_of_a_video_names_what_is_streamed(
    text2world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = text2world("--prompt", PROMPT)
    assert "streamed" not in whole.stdout
    frames = frames_of(tmp_path / "out" / "output.mp4")
    stand_for_a_gpu(monkeypatch)
    flags = ("--offload_tokenizer", "--offload_diffusion_transformer")
    result = text2world("--prompt", PROMPT, *flags)
    assert result.exit_code == 0, result.stderr
    assert "streamed diffusion_transformer, " in result.stdout
    assert report_of(tmp_path)["streamed"] == ["diffusion_transformer"]
    assert np.array_equal(frames_of(tmp_path / "out" / "output.mp4"), frames)


@pytest.mark.parametrize("given", [1, 9])
def test_clip_to_video(given: int, video2world: Make, clip: Path, tmp_path: Path) -> None:
    words = ("--input_image_or_video_path", clip, "--prompt", PROMPT, "--num_input_frames", given)
    result = video2world(*words, "--video-save-name", "a.webm", "--fps", 12)
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    assert files_in(out) == {"a.webm", "a.txt", "a.json"}
    info = probe(out / "a.webm")
    assert (info.frames, info.height, info.width, info.fps) == (*SIZE, 12)
    report = report_of(tmp_path, "a")
    assert report["request"]["num_input_frames"] == given
    assert report["request"]["reinsertion"] == "corrected"
    stamps = {stamp["path"]: stamp["nbytes"] for stamp in report["files"]}
    assert stamps[str(clip)] == clip.stat().st_size


def test_one_frame(text2world: Make, tmp_path: Path) -> None:
    result = text2world("--prompt", PROMPT, "--num_video_frames", 1)
    assert result.exit_code == 0, result.stderr
    assert "1 frame of" in result.stdout
    assert probe(tmp_path / "out" / "output.mp4").frames == 1


def test_a_batch_of_prompts_equals_single_ones(text2world: Make, tmp_path: Path) -> None:
    batch = tmp_path / "b.jsonl"
    batch.write_text(f'{{"prompt": "{PROMPT}"}}\n\n{{"prompt": "ünïcode"}}')
    result = text2world("--batch_input_path", batch, "--video_save_name", "unused")
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    assert files_in(out) == videos("0", "2")
    assert (out / "2.txt").read_bytes() == "ünïcode".encode()
    assert f"2 of 2 videos are in {out}" in result.stdout
    assert "--video_save_name has no effect" in result.stderr
    assert text2world("--prompt", PROMPT).exit_code == 0
    first, second, alone = (frames_of(out / f"{name}.mp4") for name in ("0", "2", "output"))
    assert first == alone != second


def test_a_batch_of_clips_and_images(
    video2world: Make, clip: Path, image: Path, tmp_path: Path
) -> None:
    lines = [{"visual_input": str(path), "prompt": PROMPT} for path in (clip, image)]
    result = video2world("--batch_input_path", write_lines(tmp_path / "b.jsonl", *lines))
    assert result.exit_code == 0, result.stderr
    assert files_in(tmp_path / "out") == videos("0", "1")
    assert report_of(tmp_path, "1")["request"]["num_video_frames"] == SIZE[0]


def test_flags_decide(text2world: Make, tmp_path: Path) -> None:
    def frames(*words: object) -> str:
        result = text2world("--prompt", PROMPT, *words)
        assert result.exit_code == 0, result.stderr
        return frames_of(tmp_path / "out" / "output.mp4")

    first = frames()
    for words in (
        ("--seed", 2),
        ("--guidance", 0),
        ("--negative_prompt", "fog"),
        ("--sampler", "res_2ab"),
        ("--fps", 12),
        ("--num_steps", 2),
    ):
        assert frames(*words) != first, words
    assert frames("--seed", 1, "--sampler", "edm_euler") == first


def test_bundled_worlds_have_their_own_defaults(
    run: Run, bundled_diffusion: dict[str, Any], tmp_path: Path
) -> None:
    fixed = ("--diffusion_transformer_dir", f"tiny-{VIDEO2WORLD}", "--prompt", PROMPT)
    words: tuple[object, ...] = (*fixed, "--video_save_folder", tmp_path / "out")
    assert run("diffusion", "text2world", *words).exit_code == 0
    report = report_of(tmp_path)
    assert report["model"] == f"tiny-{VIDEO2WORLD}"
    for name in DEFAULTS:
        assert report["request"][name] == bundled_diffusion[name]
    words = (*words, "--num-steps", 35, "--num_video_frames", 9, "--seed", 4, "--height", 32)
    result = run("diffusion", "text2world", *words)
    assert result.exit_code == 0, result.stderr
    asked = report_of(tmp_path)["request"]
    assert asked["num_steps"] == 35  # typed, though it is the class's own default
    assert (asked["num_video_frames"], asked["width"]) == (9, bundled_diffusion["width"])


def test_embeddings_in_place_of_the_text_encoder(
    video2world: Make, clip: Path, own_worlds: Path, embeddings: Path, tmp_path: Path
) -> None:
    shutil.rmtree(own_worlds / TEXT_ENCODER)
    words = ("--input_image_or_video_path", clip, "--prompt_embeddings", embeddings)
    result = video2world(*words, "--text_encoder_dtype", "float32", checkpoint_dir=own_worlds)
    assert result.exit_code == 0, result.stderr
    assert "--text_encoder_dtype has no effect: embeddings are given" in result.stderr
    assert report_of(tmp_path)["request"]["prompt"] is None
    assert files_in(tmp_path / "out") == {"output.mp4", "output.json"}
    assert "is finished" in video2world(*words, "--resume", checkpoint_dir=own_worlds).stderr
    alter(embeddings)
    resumed = video2world(*words, "--resume", checkpoint_dir=own_worlds)
    assert "made again" in resumed.stderr


def test_embeddings_win_over_a_prompt(text2world: Make, embeddings: Path, tmp_path: Path) -> None:
    for name, words in (("alone", ()), ("both", ("--prompt", PROMPT))):
        result = text2world("--prompt_embeddings", embeddings, *words, "--video_save_name", name)
        assert result.exit_code == 0, result.stderr
    alone, both = (frames_of(tmp_path / "out" / f"{name}.mp4") for name in ("alone", "both"))
    assert alone == both


@pytest.mark.parametrize(("name", "rates"), [("a.mp4", (1, 240)), ("a.gif", (1, 100))])
def test_the_fastest_and_slowest_rate(
    name: str, rates: tuple[int, ...], text2world: Make, tmp_path: Path
) -> None:
    for fps in rates:
        words = ("--prompt", PROMPT, "--fps", fps, "--video_save_name", name)
        result = text2world(*words, "--preview_every", 1)
        assert result.exit_code == 0, result.stderr
        check_mentions(result.stderr, f"fps {fps} 12 40")
        info = probe(tmp_path / "out" / name)
        assert (info.frames, info.fps) == (SIZE[0], fps)


def test_flags_without_effect_are_named(text2world: Make) -> None:
    flags = ("--offload_guardrail_models", "--offload_prompt_upsampler")
    offload = ("--offload_tokenizer", "--offload_diffusion_transformer")
    valued = ("--prompt_upsampler_dir", "x", "--word_limit_to_skip_upsampler", 3)
    unused = ("--guidance", 0, "--negative_prompt", "fog")
    result = text2world("--prompt", PROMPT, *flags, *offload, *valued, *unused)
    assert result.exit_code == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if "no effect" in line]
    for flag in (*flags, *offload, *valued[::2], "--negative_prompt"):
        assert any(flag in line for line in lines), flag
    assert not any("--guidance" in line for line in lines)


# --- progress and previews


def test_previews_come_and_go(
    text2world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float]] = []

    def spy(frames: Any, path: Path, fps: float) -> None:
        real(frames, path, fps)
        if ".preview" in path.name:
            info = probe(path)
            seen.append((info.frames, info.fps))

    real = worldline.video.write.write_video
    monkeypatch.setattr(worldline.video.write, "write_video", spy)
    words = ("--prompt", PROMPT, "--preview_every", 2, "--num_steps", 5, "--fps", 16)
    result = text2world(*words)
    assert result.exit_code == 0, result.stderr
    assert seen == [(1 + (SIZE[0] - 1) // 8, 16 / 8)] * 2  # one for the 8 frames of a latent one
    assert result.stderr.count("output.preview.mp4") == 1
    assert files_in(tmp_path / "out") == videos("output")


def test_a_preview_replaces_and_deletes_no_other_file(text2world: Make, tmp_path: Path) -> None:
    other = tmp_path / "out" / "output.preview.mp4"
    other.parent.mkdir()
    other.write_bytes(b"another")
    result = text2world("--prompt", PROMPT, "--preview_every", 1)
    assert result.exit_code == 0, result.stderr
    assert other.read_bytes() == b"another"
    assert files_in(tmp_path / "out") == {other.name, *videos("output")}
    assert result.stderr.count(str(other)) == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_of_a_video_in_parts(
    terminal: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A later part goes on where the one before ended, and only its own steps take its time."""
    bars = []

    class Bar(tqdm.tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any) -> None:
            if not options.get("disable"):
                bars.append((options["initial"], options["total"]))
            super().__init__(**options)

    def steps() -> Iterator[Step]:
        for part in range(3):
            yield from (Step("denoise", 4 * part + done, 12) for done in range(5))
            yield Step("decode", part, 3)

    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(tqdm, "tqdm", Bar)
    with caplog.at_level("INFO"), Progress("a ball", Path("a.mp4"), 24) as progress:
        for step in steps():
            progress.report(step)
    lines = [message for message in caplog.messages if "denoising" in message]
    assert bars == ([(0, 12), (4, 12), (8, 12)] if terminal else [])
    line = "a ball: denoising in 12 steps"
    assert lines == ([] if terminal else [line, f"{line}, 4 are done", f"{line}, 8 are done"])
    assert ("step/s" in capsys.readouterr().err) == terminal


# --- wrong words and inputs; what needs no model is in test_refusals.py


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        ("--num_video_frames 10", "num_video_frames 10 8k 9"),
        ("--num_video_frames 19", "num_video_frames 19 8k 17"),
        ("--num_video_frames 16385", "num_video_frames 16385 41"),
        ("--height 40", "height 40 16"),
        ("--width 16000", "width 16000 16 128"),
        ("--height 40 --width 100", "height 40 width 100"),
        ("--diffusion_transformer_dir Nowhere", f"Nowhere {TEXT2WORLD}"),
        ("--diffusion_transformer_dir tiny-Nowhere", "tiny-Nowhere"),
        ("--tokenizer_dir Nowhere", "Nowhere --tokenizer_dir"),
        ("--text_encoder_dir Nowhere", "Nowhere --text_encoder_dir"),
        ("--prompt_embeddings nowhere.pt", "nowhere.pt"),
        ("--device abacus", "abacus"),
        ("--sampler res_2mid --num_steps 1", "num_steps 1 res_2mid"),
        (f"--diffusion_transformer_dir {VIDEO2WORLD}", VIDEO2WORLD),
        ("--diffusion_transformer_dir Cosmos-Tokenize1-CV8x8x8-720p", "CV8x8x8"),
    ],
)
@pytest.mark.usefixtures("forbid_weights")
def test_text2world_refuses(words: str, mentioned: str, text2world: Make, tmp_path: Path) -> None:
    check_refused(text2world("--prompt", PROMPT, *words.split()), mentioned, tmp_path)


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        ("--num_input_frames 9 --num_video_frames 9", "num_video_frames 9 num_input_frames 17"),
        ("--num_video_frames 1", "num_video_frames 1 num_input_frames 9"),
        ("--reinsertion march_2025 --sampler res_2ab", "march_2025 edm_euler res_2ab"),
        (f"--diffusion_transformer_dir {TEXT2WORLD}", TEXT2WORLD),
    ],
)
@pytest.mark.usefixtures("forbid_weights")
def test_video2world_refuses(
    words: str, mentioned: str, video2world: Make, clip: Path, tmp_path: Path
) -> None:
    fixed = ("--input_image_or_video_path", clip, "--prompt", PROMPT)
    check_refused(video2world(*fixed, *words.split()), mentioned, tmp_path)


@pytest.mark.usefixtures("forbid_weights")
def test_video2world_refuses_an_input_that_does_not_suit(
    video2world: Make, clip: Path, short_clip: Path, image: Path, tmp_path: Path
) -> None:
    check_refused(video2world("--input_image_or_video_path", clip), "prompt", tmp_path)
    for path, mentioned in ((short_clip, f"{short_clip} 5 9"), (image, "num_input_frames 9 1")):
        words = ("--input_image_or_video_path", path, "--prompt", PROMPT, "--num_input_frames", 9)
        check_refused(video2world(*words), mentioned, tmp_path)


@pytest.mark.usefixtures("forbid_weights")
def test_a_model_of_another_family(text2world: Make, small_world: Path, tmp_path: Path) -> None:
    words = ("--diffusion_transformer_dir", small_world / "Cosmos-Predict1-4B")
    check_refused(text2world("--prompt", PROMPT, *words), "autoregressive generate", tmp_path)


@pytest.mark.usefixtures("forbid_weights")
def test_all_bad_lines_are_named_at_once(
    text2world: Make, video2world: Make, clip: Path, image: Path, tmp_path: Path
) -> None:
    batch = write_lines(tmp_path / "t.jsonl", {"prompt": "x"}, {"prompt": ""}, {"visual": 1}, "x")
    continued = [
        {"visual_input": str(clip), "prompt": "x"},
        {"visual_input": str(image), "prompt": "x"},
        {"visual_input": str(clip), "prompt": ""},
        {"visual_input": "nowhere.mp4", "prompt": "x"},
    ]
    other = write_lines(tmp_path / "v.jsonl", *continued)
    for file, result in (
        (batch, text2world("--batch_input_path", batch)),
        (other, video2world("--batch_input_path", other, "--num_input_frames", 9)),
    ):
        check_refused(result, "", tmp_path)
        lines = [line for line in result.stderr.splitlines() if "no effect" not in line]
        assert len(lines) == 3
        for number in (2, 3, 4):
            named = [line for line in lines if f"{file} line {number} ({number - 1}.mp4)" in line]
            assert len(named) == 1, lines


@pytest.mark.parametrize("command", ["text2world", "video2world"])
@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((), ["--disable_prompt_upsampler", "--disable_guardrail"]),
        (("--disable_guardrail",), ["--disable_prompt_upsampler"]),
        (("--disable_prompt_upsampler",), ["--disable_guardrail"]),
    ],
)
def test_released_models_run_with_all_that_belongs_to_them(
    command: str,
    given: tuple[str, ...],
    named: list[str],
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
    assert result.exit_code == 2, result.output
    last = result.stderr.splitlines()[-1]
    assert sorted(word for word in last.split() if word.startswith("--disable")) == sorted(named)
    assert last.count("worldline checkpoints download") == len(named)


@pytest.mark.usefixtures("forbid_weights")
def test_missing_text_encoder(text2world: Make, own_worlds: Path, tmp_path: Path) -> None:
    shutil.rmtree(own_worlds / TEXT_ENCODER)
    result = text2world("--prompt", PROMPT, checkpoint_dir=own_worlds)
    check_refused(result, f"{TEXT_ENCODER} text_encoder_dir prompt negative_prompt", tmp_path)
    path = own_worlds / "one.safetensors"
    save({"prompt": torch.randn(3, CONTEXT_WIDTH)}, path)
    words = ("--prompt", PROMPT, "--prompt_embeddings", path)
    result = text2world(*words, checkpoint_dir=own_worlds)
    check_refused(result, f"{TEXT_ENCODER} negative_prompt", tmp_path)


@pytest.mark.usefixtures("forbid_weights")
def test_an_output_never_replaces_an_input(
    text2world: Make, video2world: Make, clip: Path, tmp_path: Path
) -> None:
    batch = write_lines(tmp_path / "out" / "0.json", {"prompt": PROMPT})
    preview = Path(shutil.copy(clip, tmp_path / "out" / "a.preview.mp4"))
    words = ("--input_image_or_video_path", preview, "--prompt", PROMPT, "--video_save_name", "a")
    for path, result in (
        (batch, text2world("--batch_input_path", batch)),
        (preview, video2world(*words, "--preview_every", 1)),
    ):
        assert result.exit_code == 2
        check_mentions(result.stderr, f"{path} input")


# --- failed, interrupted, resumed


def test_ctrl_c_leaves_no_partial_video(
    text2world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, KeyboardInterrupt(), 1)
    batch = write_lines(tmp_path / "b.jsonl", {"prompt": "a"}, {"prompt": "b"})
    result = text2world("--batch_input_path", batch, "--preview_every", 1)
    assert result.exit_code == 130
    assert result.stderr.endswith("worldline: interrupted\n")
    assert files_in(tmp_path / "out") == videos("0")


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


def test_a_batch_goes_on_after_a_bad_item_with_free_memory(
    text2world: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Held:
        def __init__(self) -> None:
            self.itself = self  # only the collector finds it

    left = weakref.ref(Held())
    freed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(left() is None))
    fail_at(monkeypatch, Error("this one failed"), 0)
    batch = write_lines(tmp_path / "b.jsonl", {"prompt": "a"}, {"prompt": "b"})
    gc.disable()
    try:
        result = text2world("--batch_input_path", batch)
    finally:
        gc.enable()
    assert result.exit_code == 1
    assert "error: 1/2 “a”: this one failed" in result.stderr
    check_mentions(result.stderr.splitlines()[-1], "1 2 --resume")
    assert files_in(tmp_path / "out") == videos("1")
    assert freed == [True]


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
    monkeypatch.setattr("worldline.weights.networks.Network.read", None)
    result = text2world(*words)
    assert result.exit_code == 0
    check_mentions(result.stdout, f"3 {out}")


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
    assert "is finished" in video2world(*words, checkpoint_dir=own_worlds).stderr  # contents decide
    alter(files[changed])
    assert "made again" in video2world(*words, checkpoint_dir=own_worlds).stderr
    assert "is finished" in video2world(*words, checkpoint_dir=own_worlds).stderr


@pytest.mark.parametrize(
    ("first", "cases"),
    [
        (
            "",
            {
                "--sampler edm_euler --rotary_precision bfloat16": True,
                "--preview_every 1": True,
                "--text_encoder_dtype float32": True,  # the default on a CPU
                "--sampler res_2ab": False,
                "--rotary_precision float32": False,
                "--generation 1.0": False,
                "--text_encoder_dtype bfloat16": False,
                "--negative_prompt fog": False,
            },
        ),
        ("--generation 1.0", {"": False}),
        ("--text_encoder_dtype bfloat16", {"": False}),
        ("--guidance 0", {"--guidance 0 --negative_prompt fog": True}),
    ],
)
def test_resume_knows_other_ways(
    first: str, cases: dict[str, bool], text2world: Make, own_worlds: Path, tmp_path: Path
) -> None:
    (own_worlds / TEXT2WORLD).rename(own_worlds / "mine")  # a name that states no generation
    words = ("--diffusion_transformer_dir", "mine", "--device", "cpu", "--prompt", PROMPT)
    assert text2world(*words, *first.split(), checkpoint_dir=own_worlds).exit_code == 0
    shutil.copytree(tmp_path / "out", tmp_path / "kept")
    for then, finished in cases.items():
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "kept", tmp_path / "out")
        result = text2world(*words, *then.split(), "--resume", checkpoint_dir=own_worlds)
        assert result.exit_code == 0, result.stderr
        assert ("is finished" in result.stderr) == finished, then
        assert ("made again" in result.stderr) != finished, then


def test_resume_knows_when_no_text_is_encoded(
    text2world: Make, embeddings: Path, own_worlds: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone.safetensors"
    save({"prompt": torch.randn(7, CONTEXT_WIDTH)}, alone)
    for given, finished in ((embeddings, True), (alone, False)):
        words = ("--prompt_embeddings", given, "--device", "cpu")
        assert text2world(*words, checkpoint_dir=own_worlds).exit_code == 0
        words = (*words, "--resume", "--text_encoder_dtype", "bfloat16")
        for _ in range(2):
            result = text2world(*words, checkpoint_dir=own_worlds)
            assert ("is finished" in result.stderr) == finished
            alter(own_worlds / TEXT_ENCODER / "model.safetensors")
