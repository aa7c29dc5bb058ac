"""`worldline autoregressive base`: from file to file, and everything that may go wrong on the way.

What every family shares (outputs, exit statuses, --resume, full disks, Ctrl-C) is tested here.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import worldline
from worldline import memory, opening
from worldline.cli.progress import Progress
from worldline.errors import Error, GuardrailRefusal, InputError
from worldline.files import check_folder
from worldline.memory import Memory
from worldline.video.read import probe, read_video
from worldline.weights.checkpoint import open_checkpoint, save

from ..conftest import MODEL, TOKENIZER, frames_of
from .conftest import WITHOUT_PARTS, Make, Run
from .results import alter, check_mentions, check_refused, fail_at, files_in, report_of, write_lines


def write_batch(path: Path, *inputs: Path) -> Path:
    return write_lines(path, *({"visual_input": str(each)} for each in inputs))


# --- what works


def test_video_to_video(base: Make, clip: Path, tmp_path: Path) -> None:
    result = base("--input_image_or_video_path", clip)
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    assert files_in(out) == {"output.mp4", "output.json"}
    info = probe(out / "output.mp4")
    assert (info.frames, info.height, info.width, info.fps) == (33, 32, 48, 25)
    report = report_of(tmp_path)
    assert (report["model"], report["input"]) == (MODEL, str(clip))
    assert report["request"] == {
        "prompt": None,
        "prompt_embeddings": None,
        "fit": "crop",
        "num_input_frames": 9,
        "num_video_frames": 33,
        "temperature": 1.0,
        "top_p": 0.8,
        "seed": 0,
        "decoder_seam": "corrected",
        "rollout": "tokens",
        "step_cache": "off",
    }
    assert report["diffusion_decoder"] is None
    stages = report["run"]["stages"]
    assert [one["name"] for one in stages] == ["read", "encode", "prefill", "tokens", "decode"]
    assert all(stage["seconds"] >= 0 < stage["peak_gb"] for stage in stages)
    assert report["tokens"] == 18
    assert {"worldline", "torch", "python", "device", "load"} <= report.keys()
    assert {Path(file["path"]).name: file["nbytes"] for file in report["files"]}.items() >= {
        "model.pt": (Path(report["files"][0]["path"]).stat().st_size),
        clip.name: clip.stat().st_size,
    }.items()
    for part in (str(out / "output.mp4"), "tokens/s", "peak memory", "seed 0", "encode"):
        assert part in result.stdout
    for part in ("encoding", "drawing 18 tokens"):  # no bar without a terminal: a line a stage
        assert part in result.stderr


def test_image_to_video(base: Make, image: Path, tmp_path: Path) -> None:
    words = ("--input-type", "image", "--num_input_frames", 9, "--video-save-name", "a.webm")
    result = base("--input-image-or-video-path", image, *words)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path, "a")
    assert (report["request"]["num_input_frames"], report["tokens"]) == (1, 24)
    assert probe(tmp_path / "out" / "a.webm").frames == 33
    assert "--num_input_frames has no effect: an image has 1 frame" in result.stderr
    assert "failure rates: 15 % from 1 frame" in result.stderr  # published, of 4B


@pytest.mark.parametrize("size", [1, 2])
def test_batch_equals_single(size: int, base: Make, clip: Path, tmp_path: Path) -> None:
    other, out = Path(shutil.copy(clip, tmp_path / "other.mp4")), tmp_path / "out"
    words = ("--input_prompts_path", write_batch(tmp_path / "b.jsonl", clip, other))
    result = base("--seed", 3, *words, "--video_save_name", "unused", "--batch_size", size)
    assert result.exit_code == 0, result.stderr
    assert files_in(out) == {"0.mp4", "0.json", "1.mp4", "1.json"}
    assert report_of(tmp_path, "1")["clips_at_once"] == size
    assert f"2 of 2 videos are in {out}" in result.stdout
    assert "--video_save_name has no effect" in result.stderr
    alone = base("--seed", 3, "--input_image_or_video_path", clip, "--batch_size", 2)
    assert "--batch_size has no effect: there is one input" in alone.stderr
    assert len({frames_of(out / f"{name}.mp4") for name in ("0", "1", "output")}) == 1
    assert base("--seed", 4, "--input_image_or_video_path", clip).exit_code == 0
    assert frames_of(out / "output.mp4") != frames_of(out / "0.mp4")


def test_flags_without_effect_are_named(base: Make, clip: Path) -> None:
    flags = (
        "--offload_guardrail_models",
        "--offload_diffusion_decoder",
        "--offload_ar_model",
        "--offload_tokenizer",
        "--offload_prompt_upsampler",
    )
    words = ("--temperature", 0, "--seed", 5)
    result = base("--input_image_or_video_path", clip, *flags, *words)
    assert result.exit_code == 0, result.stderr
    for flag in (*flags, "--seed"):
        assert result.stderr.count(f"{flag} has no effect") == 1
    assert "--top_p" not in result.stderr  # it was not typed


def test_progress_bar_on_a_terminal(
    small_world: Path, clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    world = worldline.load(
        small_world / MODEL, disable_guardrail=True, disable_diffusion_decoder=True
    )
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("label", Path("a.mp4"), 25) as progress:
        for step in world.stream(clip):
            if step.video is None:
                progress.report(step)
    check_mentions(capsys.readouterr().err, "label token/s")


# --- wrong words and inputs


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        ([], "--input_image_or_video_path --batch_input_path"),
        (["CLIP", "--num_gpus", 0], "--num_gpus is 0 1 auto"),
        (["CLIP", "--num_gpus", "many"], "--num_gpus many"),
        (["CLIP", "--num_gpus", 2, "--device", "cpu:0"], "--device cpu:0 2"),
        (["CLIP", "--num_gpus", 5000, "--device", "cpu"], "5000"),
        (["CLIP", "--batch_input_path", "b"], "exclude each other"),
        (["--batch_input_path", "b", "--input_prompts_path", "b"], "--input_prompts_path"),
        (["--input_image_or_video_path", ""], "is empty"),
        (["--input_image_or_video_path", "nowhere.mp4"], "nowhere.mp4: no such file"),
        (["--input_image_or_video_path", "."], "directory"),
        (["--input_image_or_video_path", "absent"], "absent: no such file"),
        (["SHORT"], "short.mp4 5 frames num_input_frames is 9"),
        (["IMAGE"], "picture.png --input_type image"),
        (["CLIP", "--input_type", "image"], "clip.mp4 --input_type video"),
        (["CLIP", "--temperature", "-0.1"], "--temperature is -0.1"),
        (["CLIP", "--temperature", "nan"], "--temperature is nan"),
        (["CLIP", "--top_p", "0"], "--top_p is 0.0"),
        (["CLIP", "--top_p", "1.01"], "--top_p is 1.01"),
        (["CLIP", "--seed", "-1"], "--seed is -1"),
        (["CLIP", "--seed", 2**32], "--seed is 4294967296"),
        (["CLIP", "--batch_size", "0"], "--batch_size 0 auto"),
        (["CLIP", "--batch_size", "1.5"], "--batch_size 1.5 auto"),
        (["CLIP", "--num_video_frames", "48"], "num_video_frames is 48 49"),
        (["CLIP", "--video_save_name", ""], "--video_save_name"),
        (["CLIP", "--video_save_name", "x" * 300], "304 bytes"),
        (["CLIP", "--video_save_folder", "x" * 300], "--video_save_folder"),
        (["CLIP", "--video_save_name", "x.avi"], "x.avi .mp4 .mov .mkv"),
        (["CLIP", "--video_save_name", "x.PNG"], "x.PNG .mp4 .mov .mkv"),
        (["CLIP", "--ar_model_dir", "Nowhere"], "Nowhere"),
        (["CLIP", "--ar_model_dir", ""], "--ar_model_dir is empty"),
        (["CLIP", "--checkpoint_dir", "nowhere"], "nowhere"),
        (["CLIP", "--ar_model_dir", f"tiny-{MODEL[:-1]}"], f"no bundled model tiny-{MODEL}"),
        (["CLIP", "--device", "abacus"], "no device abacus"),
    ],
)
@pytest.mark.usefixtures("forbid_weights")
def test_wrong_input(
    words: list[Any],
    mentioned: str,
    base: Make,
    clip: Path,
    short_clip: Path,
    image: Path,
    tmp_path: Path,
) -> None:
    single = {"CLIP": clip, "SHORT": short_clip, "IMAGE": image}
    if words and words[0] in single:
        words = ["--input_image_or_video_path", single[words[0]], *words[1:]]
    check_refused(base(*words), mentioned, tmp_path)


def test_several_processes(
    base: Make, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_refused(base("--input_image_or_video_path", clip), "WORLD_SIZE 4 RANK torchrun", tmp_path)


@pytest.mark.parametrize("typed", WITHOUT_PARTS)
def test_released_models_run_as_released(
    typed: str, run: Run, clip: Path, small_world: Path
) -> None:
    words = ("--checkpoint_dir", small_world, "--input_image_or_video_path", clip)
    [other] = set(WITHOUT_PARTS) - {typed}
    result = run("autoregressive", "base", *words, typed)
    check_refused(result, other, clip.parent)
    assert typed not in result.stderr


@pytest.mark.usefixtures("forbid_weights")
def test_unwritable_folder(base: Make, clip: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file is in the way")
    words = f"{tmp_path / 'out'} cannot be written"
    check_refused(base("--input_image_or_video_path", clip), words, clip.parent)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_a_folder_that_takes_no_file() -> None:
    """Root may write there by its permissions, yet nothing can be made."""
    with pytest.raises(InputError, match="/proc/self/out: it cannot be written"):
        check_folder(Path("/proc/self/out"))


@pytest.mark.parametrize("ending", ["mp4", "json", "txt"])
@pytest.mark.usefixtures("forbid_weights")
def test_a_folder_in_the_way(ending: str, base: Make, clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / f"output.{ending}"
    folder.mkdir(parents=True)
    check_refused(base("--input_image_or_video_path", clip), f"{folder} folder", clip.parent)


@pytest.mark.usefixtures("forbid_weights")
def test_an_output_never_replaces_an_input(base: Make, clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    source = Path(shutil.copy(clip, out / "output.mp4"))
    check_refused(base("--input_image_or_video_path", source), f"{source} is an input", clip.parent)
    source = source.rename(out / "0.mp4")
    check_refused(base("--batch_input_path", out), f"{source} is an input", clip.parent)
    assert source.read_bytes() == clip.read_bytes()
    lines = write_batch(out / "0.json", clip)
    source.unlink()
    check_refused(base("--batch_input_path", lines), f"{lines} is an input", clip.parent)


# --- wrong checkpoints


def break_model(path: Path, change: str) -> None:
    """Change one tensor of a checkpoint, in shape, kind or name."""
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
    elif change == "levels":
        [name] = [name for name in tensors if name.endswith("_levels")]
        tensors[name] = torch.tensor([4, 4, 4, 2], dtype=torch.int32)
    save(tensors, path)


@pytest.mark.parametrize(
    ("change", "mentioned"),
    [
        ("no model", "no model.pt"),
        ("part", "model.pt.incomplete"),
        ("no tokenizer", "Cosmos-Tokenize1-DV8x16x16-720p"),
        ("half a tokenizer", "decoder.safetensors"),
        ("truncated", "model.pt"),
        ("pointer", "git-lfs"),
        ("shape", "model.layers.1.attention.wk.weight [31, 64] [32, 64]"),
        ("missing", "missing model.layers.1.attention.wk.weight"),
        ("unknown", "unknown model.layers.1.attention.bias"),
        ("foreign", "no model family unet.conv.weight"),
        ("settings", "config.json"),
        ("other tokenizer", "128 vocabulary 64 do not belong together"),
        ("one latent frame", "config.json video_latent_shape is [1, 2, 3]"),
        ("two latent frames", "num_input_frames is 9 9 frames"),
    ],
)
@pytest.mark.usefixtures("forbid_weights")
def test_wrong_checkpoint(
    change: str, mentioned: str, base: Make, clip: Path, own_world: Path
) -> None:
    model, tokenizer = own_world / MODEL / "model.pt", own_world / TOKENIZER
    settings = model.with_name("config.json")
    if change == "no model":
        model.unlink()
    elif change == "part":
        model.rename(model.with_name("model.pt.incomplete"))
    elif change == "no tokenizer":
        shutil.rmtree(tokenizer)
    elif change == "half a tokenizer":
        (tokenizer / "decoder.safetensors").unlink()
    elif change == "truncated":
        os.truncate(model, model.stat().st_size // 2)
    elif change == "pointer":
        model.write_text("version https://git-lfs.github.com/spec/v1\nsize 8\n")
    elif change == "settings":
        settings.write_text("{")
    elif change == "other tokenizer":
        for half in ("encoder", "decoder"):
            break_model(tokenizer / f"{half}.safetensors", "levels")
    elif "latent" in change:
        shape = [1 if change.startswith("one") else 2, 2, 3]
        known = json.loads(settings.read_text())
        settings.write_text(json.dumps({**known, "video_latent_shape": shape}))
    else:
        break_model(model, change)
    result = base("--input_image_or_video_path", clip, checkpoint_dir=own_world)
    check_refused(result, mentioned, clip.parent)
    assert result.stderr.count("\n") == 1


# --- memory


@pytest.mark.usefixtures("forbid_weights")
def test_too_little_gpu_memory(base: Make, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100_000_000, 8_000_000_000))
    monkeypatch.setattr(opening, "choose_device", lambda _: torch.device("cuda"))
    result = base("--input_image_or_video_path", clip)
    check_refused(result, f"{MODEL} GPU memory 0.1 of 8.0 GB", clip.parent)


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (
            torch.OutOfMemoryError("no room\nmore"),
            "no room; offload flags (--offload_…) or a smaller size need less memory\n",
        ),
        (MemoryError(), "MemoryError\n"),
    ],
)
def test_out_of_memory(
    error: Exception, end: str, base: Make, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, error, 0, "tokens")
    result = base("--input_image_or_video_path", clip)
    assert result.exit_code == 1
    assert result.stderr.endswith(end)


@pytest.mark.usefixtures("forbid_weights")
@pytest.mark.parametrize(
    ("rollout", "clips", "room", "gigabytes"),
    [
        ("tokens", 1, 0.999, "2.3"),
        ("pixels", 2, 1.999, "4.6"),  # clips drawn in step are held together
        ("tokens", 2, 1.001, "2.3"),  # no room for the networks, on a CPU
    ],
)
def test_frames_that_find_no_room(
    rollout: str,
    clips: int,
    room: float,
    gigabytes: str,
    base: Make,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A long video is drawn piece by piece, but held as a whole: refused before weights load."""
    free = int(room * 3 * 32 * 48 * 500_001)
    monkeypatch.setattr(memory, "host_memory", lambda: Memory(free, 24 * 10**9))
    batch = write_batch(tmp_path / "b.jsonl", *[clip] * clips)
    words = ("--batch_input_path", batch, "--batch_size", clips, "--num_video_frames", 500_001)
    result = base(*words, "--rollout", rollout)
    check_refused(result, f"num_video_frames 500001 {gigabytes} GB host memory", tmp_path)


