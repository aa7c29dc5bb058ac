"""From video file to video file through the command line, and everything that may go wrong."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import worldline.loading
import worldline.locate
from worldline import machine
from worldline.errors import Error, GuardrailRefusal
from worldline.machine import Memory
from worldline.video.read import probe, read_video
from worldline.weights.read import open_checkpoint
from worldline.weights.write import save
from worldline.world import World

from ..conftest import MODEL, TOKENIZER, frames_of
from .conftest import WITHOUT_PARTS, Base, Run
from .parity import check_options, variants

PARTS = ("transformer", "tokenizer")


def write_batch(path: Path, *inputs: Path) -> Path:
    path.write_text("".join(json.dumps({"visual_input": str(i)}) + "\n" for i in inputs))
    return path


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- what works


def test_video_to_video(base: Base, clip: Path, tmp_path: Path) -> None:
    result = base("--input_image_or_video_path", clip)
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    assert files_in(out) == {"output.mp4", "output.json"}
    info = probe(out / "output.mp4", kind="video")
    assert (info.frames, info.height, info.width, info.fps) == (33, 32, 48, 25)
    report = json.loads((out / "output.json").read_text())
    assert report["model"] == MODEL
    assert report["input"] == str(clip)
    assert report["request"] == {
        "num_input_frames": 9,
        "temperature": 1.0,
        "top_p": 0.8,
        "seed": 0,
        "decoder_seam": "corrected",
        "num_video_frames": None,
        "rollout": "tokens",
    }
    assert report["diffusion_decoder"] is None
    assert [stage["name"] for stage in report["run"]["stages"]] == [
        "read",
        "encode",
        "prefill",
        "tokens",
        "decode",
    ]
    assert all(stage["seconds"] >= 0 < stage["peak_gb"] for stage in report["run"]["stages"])
    assert report["tokens"] == 18
    assert {"worldline", "torch", "python", "device", "load"} <= report.keys()
    assert report["attention"] == "torch SDPA (prompt), matrix products (decoding)"
    names = {part: [Path(file["path"]).name for file in report["files"][part]] for part in PARTS}
    assert names == {
        "transformer": ["model.pt", "config.json"],
        "tokenizer": ["decoder.safetensors", "encoder.safetensors"],
    }
    assert report["files"]["input"]["nbytes"] == clip.stat().st_size
    # where the video is, seconds, tokens/s, peak memory
    for part in (str(out / "output.mp4"), "tokens/s", "peak memory", "seed 0", "encode"):
        assert part in result.stdout
    # no bar without a terminal, but a line a stage
    for part in ("encoding", "drawing 18 tokens"):
        assert part in result.stderr


def test_image_to_video(base: Base, image: Path, tmp_path: Path) -> None:
    words = ("--input-type", "image", "--num_input_frames", 9, "--video-save-name", "a.webm")
    result = base("--input-image-or-video-path", image, *words)
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "out" / "a.json").read_text())
    assert report["request"]["num_input_frames"] == 1
    assert report["tokens"] == 24
    assert probe(tmp_path / "out" / "a.webm", kind="video").frames == 33
    assert "an image has 1 frame" in result.stderr
    # the published failure rates of 4B
    assert "warning: from 1 frame about 15 %" in result.stderr


def test_batch_equals_single(base: Base, clip: Path, tmp_path: Path) -> None:
    other = shutil.copy(clip, tmp_path / "other.mp4")
    batch = write_batch(tmp_path / "b.jsonl", clip, Path(other))
    words = ("--seed", 3, "--input_prompts_path", batch, "--video_save_name", "unused")
    result = base(*words, "--offload_prompt_upsampler")
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    assert files_in(out) == {"0.mp4", "0.json", "1.mp4", "1.json"}
    assert f"2 of 2 videos are in {out}" in result.stdout
    assert "--offload_prompt_upsampler has no effect" in result.stderr
    assert "--video_save_name has no effect" in result.stderr
    single = base("--seed", 3, "--input_image_or_video_path", clip)
    assert single.exit_code == 0
    first, second, alone = (frames_of(out / f"{name}.mp4") for name in ("0", "1", "output"))
    assert first == second == alone  # one seed, one input, one result


def test_seed_decides(base: Base, clip: Path, tmp_path: Path) -> None:
    videos = []
    for seed in (0, 1):
        words = ("--seed", seed, "--video_save_name", seed, "--top_p", 1)
        assert base("--input_image_or_video_path", clip, *words).exit_code == 0
        videos.append(frames_of(tmp_path / "out" / f"{seed}.mp4"))
    assert videos[0] != videos[1]


def test_folder_batch_and_blank_lines(base: Base, clip: Path, tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    shutil.copy(clip, media / "a.mp4")
    assert base("--batch_input_path", media).exit_code == 0
    assert files_in(tmp_path / "out") == {"0.mp4", "0.json"}
    batch = tmp_path / "b.jsonl"
    batch.write_text("\n" + json.dumps({"visual_input": str(clip)}))
    assert base("--batch_input_path", batch).exit_code == 0
    assert (tmp_path / "out" / "1.mp4").exists()


def test_bundled_runs_without_the_parts(
    run: Run, clip: Path, small_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worldline.locate, "BUNDLED", small_world)
    words = ("--ar_model_dir", f"tiny-{MODEL}", "--video_save_folder", tmp_path / "out")
    result = run("autoregressive", "base", *words, "--input_image_or_video_path", clip)
    assert result.exit_code == 0, result.stderr
    report = json.loads((tmp_path / "out" / "output.json").read_text())
    assert report["model"] == f"tiny-{MODEL}"


def test_notes_of_what_has_no_effect(base: Base, clip: Path) -> None:
    flags = (
        "--offload_guardrail_models",
        "--offload_diffusion_decoder",
        "--offload_ar_model",
        "--offload_tokenizer",
    )
    words = ("--temperature", 0, "--seed", 5)
    result = base("--input_image_or_video_path", clip, *flags, *words)
    assert result.exit_code == 0, result.stderr
    for flag in (*flags, "--seed"):
        assert result.stderr.count(f"{flag} has no effect") == 1
    assert "--top_p has no effect" not in result.stderr  # it was not given


def test_progress_bar_on_a_terminal(
    small_world: Path, clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from worldline.cli.run import follow

    world = worldline.load(
        small_world / MODEL, disable_guardrail=True, disable_diffusion_decoder=True
    )
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    video = follow(world.stream(clip), "clip")
    assert len(video.frames) == 33
    shown = capsys.readouterr().err
    assert "clip" in shown
    assert "token/s" in shown


# --- parity


@pytest.mark.parametrize("variant", variants("autoregressive/inference/base.py"))
def test_every_flag_of_the_reference(variant: dict[str, Any]) -> None:
    check_options("autoregressive", "base", variant, of_a_generation=("--ar_model_dir",))


# --- wrong words and inputs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --input_image_or_video_path or --batch_input_path"),
        (["--num_gpus", 2], "--num_gpus is 2; this version runs on 1 GPU: give --num_gpus 1"),
        (["--num_gpus", 0], "--num_gpus is 0"),
        (["CLIP", "--batch_input_path", "b"], "--input_image_or_video_path and --batch_input_path"),
        (["--batch_input_path", "b", "--input_prompts_path", "b"], "exclude each other"),
        (["--input_image_or_video_path", ""], "is empty"),
        (["--input_image_or_video_path", "nowhere.mp4"], "nowhere.mp4: no such file"),
        (["--input_image_or_video_path", "."], "no suffix"),
        (["SHORT"], "has 5 frames, but --num_input_frames is 9"),
        (["IMAGE"], "is an image, but --input_type is video; use --input_type image"),
        (["CLIP", "--input_type", "image"], "is a video, but --input_type is image"),
        (["CLIP", "--temperature", "-0.1"], "temperature is -0.1"),
        (["CLIP", "--temperature", "nan"], "temperature is nan"),
        (["CLIP", "--temperature", "inf"], "temperature is inf"),
        (["CLIP", "--top_p", "0"], "top_p is 0.0"),
        (["CLIP", "--top_p", "1.01"], "top_p is 1.01"),
        (["CLIP", "--top_p", "nan"], "top_p is nan"),
        (["CLIP", "--seed", "-1"], "seed is -1"),
        (["CLIP", "--seed", 2**32], "seed is 4294967296"),
        (["CLIP", "--video_save_name", ""], "is no name"),
        (["CLIP", "--video_save_name", "x" * 300], "a name in it has 304 bytes"),
        (["CLIP", "--video_save_folder", "x" * 300], "a name in it has 300 bytes"),
        (["CLIP", "--video_save_name", "x.avi"], "cannot write .avi; use .mp4 .mov .mkv"),
        (["CLIP", "--video_save_name", "x.PNG"], "cannot write .png; use .mp4 .mov .mkv"),
        (["CLIP", "--ar_model_dir", "Nowhere"], "no folder"),
        (["CLIP", "--ar_model_dir", ""], "--ar_model_dir is empty"),
        (["CLIP", "--checkpoint_dir", "nowhere"], "no checkpoint folder nowhere"),
        (["CLIP", "--ar_model_dir", "tiny-Nowhere"], "there is no bundled model tiny-Nowhere"),
        (["CLIP", "--ar_model_dir", f"tiny-{MODEL[:-1]}"], f"; did you mean tiny-{MODEL}?"),
        (["CLIP", "--device", "abacus"], "no device abacus here"),
    ],
)
@pytest.mark.usefixtures("forbid_weights")
def test_wrong_input(
    words: list[Any],
    message: str,
    base: Base,
    clip: Path,
    short_clip: Path,
    image: Path,
    tmp_path: Path,
) -> None:
    single = {"CLIP": clip, "SHORT": short_clip, "IMAGE": image}
    if words and words[0] in single:
        words = ["--input_image_or_video_path", single[words[0]], *words[1:]]
    result = base(*words)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]
    assert result.stdout == ""
    assert not list(tmp_path.rglob("*.mp4"))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("forbid_weights")
def test_text_named_mp4(base: Base, tmp_path: Path) -> None:
    fake = tmp_path / "fake.mp4"
    fake.write_text("hello\n")
    result = base("--input_image_or_video_path", fake)
    assert result.exit_code == 2
    assert "is not an mp4, mov, mkv, webm or gif video but text" in result.stderr


@pytest.mark.usefixtures("forbid_weights")
def test_bad_lines_are_told_before_the_checkpoint_is_opened(
    base: Base, clip: Path, tmp_path: Path
) -> None:
    batch = write_batch(tmp_path / "b.jsonl", clip, tmp_path / "x.mp4", tmp_path / "y.mp4")
    result = base("--batch_input_path", batch, checkpoint_dir=tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "2 of 3 inputs cannot be used" in result.stderr
    for number in (2, 3):
        assert re.search(rf"line {number}: .*\(output {number - 1}\.mp4\)\n", result.stderr)


def test_several_processes(base: Base, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    result = base("--input_image_or_video_path", clip)
    assert result.exit_code == 2
    assert "4 processes (WORLD_SIZE)" in result.stderr


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((), ["--disable_diffusion_decoder"]),
        (("--disable_guardrail",), ["--disable_diffusion_decoder"]),
        (("--disable_diffusion_decoder",), ["--disable_guardrail"]),
    ],
)
def test_released_models_run_as_released(
    given: tuple[str, ...], told: list[str], run: Run, clip: Path, small_world: Path
) -> None:
    words = ("--checkpoint_dir", small_world, "--input_image_or_video_path", clip)
    result = run("autoregressive", "base", *words, *given)
    assert result.exit_code == 2
    last = result.stderr.splitlines()[-1]
    assert [word for word in last.split() if word.startswith("--disable")] == told


@pytest.mark.usefixtures("forbid_weights")
def test_unwritable_folder(base: Base, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file is in the way")
    result = base("--input_image_or_video_path", clip)
    assert result.exit_code == 2
    assert f"--video_save_folder {tmp_path / 'out'} cannot be written" in result.stderr


@pytest.mark.usefixtures("forbid_weights")
def test_an_output_never_replaces_an_input(base: Base, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    source = Path(shutil.copy(clip, out / "output.mp4"))
    result = base("--input_image_or_video_path", source)
    assert result.exit_code == 2
    assert "is an input" in result.stderr
    source = source.rename(out / "0.mp4")
    result = base("--batch_input_path", out)
    assert result.exit_code == 2
    assert source.read_bytes() == clip.read_bytes()


# --- wrong checkpoints


def break_model(folder: Path, change: str) -> None:
    path = folder / MODEL / "model.pt"
    source = open_checkpoint(path)
    tensors = {name: source.read(name).clone() for name in source.tensors}
    name = "model.layers.1.attention.wk.weight"
    if change == "shape":
        tensors[name] = torch.zeros(31, 64)
    elif change == "missing":
        del tensors[name]
    elif change == "unknown":
        tensors["model.layers.1.attention.bias"] = torch.zeros(3)
    elif change == "foreign":
        tensors = {"unet.conv.weight": torch.zeros(3, 3)}
    save(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no model", "holds no model.pt"),
        ("part", "a download was not finished (model.pt.incomplete)"),
        ("no tokenizer", "no discrete tokenizer"),
        ("half a tokenizer", "half downloaded: decoder.safetensors is missing"),
        ("truncated", "model.pt"),
        ("pointer", "git-lfs"),
        ("shape", "model.layers.1.attention.wk.weight is [31, 64] in the file, expected [32, 64]"),
        ("missing", "1 missing: model.layers.1.attention.wk.weight"),
        ("unknown", "1 unknown: model.layers.1.attention.bias"),
        ("foreign", "not an autoregressive Cosmos model"),
        ("settings", "config.json cannot be read"),
        ("other tokenizer", "do not belong together"),
    ],
)
@pytest.mark.usefixtures("forbid_weights")
def test_wrong_checkpoint(
    change: str, message: str, base: Base, clip: Path, own_world: Path
) -> None:
    model, tokenizer = own_world / MODEL, own_world / TOKENIZER
    if change == "no model":
        (model / "model.pt").unlink()
    elif change == "part":
        (model / "model.pt").rename(model / "model.pt.incomplete")
    elif change == "no tokenizer":
        shutil.rmtree(tokenizer)
    elif change == "half a tokenizer":
        (tokenizer / "decoder.safetensors").unlink()
    elif change == "truncated":
        os.truncate(model / "model.pt", (model / "model.pt").stat().st_size // 2)
    elif change == "pointer":
        (model / "model.pt").write_text("version https://git-lfs.github.com/spec/v1\nsize 8\n")
    elif change == "settings":
        (model / "config.json").write_text("{")
    elif change == "other tokenizer":
        for half in ("encoder", "decoder"):
            path = tokenizer / f"{half}.safetensors"
            source = open_checkpoint(path)
            tensors = {name: source.read(name).clone() for name in source.tensors}
            for name in tensors:
                if name.endswith("_levels"):
                    tensors[name] = torch.tensor([4, 4, 4, 2], dtype=torch.int32)
            save(tensors, path)
    else:
        break_model(own_world, change)
    result = base("--input_image_or_video_path", clip, checkpoint_dir=own_world)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.usefixtures("forbid_weights")
def test_too_little_gpu_memory(base: Base, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100_000_000, 8_000_000_000))
    monkeypatch.setattr(worldline.world, "choose_device", lambda _: torch.device("cuda"))
    result = base("--input_image_or_video_path", clip)
    assert result.exit_code == 2
    line = result.stderr.splitlines()[-1]
    assert re.search(r"needs about \d+\.\d GB of GPU memory, 0\.1 of 8\.0 GB are free", line)


def test_out_of_memory_names_the_flags(
    base: Base, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any, **__: Any) -> Iterator[Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(World, "stream", exhausted)
    result = base("--input_image_or_video_path", clip, "--offload_tokenizer")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith("--offload_ar_model lowers the need")


@pytest.mark.usefixtures("forbid_weights")
@pytest.mark.parametrize("rollout", ["tokens", "pixels"])
@pytest.mark.parametrize(
    ("unguarded", "taken"), [(("--disable_guardrail",), "2.3 GB"), ((), "4.6 GB")]
)
@pytest.mark.parametrize("spare", [-1, 1])
def test_frames_that_find_no_room(
    spare: int,
    unguarded: tuple[str, ...],
    taken: str,
    rollout: str,
    run: Run,
    small_world: Path,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A long video is drawn piece by piece, but held as a whole: told before guardrails load."""
    frames = 500_001
    need = 3 * 32 * 48 * frames * (1 if unguarded else 2)
    monkeypatch.setattr(machine, "host_memory", lambda: Memory(need + spare, 24 * 10**9))
    places = ("--checkpoint_dir", small_world, "--video_save_folder", tmp_path / "out")
    words = ("--input_image_or_video_path", clip, "--disable_diffusion_decoder", *unguarded)
    length = ("--num_video_frames", frames, "--rollout", rollout)
    result = run("autoregressive", "base", *places, *words, *length)
    assert result.exit_code == 2
    assert (
        f"num_video_frames is {frames}: all frames of 32 x 48 pixels take {taken} of host memory"
    ) in result.stderr
    assert (" and the world " in result.stderr) == (spare > 0)
    assert not (tmp_path / "out").exists()


