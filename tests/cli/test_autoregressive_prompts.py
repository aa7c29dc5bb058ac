"""`worldline autoregressive video2world`, and the diffusion decoder of both commands."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from worldline import locate
from worldline.families.autoregressive import family
from worldline.video.read import probe, read_video
from worldline.weights.checkpoint import save
from worldline.world import World

from ..conftest import MODEL, frames_of
from ..tiny_decoder import DECODER, OLD_DECODER, VIDEO2WORLD
from ..tiny_diffusion import CONTEXT_LENGTH, CONTEXT_WIDTH, CONTINUOUS, TEXT_ENCODER
from .conftest import Make, Run
from .results import check_refused, report_of, write_lines

PROMPT = "A ball rolls."
AUX = f"{DECODER}/aux_vars.pt"  # embedding of the general prompt
PLAIN = ("--disable_diffusion_decoder",)


def files_of(report: dict[str, Any]) -> set[str]:
    """Last two parts of the path of each file that decided a video."""
    return {"/".join(Path(file["path"]).parts[-2:]) for file in report["files"]}


def test_video_and_prompt(ar_video2world: Make, clip: Path, tmp_path: Path) -> None:
    result = ar_video2world("--input_image_or_video_path", clip, "--prompt", PROMPT)
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"output.mp4", "output.json", "output.txt"}
    assert (out / "output.txt").read_text() == PROMPT
    info = probe(out / "output.mp4")
    assert (info.frames, info.height, info.width, info.fps) == (33, 32, 48, 25)
    report = report_of(tmp_path)
    assert report["request"]["prompt"] == PROMPT
    assert report["decoder"] == "plain modules"
    assert report["diffusion_decoder"] == {
        "sampler": "edm_euler",
        "num_steps": 15,
        "rotary_precision": "float32",  # that of the weights
        "guidance": 1.8,
        "seed": 0,
        "seam": "corrected",
        "tokens": 48,
        "attention": "torch SDPA",
    }
    stages = ["read", "text", "encode", "prefill", "tokens", "denoise", "decode"]
    assert [stage["name"] for stage in report["run"]["stages"]] == stages
    assert report["tokens"] == 18
    assert {f"{TEXT_ENCODER.split('/')[-1]}/config.json", AUX} & files_of(report) == {
        f"{TEXT_ENCODER.split('/')[-1]}/config.json"  # a prompt decides, not the general one
    }
    assert set(report["offload"].values()) == {False}
    for part in ("encoding the prompt", "drawing 18 tokens", "denoising in 15 steps"):
        assert part in result.stderr


def test_image_and_prompt(ar_video2world: Make, image: Path, tmp_path: Path) -> None:
    words = ("--input_type", "text_and_image", "--prompt", PROMPT, "--disable_diffusion_decoder")
    result = ar_video2world("--input_image_or_video_path", image, *words)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path)
    assert (report["request"]["num_input_frames"], report["tokens"]) == (1, 24)
    assert "failure rates: 7 % from 1 frame" in result.stderr  # published, of 5B


def test_embeddings_in_place_of_the_text_encoder(
    ar_video2world: Make, clip: Path, own_whole_world: Path, tmp_path: Path
) -> None:
    shutil.rmtree(own_whole_world / TEXT_ENCODER)
    path = tmp_path / "prompt.safetensors"
    save({"prompt": torch.randn(5, CONTEXT_WIDTH)}, path)
    words = ("--input_image_or_video_path", clip, "--prompt_embeddings", path, *PLAIN)
    result = ar_video2world(*words, checkpoint_dir=own_whole_world)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path)
    assert f"{tmp_path.name}/prompt.safetensors" in files_of(report)
    assert report["request"]["prompt"] is None
    assert "text" not in [stage["name"] for stage in report["run"]["stages"]]
    unread = ("--text_encoder_dtype", "bfloat16", "--offload_text_encoder_model")
    again = ar_video2world(*words, *unread, "--resume", checkpoint_dir=own_whole_world)
    assert "is finished" in again.stderr
    for flag in unread[::2]:
        assert again.stderr.count(f"{flag} has no effect") == 1
    save({"prompt": torch.randn(5, CONTEXT_WIDTH + 1)}, path)
    wrong = ar_video2world(*words, checkpoint_dir=own_whole_world)
    check_refused(wrong, f"{path} (5, {CONTEXT_WIDTH + 1}) {CONTEXT_WIDTH})", clip.parent)


def test_long_prompts_are_cut(ar_video2world: Make, clip: Path, tmp_path: Path) -> None:
    """Each of a batch's reports counts its own prompt's tokens; a cached embedding is cut, too."""
    lengths = (CONTEXT_LENGTH + 1, CONTEXT_LENGTH - 1, CONTEXT_LENGTH)
    batch = write_prompts(tmp_path / "prompts.jsonl", clip, *("a" * length for length in lengths))
    for _ in range(2):
        result = ar_video2world("--batch_input_path", batch, "--batch_size", 3, *PLAIN)
        assert result.exit_code == 0, result.stderr
        reports = [report_of(tmp_path, str(number)) for number in range(3)]
        assert [report["clips_at_once"] for report in reports] == [3, 3, 3]
        assert [report["prompt_truncation"] for report in reports] == [
            {"prompt": {"max_length": CONTEXT_LENGTH, "num_truncated_tokens": 2}},
            {},
            {"prompt": {"max_length": CONTEXT_LENGTH, "num_truncated_tokens": 1}},
        ]
        first, _ = [line for line in result.stderr.splitlines() if ": warning: " in line]
        assert f"{CONTEXT_LENGTH + 2} tokens" in first


def test_base_with_the_decoder(
    base_with_decoder: Make, clip: Path, whole_world: Path, tmp_path: Path
) -> None:
    words = ("--input_image_or_video_path", clip, "--temperature", 0, "--top_p", 1)
    flags = ("--offload_diffusion_decoder", "--resume")
    result = base_with_decoder(*words, *flags)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path)
    assert {f"{DECODER}/model.pt", AUX} <= files_of(report)
    assert report["diffusion_decoder"]["num_steps"] == 15
    for flag, why in (("--offload_diffusion_decoder", "CPU"), ("--top_p", "temperature 0")):
        [line] = [x for x in result.stderr.splitlines() if f"{flag} has no effect" in x]
        assert why in line
    assert "is finished" in base_with_decoder(*words, *flags).stderr
    # decoded otherwise, it is another video
    plain = base_with_decoder(*words, *flags, *PLAIN)
    assert "made again" in plain.stderr
    assert "--offload_diffusion_decoder has no effect: no diffusion decoder runs" in plain.stderr


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        (["CLIP"], "no prompt --prompt"),
        (["CLIP", "--prompt", " "], "--prompt it is empty"),
        (["CLIP", "--prompt", "a \udcff ball"], "--prompt unicode"),
        (["CLIP", "--prompt_embeddings", ""], "prompt_embeddings"),
        (["CLIP", "--prompt_embeddings", "nowhere"], "embeddings nowhere"),
        (["--prompt", "x"], "--input_image_or_video_path --batch_input_path"),
        (["--prompt", "x", "--batch_input_path", "b"], "--prompt exclude each other"),
        (["--batch_input_path", "BATCH"], 'line 1 (0.mp4) no "prompt"'),
        (["CLIP", "--prompt", "x", "--ar_model_dir", MODEL], f"{MODEL} is a base model"),
        (["CLIP", "--prompt", "x", "--text_encoder_dir", "nowhere"], "text_encoder_dir"),
        (["CLIP", "--prompt", "x", "--input_type", "text_and_image"], "text_and_video"),
        (["CLIP", "--prompt", "x", "--ar_model_dir", DECODER], f"{DECODER}"),
    ],
)
@pytest.mark.usefixtures("forbid_weights")
def test_wrong_input(
    words: list[Any], mentioned: str, ar_video2world: Make, clip: Path, tmp_path: Path
) -> None:
    batch = write_lines(tmp_path / "b.jsonl", {"visual_input": str(clip)})
    if words[0] == "CLIP":
        words = ["--input_image_or_video_path", clip, *words[1:]]
    check_refused(
        ar_video2world(*(batch if word == "BATCH" else word for word in words)), mentioned, tmp_path
    )


@pytest.mark.parametrize(
    ("missing", "mentioned"),
    [
        (DECODER, f"{DECODER} {OLD_DECODER} --disable_diffusion_decoder"),
        (CONTINUOUS, f"{CONTINUOUS} --disable_diffusion_decoder"),
        (TEXT_ENCODER, f"{TEXT_ENCODER} text_encoder_dir"),
        ("begin token", f"{VIDEO2WORLD}/model.pt embedding_rows is 64 65 ids"),
    ],
)
@pytest.mark.usefixtures("forbid_weights")
def test_what_a_prompted_model_lacks(
    missing: str, mentioned: str, ar_video2world: Make, clip: Path, own_whole_world: Path
) -> None:
    path = own_whole_world / VIDEO2WORLD / "model.pt"
    if missing == "begin token":
        tensors = torch.load(path)
        table, rows = tensors["model.tok_embeddings.weight"], len(tensors["model.output.weight"])
        tensors["model.tok_embeddings.weight"] = table[:rows].clone()
        torch.save(tensors, path)
    else:
        shutil.rmtree(own_whole_world / missing)
    words = ("--input_image_or_video_path", clip, "--prompt", PROMPT)
    check_refused(ar_video2world(*words, checkpoint_dir=own_whole_world), mentioned, clip.parent)


@pytest.mark.usefixtures("forbid_weights")
def test_video2world_given_to_base(base_with_decoder: Make, clip: Path) -> None:
    words = ("--ar_model_dir", VIDEO2WORLD, "--input_image_or_video_path", clip)
    check_refused(base_with_decoder(*words), f"{VIDEO2WORLD} Video2World model", clip.parent)


def test_bundled_worlds_use_a_bundled_decoder(
    run: Run, clip: Path, whole_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locate, "BUNDLED", whole_world)
    words = ("--ar_model_dir", f"tiny-{MODEL}", "--video_save_folder", tmp_path / "out")
    for flags, decodes in (((), True), (PLAIN, False)):
        line = (*words, "--input_image_or_video_path", clip, "--decoder_seam", "corrected")
        result = run("autoregressive", "base", *line, *flags)
        assert result.exit_code == 0, result.stderr
        report = report_of(tmp_path)
        assert report["model"] == f"tiny-{MODEL}"
        assert (report["diffusion_decoder"] is not None) == decodes
        reason = "one window of the decoder is enough" if decodes else "no diffusion decoder runs"
        assert f"--decoder_seam has no effect: {reason}" in result.stderr
    rows = json.loads(run("models", "--json", "--device", "cpu").stdout)
    [row] = [row for row in rows if row["name"] == f"tiny-{MODEL}"]
    # of the discrete and the continuous tokenizer
    assert [file["name"] for file in row["files"]].count("decoder.safetensors") == 2
    assert f"tiny-{DECODER}" not in {row["name"] for row in rows}


def test_more_than_one_window(
    base_with_decoder: Make, clip: Path, own_whole_world: Path, tmp_path: Path
) -> None:
    """A model of 12 latent frames: the seam makes a difference, and --resume knows it."""
    path = own_whole_world / MODEL / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "video_latent_shape": [12, 2, 3]}))
    found = {}
    for seam in ("corrected", "as_released"):
        words = ("--input_image_or_video_path", clip, "--decoder_seam", seam, "--resume")
        result = base_with_decoder(*words, checkpoint_dir=own_whole_world)
        assert result.exit_code == 0, result.stderr
        assert "denoising in 30 steps" in result.stderr
        found[seam] = read_video(tmp_path / "out" / "output.mp4").frames
        assert found[seam].shape == (89, 32, 48, 3)
        assert report_of(tmp_path)["diffusion_decoder"]["seam"] == seam
    difference = np.abs(found["corrected"].astype(int) - found["as_released"].astype(int))
    assert difference[:50].max() <= 40  # coded as videos, they differ a little before the seam
    assert difference[58:].mean() > 4 * difference[:50].mean()


def test_cosmos_1(
    base_with_decoder: Make, clip: Path, own_whole_world: Path, tmp_path: Path
) -> None:
    root, old = own_whole_world, "Cosmos-1.0-Autoregressive-4B"
    (root / MODEL).rename(root / old)
    (root / DECODER).rename(root / OLD_DECODER)
    words = ("--ar_model_dir", old, "--input_image_or_video_path", clip)
    result = base_with_decoder(*words, checkpoint_dir=root)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path)
    assert report["diffusion_decoder"]["sampler"] == "res_2ab"


def write_prompts(path: Path, clip: Path, *prompts: str) -> Path:
    return write_lines(path, *({"visual_input": str(clip), "prompt": one} for one in prompts))


@pytest.fixture
def prompts(clip: Path, tmp_path: Path) -> Path:
    """A batch of three lines."""
    return write_prompts(tmp_path / "three.jsonl", clip, PROMPT, "Snow falls.", "Rain.")


def clips_at_once(folder: Path) -> list[int]:
    return [report_of(folder, str(number))["clips_at_once"] for number in range(3)]


def test_batch_equals_single(
    ar_video2world: Make, prompts: Path, clip: Path, tmp_path: Path
) -> None:
    """Two in step, then one alone; each is what it is alone."""
    out, words = tmp_path / "out", ("--seed", 3, "--top_p", 1)
    result = ar_video2world("--batch_input_path", prompts, "--batch_size", 2, *words)
    assert result.exit_code == 0, result.stderr
    assert "1-2/3 in step: drawing 18 tokens" in result.stderr
    assert f"3/3 {clip}: drawing 18 tokens" in result.stderr
    assert result.stdout.count("2 in step, ") == 2
    assert clips_at_once(tmp_path) == [2, 2, 1]
    assert (out / "1.txt").read_text() == "Snow falls."
    alone = ("--input_image_or_video_path", clip, "--prompt", "Snow falls.")
    assert ar_video2world(*alone, *words).exit_code == 0
    first, second, single = (frames_of(out / f"{name}.mp4") for name in ("0", "1", "output"))
    assert first != second == single  # the prompt decides
    again = ar_video2world("--batch_input_path", prompts, *words, "--resume")
    assert again.stdout == f"3 of 3 videos are in {out}: 0 made now, 3 there before\n"
    other = ar_video2world("--batch_input_path", prompts, "--seed", 4, "--resume", *PLAIN)
    assert other.stderr.count("made again") == 3


def test_a_group_that_fails_is_made_one_by_one(
    ar_video2world: Make, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = World.run_batch

    def run_batch(self: World, jobs: Any) -> Any:
        for number, step in real(self, jobs):
            yield number, step
            if step.video is not None and len(jobs) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(World, "run_batch", run_batch)
    result = ar_video2world("--batch_input_path", prompts, "--batch_size", 3, *PLAIN)
    assert result.exit_code == 0, result.stderr
    assert "1-3/3 in step: OutOfMemoryError: CUDA out of memory.; made one by one" in result.stderr
    assert clips_at_once(tmp_path) == [3, 1, 1]
    assert "3 of 3 videos" in result.stdout


def test_more_in_step_than_the_kernels_take(
    ar_video2world: Make, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, "FAMILY", replace(family.FAMILY, max_batch_size=lambda *_: 2))
    for size in ("3", "auto"):
        result = ar_video2world("--batch_input_path", prompts, "--batch_size", size, *PLAIN)
        assert result.exit_code == 0, result.stderr
        assert ("--batch_size 3: 2 are " in result.stderr) == (size == "3")
        assert clips_at_once(tmp_path) == [2, 2, 1]


def test_longer_than_the_window(ar_video2world: Make, clip: Path, tmp_path: Path) -> None:
    words = ("--input_image_or_video_path", clip, "--prompt", PROMPT)
    for way in ("tokens", "pixels"):
        result = ar_video2world(*words, "--num_video_frames", 49, "--rollout", way)
        assert result.exit_code == 0, result.stderr
        assert probe(tmp_path / "out" / "output.mp4").frames == 49
        report = report_of(tmp_path)
        assert (report["request"]["rollout"], report["tokens"]) == (way, 6 * 5)
    result = ar_video2world(*words, "--num_video_frames", 33, "--rollout", "pixels", *PLAIN)
    assert "--rollout has no effect" in result.stderr