# --- interrupted, full disk, two at once


def test_ctrl_c_leaves_no_partial_video(
    base: Make, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, KeyboardInterrupt(), 1, "tokens")
    result = base("--batch_input_path", write_batch(tmp_path / "b.jsonl", clip, clip))
    assert result.exit_code == 130
    assert result.stderr.endswith("worldline: interrupted\n")
    assert files_in(tmp_path / "out") == {"0.mp4", "0.json"}


@pytest.mark.slow
def test_a_real_interrupt(small_world: Path, clip: Path, tmp_path: Path) -> None:
    """SIGINT while tokens are drawn, in a process of its own."""
    script = (
        "import os, signal\n"
        "from worldline.world import World\n"
        "real = World.run_batch\n"
        "def run_batch(self, jobs):\n"
        "    for index, step in real(self, jobs):\n"
        "        if step.kind == 'tokens':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "        yield index, step\n"
        "World.run_batch = run_batch\n"
        "from worldline.cli.main import main\n"
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
    base: Make, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = write_batch(tmp_path / "b.jsonl", clip, clip, clip)
    out = tmp_path / "out"
    assert base("--batch_input_path", batch, "--seed", 1).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    real, calls = os.fsync, iter(range(100))

    def full(file: int) -> None:
        if next(calls) >= 2:  # the first video and its report still fit
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    result = base("--batch_input_path", batch, "--seed", 2)
    assert result.exit_code == 1
    last = result.stderr.splitlines()[-1]
    assert "1.mp4" in last
    assert "No space left on device" in last
    after = {path.name: path.read_bytes() for path in out.iterdir()}
    assert after.keys() == before.keys()  # no temporary file is left
    assert after["0.json"] != before["0.json"]
    for name in after:
        assert name[0] == "0" or after[name] == before[name]


@pytest.mark.slow
def test_two_runs_of_one_name_do_not_mix(
    small_world: Path, clip: Path, tmp_path: Path, base: Make
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
    report = json.loads((tmp_path / "shared" / "output.json").read_text())
    seed = report["request"]["seed"]
    assert base("--input_image_or_video_path", clip, "--seed", seed).exit_code == 0
    made, alone = (read_video(tmp_path / name / "output.mp4").frames for name in ("shared", "out"))
    assert np.array_equal(made, alone)  # the report belongs to it


# --- batches that fail in part, and --resume


@pytest.mark.parametrize(
    ("failure", "status"),
    [(Error("this one failed"), 1), (GuardrailRefusal("it was refused", "video"), 3)],
)
def test_a_batch_goes_on_after_a_failure(
    failure: Exception,
    status: int,
    base: Make,
    clip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, words = tmp_path / "out", ("--batch_input_path", tmp_path / "b.jsonl", "--resume")
    write_batch(tmp_path / "b.jsonl", clip, clip, clip)
    assert base(*words).exit_code == 0
    for number in (0, 2):
        (out / f"{number}.mp4").unlink()
    fail_at(monkeypatch, failure, 0, "tokens")
    result = base(*words)
    assert result.exit_code == status
    assert result.stdout.endswith(f"\n2 of 3 videos are in {out}: 1 made now, 1 there before\n")
    assert f"error: 1/2{f' {clip}' if status == 1 else ''}: {failure}\n" in result.stderr
    assert "worldline: 1 of 3 inputs " in result.stderr
    assert files_in(out) == {"1.mp4", "2.mp4", "0.json", "1.json", "2.json"}


def test_resume(base: Make, clip: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    words = ("--batch_input_path", write_batch(tmp_path / "b.jsonl", clip, clip, clip), "--resume")
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
    request.getfixturevalue("forbid_weights")
    result = base(*words)
    assert result.exit_code == 0
    assert result.stdout == f"3 of 3 videos are in {out}: 0 made now, 3 there before\n"


@pytest.mark.parametrize("changed", ["input", "transformer", "settings", "tokenizer"])
def test_resume_knows_changed_files(
    changed: str, base: Make, clip: Path, own_world: Path, tmp_path: Path
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
    assert "is finished" in base(*words, checkpoint_dir=own_world).stderr  # contents decide
    alter(files[changed])
    assert "made again" in base(*words, checkpoint_dir=own_world).stderr
    assert "is finished" in base(*words, checkpoint_dir=own_world).stderr


@pytest.mark.parametrize(
    ("first", "then", "finished"),
    [
        ((), ("--rollout", "pixels", "--decoder_seam", "as_released"), True),
        ((), ("--offload_ar_model", "--offload_tokenizer", "--batch_size", 4), True),
        ((), ("--num_video_frames", 33), True),
        (("--temperature", 0), ("--temperature", 0, "--top_p", 0.5, "--seed", 3), True),
        (("--temperature", 0), (), False),
        ((), ("--seed", 1), False),
        ((), ("--num_video_frames", 49), False),
        (("--num_video_frames", 49), ("--num_video_frames", 49, "--rollout", "pixels"), False),
    ],
)
def test_resume_knows_what_has_no_effect(
    first: tuple[object, ...],
    then: tuple[object, ...],
    finished: bool,
    base: Make,
    clip: Path,
    tmp_path: Path,
) -> None:
    words = ("--input_image_or_video_path", clip)
    assert base(*words, *first).exit_code == 0
    made = frames_of(tmp_path / "out" / "output.mp4")
    result = base(*words, *then, "--resume")
    assert result.exit_code == 0, result.stderr
    assert ("is finished" if finished else "made again") in result.stderr
    assert base(*words, *then).exit_code == 0
    assert (frames_of(tmp_path / "out" / "output.mp4") == made) == finished


@pytest.mark.parametrize("ending", ["json", "gif"])
def test_resume_makes_a_damaged_video_again(
    ending: str, base: Make, clip: Path, tmp_path: Path
) -> None:
    words = ("--input_image_or_video_path", clip, "--video_save_name", "a.gif", "--resume")
    assert base(*words).exit_code == 0
    path = tmp_path / "out" / f"a.{ending}"
    made = path.read_bytes()
    for damaged in (b"", b"null", b"[]", made[: len(made) // 2]):
        path.write_bytes(damaged)
        result = base(*words)
        assert result.exit_code == 0
        assert "made again" in result.stderr
        assert frames_of(tmp_path / "out" / "a.gif")
        assert ending == "json" or path.read_bytes() == made
    assert "is finished" in base(*words).stderr