def test_out_of_host_memory_names_no_flag(
    base: Base, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any, **__: Any) -> Iterator[Any]:
        raise MemoryError

    monkeypatch.setattr(World, "stream", exhausted)
    result = base("--input_image_or_video_path", clip)
    assert result.exit_code == 1
    assert result.stderr.endswith("out of memory: no memory left\n")


# --- interrupted, full disk, two at once, resumed


def failing_stream(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int, kind: str = "tokens"
) -> None:
    """Make the run of number `at` raise when it comes to `kind`."""
    real = World.stream
    runs = iter(range(100))

    def stream(self: World, *args: Any, **options: Any) -> Iterator[Any]:
        number = next(runs)
        for step in real(self, *args, **options):
            if number == at and step.kind == kind:
                raise error
            yield step

    monkeypatch.setattr(World, "stream", stream)


def test_ctrl_c_leaves_no_partial_video(
    base: Base, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_stream(monkeypatch, KeyboardInterrupt(), at=1)
    batch = write_batch(tmp_path / "b.jsonl", clip, clip)
    result = base("--batch_input_path", batch)
    assert result.exit_code == 130
    assert result.stderr.endswith("worldline: interrupted\n")
    assert files_in(tmp_path / "out") == {"0.mp4", "0.json"}


@pytest.mark.slow
def test_a_real_interrupt(small_world: Path, clip: Path, tmp_path: Path) -> None:
    """SIGINT while tokens are drawn, in a process of its own."""
    script = (
        "import os, signal, sys\n"
        "from worldline.world import World\n"
        "real = World.stream\n"
        "def stream(self, *args, **options):\n"
        "    for step in real(self, *args, **options):\n"
        "        if step.kind == 'tokens':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "        yield step\n"
        "World.stream = stream\n"
        "from worldline.cli import main\n"
        "main()\n"
    )
    out = tmp_path / "out"
    words = ["--checkpoint_dir", small_world, "--video_save_folder", out, *WITHOUT_PARTS]
    done = subprocess.run(
        [sys.executable, "-c", script, "autoregressive", "base"]
        + [str(word) for word in (*words, "--input_image_or_video_path", clip)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.endswith("worldline: interrupted\n")
    assert not out.exists()


def test_full_disk_leaves_earlier_outputs_whole(
    base: Base, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = write_batch(tmp_path / "b.jsonl", clip, clip, clip)
    out = tmp_path / "out"
    assert base("--batch_input_path", batch, "--seed", 1).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    real = os.fsync
    calls = iter(range(100))

    def full(file: int) -> None:
        if next(calls) >= 2:  # the first video and its report still fit
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    result = base("--batch_input_path", batch, "--seed", 2)
    assert result.exit_code == 1
    assert "1.mp4 was not written: No space left on device" in result.stderr.splitlines()[-1]
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after.keys() == before.keys()  # no temporary file is left
    assert after["0.json"] != before["0.json"]
    assert {n: after[n] for n in after if n[0] != "0"} == {
        n: before[n] for n in before if n[0] != "0"
    }


def test_a_batch_goes_on_after_a_bad_item(
    base: Base, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_stream(monkeypatch, Error("this one failed"), at=0)
    result = base("--batch_input_path", write_batch(tmp_path / "b.jsonl", clip, clip))
    assert result.exit_code == 1
    assert f"error: 1/2 {clip}: this one failed" in result.stderr
    assert result.stderr.endswith("worldline: 1 of 2 inputs failed; --resume tries them alone\n")
    assert files_in(tmp_path / "out") == {"1.mp4", "1.json"}


def test_a_refused_item_ends_a_batch_with_3(
    base: Base, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_stream(monkeypatch, GuardrailRefusal("the video was refused", "video"), at=0)
    result = base("--batch_input_path", write_batch(tmp_path / "b.jsonl", clip, clip))
    assert result.exit_code == 3
    assert files_in(tmp_path / "out") == {"1.mp4", "1.json"}


def test_resume(base: Base, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = write_batch(tmp_path / "b.jsonl", clip, clip, clip)
    words = ("--batch_input_path", batch, "--resume")
    out = tmp_path / "out"
    assert base(*words).exit_code == 0
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "1.json").unlink()  # as if killed between the video and its report
    (out / "2.mp4").unlink()
    result = base(*words)
    assert result.exit_code == 0
    assert f"{out / '0.mp4'} is finished" in result.stderr
    assert result.stdout.endswith(f"\n3 of 3 videos are in {out}: 2 made now, 1 there before\n")
    changed = {p.name for p in out.iterdir() if p.stat().st_mtime_ns != times[p.name]}
    assert changed == {"1.mp4", "1.json", "2.mp4", "2.json"}
    # nothing is left: no weights are read
    monkeypatch.setattr(worldline.loading.parts, "load_into", None)
    result = base(*words)
    assert result.exit_code == 0
    assert result.stdout == f"nothing left to do in {out}: 3 of 3 videos were there before\n"


@pytest.mark.parametrize(
    ("failure", "code"),
    [(Error("this one failed"), 1), (GuardrailRefusal("it was refused", "video"), 3)],
)
def test_what_is_told_counts_what_was_there_before(
    failure: Exception,
    code: int,
    base: Base,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, words = tmp_path / "out", ("--batch_input_path", tmp_path / "b.jsonl", "--resume")
    write_batch(tmp_path / "b.jsonl", clip, clip, clip)
    assert base(*words).exit_code == 0
    for number in (0, 2):
        (out / f"{number}.mp4").unlink()
    failing_stream(monkeypatch, failure, at=0)
    result = base(*words)
    assert result.exit_code == code
    assert result.stdout.endswith(f"\n2 of 3 videos are in {out}: 1 made now, 1 there before\n")
    assert "worldline: 1 of 3 inputs " in result.stderr


@pytest.mark.parametrize("changed", ["input", "transformer", "settings", "tokenizer"])
def test_resume_knows_changed_files(
    changed: str, base: Base, clip: Path, own_world: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copy(clip, tmp_path / "in.mp4"))
    words = ("--input_image_or_video_path", source, "--resume")
    assert base(*words, checkpoint_dir=own_world).exit_code == 0
    files = {
        "input": source,
        "transformer": own_world / MODEL / "model.pt",
        "settings": own_world / MODEL / "config.json",
        "tokenizer": own_world / TOKENIZER / "decoder.safetensors",
    }
    assert "is finished" in base(*words, checkpoint_dir=own_world).stderr
    os.utime(files[changed], (1, 1))
    assert "was made in another way" in base(*words, checkpoint_dir=own_world).stderr
    assert "is finished" in base(*words, checkpoint_dir=own_world).stderr


@pytest.mark.usefixtures("forbid_weights")
def test_nothing_left_to_make(base: Base, clip: Path, own_world: Path) -> None:
    path = own_world / MODEL / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "video_latent_shape": [2, 2, 3]}))
    result = base("--input_image_or_video_path", clip, checkpoint_dir=own_world)
    assert result.exit_code == 2
    assert "this model makes 9 frames" in result.stderr
    assert result.stderr.endswith("give --num_input_frames 1\n")
    path.write_text(json.dumps({**settings, "video_latent_shape": [1, 2, 3]}))
    result = base("--input_image_or_video_path", clip, checkpoint_dir=own_world)
    assert result.exit_code == 2
    assert "config.json: video_latent_shape is [1, 2, 3]; it must be of 2 frames" in result.stderr


def test_nine_frames_of_one_are_made(base: Base, clip: Path, own_world: Path) -> None:
    path = own_world / MODEL / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "video_latent_shape": [2, 2, 3]}))
    words = ("--input_image_or_video_path", clip, "--num_input_frames", 1)
    result = base(*words, checkpoint_dir=own_world)
    assert result.exit_code == 0, result.stderr
    assert "9 frames of 48 x 32, seed 0" in result.stdout


def test_resume_makes_again_what_was_made_otherwise(base: Base, clip: Path, tmp_path: Path) -> None:
    words = ("--input_image_or_video_path", clip, "--resume")
    assert base(*words, "--seed", 1).exit_code == 0
    result = base(*words, "--seed", 2)
    assert result.exit_code == 0
    assert "was made in another way" in result.stderr
    report = json.loads((tmp_path / "out" / "output.json").read_text())
    assert report["request"]["seed"] == 2


@pytest.mark.parametrize(
    ("first", "then", "finished"),
    [
        ((), ("--rollout", "pixels", "--decoder_seam", "as_released"), True),
        ((), ("--offload_ar_model", "--offload_tokenizer", "--batch_size", 4), True),
        (("--temperature", 0), ("--temperature", 0, "--top_p", 0.5, "--seed", 3), True),
        ((), ("--temperature", 0), False),
        (("--temperature", 0), (), False),
        ((), ("--top_p", 0.5), False),
        ((), ("--num_video_frames", 49), False),
        (("--num_video_frames", 49), (), False),
        (("--num_video_frames", 49), ("--num_video_frames", 49, "--rollout", "pixels"), False),
    ],
)
def test_resume_knows_what_has_no_effect(
    first: tuple[object, ...],
    then: tuple[object, ...],
    finished: bool,
    base: Base,
    clip: Path,
    tmp_path: Path,
) -> None:
    words = ("--input_image_or_video_path", clip)
    assert base(*words, *first).exit_code == 0
    made = frames_of(tmp_path / "out" / "output.mp4")
    result = base(*words, *then, "--resume")
    assert result.exit_code == 0, result.stderr
    assert ("is finished" if finished else "was made in another way") in result.stderr
    assert base(*words, *then).exit_code == 0
    assert (frames_of(tmp_path / "out" / "output.mp4") == made) == finished


def test_resume_makes_again_what_another_device_made(
    base: Base, clip: Path, tmp_path: Path
) -> None:
    words = ("--input_image_or_video_path", clip, "--device", "cpu", "--resume")
    assert base(*words).exit_code == 0
    path = tmp_path / "out" / "output.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    assert "was made in another way" in base(*words).stderr
    assert "is finished" in base(*words).stderr


@pytest.mark.parametrize("changed", ["null", "[]", '{"files": null}', "{"])
def test_resume_makes_again_what_has_no_true_report(
    changed: str, base: Base, clip: Path, tmp_path: Path
) -> None:
    words = ("--input_image_or_video_path", clip, "--resume")
    assert base(*words).exit_code == 0
    (tmp_path / "out" / "output.json").write_text(changed)
    assert "was made in another way, or not finished" in base(*words).stderr
    assert "is finished" in base(*words).stderr


@pytest.mark.parametrize("ending", ["mp4", "json", "txt"])
@pytest.mark.usefixtures("forbid_weights")
def test_a_folder_in_the_way_is_told_first(
    ending: str, base: Base, clip: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out" / f"output.{ending}"
    folder.mkdir(parents=True)
    result = base("--input_image_or_video_path", clip)
    assert result.exit_code == 2
    assert f"{folder} is a folder" in result.stderr


def test_resume_makes_a_damaged_video_again(base: Base, clip: Path, tmp_path: Path) -> None:
    words = ("--input_image_or_video_path", clip, "--video_save_name", "a.gif", "--resume")
    assert base(*words).exit_code == 0
    path = tmp_path / "out" / "a.gif"
    made = path.read_bytes()
    for damaged in (b"", made[: len(made) // 2]):
        path.write_bytes(damaged)
        result = base(*words)
        assert result.exit_code == 0
        assert f"{path} is " in result.stderr
        assert ": made again" in result.stderr
        assert path.read_bytes() == made
    assert "is finished" in base(*words).stderr


@pytest.mark.slow
def test_two_runs_of_one_name_do_not_mix(
    small_world: Path, clip: Path, tmp_path: Path, base: Base
) -> None:
    """Two processes write the same name at once: the video is one of the two, whole."""
    words = ["autoregressive", "base", "--checkpoint_dir", small_world, *WITHOUT_PARTS]
    words += ["--video_save_folder", tmp_path / "shared", "--input_image_or_video_path", clip]
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "worldline", *map(str, words), "--seed", str(seed)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for seed in (1, 2)
    ]
    assert [run.wait() for run in runs] == [0, 0]
    assert files_in(tmp_path / "shared") == {"output.mp4", "output.json"}
    made = read_video(tmp_path / "shared" / "output.mp4").frames
    alone = []
    for seed in (1, 2):
        assert base("--input_image_or_video_path", clip, "--seed", seed).exit_code == 0
        alone.append(read_video(tmp_path / "out" / "output.mp4").frames)
    report = json.loads((tmp_path / "shared" / "output.json").read_text())
    assert np.array_equal(made, alone[report["request"]["seed"] - 1])  # the report belongs to it
