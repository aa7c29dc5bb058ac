"""`worldline autoregressive video2world`, and the diffusion decoder of both commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import worldline
from worldline.video.read import probe, read_video
from worldline.weights.write import save
from worldline.world import AutoregressiveWorld

from ..conftest import MODEL, frames_of
from ..tiny_decoder import (
    CONTEXT_LENGTH,
    CONTEXT_WIDTH,
    DECODER,
    OLD_DECODER,
    TEXT_ENCODER,
    VIDEO2WORLD,
)
from .conftest import Make, Run
from .parity import check_options, variants

PROMPT = "A ball rolls."


def report_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def names_of(files: list[dict[str, Any]]) -> list[str]:
    return [Path(file["path"]).name for file in files]


@pytest.mark.parametrize("variant", variants("autoregressive/inference/video2world.py"))
def test_every_flag_of_the_reference(variant: dict[str, Any]) -> None:
    check_options("autoregressive", "video2world", variant, of_a_generation=("--ar_model_dir",))


def test_video_and_prompt(ar_video2world: Make, clip: Path, tmp_path: Path) -> None:
    result = ar_video2world("--input_image_or_video_path", clip, "--prompt", PROMPT)
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"output.mp4", "output.json", "output.txt"}
    assert (out / "output.txt").read_text() == PROMPT
    info = probe(out / "output.mp4", kind="video")
    assert (info.frames, info.height, info.width, info.fps) == (33, 32, 48, 25)
    report = report_of(out / "output.json")
    assert report["request"]["prompt"] == PROMPT
    assert report["decoder"] == "plain modules"
    assert report["diffusion_decoder"] == {
        "sampler": "edm_euler",
        "num_steps": 15,
        "rotary_precision": "float32",  # that of the weights
        "guidance": 1.8,
        "seed": 0,
        "seam": "corrected",
    }
    assert [stage["name"] for stage in report["run"]["stages"]] == [
        "read",
        "text",
        "encode",
        "prefill",
        "tokens",
        "denoise",
        "decode",
    ]
    assert report["tokens"] == 18
    # a prompt decides, so the general one of aux_vars.pt is not read
    assert names_of(report["files"]["diffusion_decoder"]) == ["model.pt"]
    assert report["files"]["prompt_embeddings"] is None
    assert "text_encoder" in report["files"]
    assert set(report["offload"].values()) == {False}
    for part in ("encoding the prompt", "drawing 18 tokens", "denoising in 15 steps"):
        assert part in result.stderr


def test_image_and_prompt(ar_video2world: Make, image: Path, tmp_path: Path) -> None:
    words = ("--input_type", "text_and_image", "--prompt", PROMPT, "--num_input_frames", 9)
    result = ar_video2world("--input_image_or_video_path", image, *words)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path / "out" / "output.json")
    assert report["request"]["num_input_frames"] == 1
    assert report["tokens"] == 24
    assert "an image has 1 frame" in result.stderr
    assert "warning: from 1 frame about 7 %" in result.stderr  # published of 5B


def test_batch_equals_single(ar_video2world: Make, clip: Path, tmp_path: Path) -> None:
    batch = tmp_path / "b.jsonl"
    lines = [{"visual_input": str(clip), "prompt": prompt} for prompt in (PROMPT, "Snow falls.")]
    batch.write_text("\n".join(map(json.dumps, lines)))
    words = ("--seed", 3, "--top_p", 1)
    result = ar_video2world("--batch_input_path", batch, *words)
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    assert (out / "1.txt").read_text() == "Snow falls."
    single = ar_video2world("--input_image_or_video_path", clip, "--prompt", "Snow falls.", *words)
    assert single.exit_code == 0, single.stderr
    first, second, alone = (frames_of(out / f"{name}.mp4") for name in ("0", "1", "output"))
    assert first != second == alone  # the prompt decides
    again = ar_video2world("--batch_input_path", batch, *words, "--resume")
    assert "nothing left to do" in again.stdout
    (out / "0.txt").unlink()
    other = ar_video2world("--batch_input_path", batch, "--seed", 4, "--resume")
    assert other.stderr.count("was made in another way") == 2


def test_embeddings_in_place_of_the_text_encoder(
    ar_video2world: Make, clip: Path, own_whole_world: Path, tmp_path: Path
) -> None:
    shutil.rmtree(own_whole_world / TEXT_ENCODER)
    path = tmp_path / "prompt.safetensors"
    save({"prompt": torch.randn(5, CONTEXT_WIDTH)}, path)
    words = ("--input_image_or_video_path", clip, "--prompt_embeddings", path)
    result = ar_video2world(*words, checkpoint_dir=own_whole_world)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path / "out" / "output.json")
    assert names_of([report["files"]["prompt_embeddings"]]) == ["prompt.safetensors"]
    assert report["request"]["prompt"] is None
    assert "text" not in [stage["name"] for stage in report["run"]["stages"]]
    unread = ar_video2world(*words, "--offload_text_encoder_model")
    assert unread.stderr.count("--offload_text_encoder_model has no effect") == 1
    again = ar_video2world(*words, "--text_encoder_dtype", "bfloat16", "--resume")
    assert "is finished" in again.stderr
    save({"prompt": torch.randn(5, CONTEXT_WIDTH + 1)}, path)
    wrong = ar_video2world(*words, checkpoint_dir=own_whole_world)
    assert wrong.exit_code == 2
    assert f"prompt_embeddings {path} is float32 (5, {CONTEXT_WIDTH + 1})" in wrong.stderr
    assert f"it must be floating and finite, (S, {CONTEXT_WIDTH})" in wrong.stderr


def test_a_long_prompt_is_cut_and_said_so(ar_video2world: Make, clip: Path, tmp_path: Path) -> None:
    words = ("--prompt", "a" * (CONTEXT_LENGTH + 1), "--disable_diffusion_decoder")
    for _ in range(2):  # the second time its embedding is in the cache
        result = ar_video2world("--input_image_or_video_path", clip, *words)
        assert result.exit_code == 0, result.stderr
        [line] = [line for line in result.stderr.splitlines() if "warning" in line]
        assert f"has {CONTEXT_LENGTH + 2} tokens and is cut after {CONTEXT_LENGTH}" in line
        report = report_of(tmp_path / "out" / "output.json")
        cut = {"max_length": CONTEXT_LENGTH, "num_truncated_tokens": 2}
        assert report["prompt_truncation"] == {"prompt": cut}


def test_of_clips_in_step_each_report_tells_of_its_own_prompt(
    ar_video2world: Make, clip: Path, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    lengths = (CONTEXT_LENGTH + 1, CONTEXT_LENGTH - 1, CONTEXT_LENGTH)
    lines = ({"visual_input": str(clip), "prompt": "a" * length} for length in lengths)
    path.write_text("\n".join(map(json.dumps, lines)))
    words = ("--batch_input_path", path, "--batch_size", 3, "--disable_diffusion_decoder")
    assert ar_video2world(*words).exit_code == 0
    reports = [report_of(tmp_path / "out" / f"{number}.json") for number in range(3)]
    assert [report["clips_at_once"] for report in reports] == [3, 3, 3]
    told = [report["prompt_truncation"] for report in reports]
    assert [cut.get("prompt", {}).get("num_truncated_tokens") for cut in told] == [2, None, 1]


def test_base_with_the_decoder(run: Run, clip: Path, whole_world: Path, tmp_path: Path) -> None:
    fixed = ("--checkpoint_dir", whole_world, "--video_save_folder", tmp_path / "out")
    words = ("autoregressive", "base", *fixed, "--input_image_or_video_path", clip)
    flags = ("--disable_guardrail", "--offload_diffusion_decoder", "--temperature", 0, "--top_p", 1)
    result = run(*words, *flags)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path / "out" / "output.json")
    assert names_of(report["files"]["diffusion_decoder"]) == ["model.pt", "aux_vars.pt"]
    assert report["diffusion_decoder"]["num_steps"] == 15
    assert "--offload_diffusion_decoder has no effect: the model runs on the CPU" in result.stderr
    assert "--top_p has no effect" in result.stderr
    again = run(*words, *flags, "--resume")
    assert "is finished" in again.stderr
    # decoded otherwise, it is another video
    plain = run(*words, *flags, "--resume", "--disable_diffusion_decoder")
    assert "was made in another way" in plain.stderr
    assert "--offload_diffusion_decoder has no effect: no diffusion decoder runs" in plain.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["CLIP"], "no prompt: a Video2World model needs --prompt"),
        (["CLIP", "--prompt", " "], "--prompt is empty"),
        (["CLIP", "--prompt", "x", "--prompt_embeddings", ""], "--prompt_embeddings is empty"),
        (["CLIP", "--prompt_embeddings", "nowhere"], "--prompt_embeddings nowhere: no such file"),
        (["--prompt", "x"], "give --input_image_or_video_path or --batch_input_path"),
        (["--prompt", "x", "--batch_input_path", "b"], "exclude each other: the lines hold"),
        (["--batch_input_path", "BATCH"], 'no "prompt"'),
        (["CLIP", "--prompt", "x", "--ar_model_dir", MODEL], "is a base model"),
        (["CLIP", "--prompt", "x", "--text_encoder_dir", "nowhere"], "--text_encoder_dir"),
        (
            ["CLIP", "--prompt", "x", "--input_type", "text_and_image"],
            "use --input_type text_and_video",
        ),
    ],
)
@pytest.mark.usefixtures("forbid_weights")
def test_wrong_input(
    words: list[Any], message: str, ar_video2world: Make, clip: Path, tmp_path: Path
) -> None:
    batch = tmp_path / "b.jsonl"
    batch.write_text(json.dumps({"visual_input": str(clip)}))
    if words[0] == "CLIP":
        words = ["--input_image_or_video_path", clip, *words[1:]]
    result = ar_video2world(*(batch if word == "BATCH" else word for word in words))
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("forbid_weights")
def test_the_decoder_in_place_of_a_model(ar_video2world: Make, clip: Path) -> None:
    words = ("--input_image_or_video_path", clip, "--prompt", PROMPT, "--ar_model_dir", DECODER)
    result = ar_video2world(*words)
    assert result.exit_code == 2
    assert "is the diffusion decoder of the autoregressive worlds, not a world" in result.stderr


@pytest.mark.usefixtures("forbid_weights")
def test_an_embedding_table_without_the_begin_token(
    ar_video2world: Make, clip: Path, own_whole_world: Path
) -> None:
    path = own_whole_world / VIDEO2WORLD / "model.pt"
    tensors = torch.load(path)
    table = tensors["model.tok_embeddings.weight"]
    rows = len(tensors["model.output.weight"])
    tensors["model.tok_embeddings.weight"] = table[:rows].clone()
    torch.save(tensors, path)
    words = ("--input_image_or_video_path", clip, "--prompt", PROMPT)
    result = ar_video2world(*words, checkpoint_dir=own_whole_world)
    assert result.exit_code == 2
    assert f"{path}: embedding_rows is {rows}; {rows + 1} ids are read" in result.stderr


@pytest.mark.usefixtures("forbid_weights")
def test_video2world_given_to_base(run: Run, clip: Path, whole_world: Path) -> None:
    words = ("--checkpoint_dir", whole_world, "--ar_model_dir", VIDEO2WORLD)
    flags = ("--disable_guardrail", "--input_image_or_video_path", clip)
    result = run("autoregressive", "base", *words, *flags)
    assert result.exit_code == 2
    assert "is a Video2World model" in result.stderr
    assert "worldline autoregressive video2world" in result.stderr


@pytest.mark.parametrize("missing", [DECODER, "Cosmos-Tokenize1-CV8x8x8-720p"])
@pytest.mark.usefixtures("forbid_weights")
def test_a_missing_decoder_names_the_flag(
    missing: str, ar_video2world: Make, clip: Path, own_whole_world: Path
) -> None:
    shutil.rmtree(own_whole_world / missing)
    words = ("--input_image_or_video_path", clip, "--prompt", PROMPT)
    result = ar_video2world(*words, checkpoint_dir=own_whole_world)
    assert result.exit_code == 2
    assert f"neither {missing} nor" in result.stderr
    assert result.stderr.endswith("--disable_diffusion_decoder does without\n")


@pytest.mark.usefixtures("forbid_weights")
def test_a_missing_text_encoder(ar_video2world: Make, clip: Path, own_whole_world: Path) -> None:
    shutil.rmtree(own_whole_world / TEXT_ENCODER)
    words = ("--input_image_or_video_path", clip, "--prompt", PROMPT)
    result = ar_video2world(*words, checkpoint_dir=own_whole_world)
    assert result.exit_code == 2
    assert "there is no text encoder" in result.stderr
    assert "give --prompt_embeddings" in result.stderr


def test_bundled_worlds_use_a_bundled_decoder(
    run: Run, clip: Path, whole_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worldline.locate, "BUNDLED", whole_world)
    words = ("--ar_model_dir", f"tiny-{MODEL}", "--video_save_folder", tmp_path / "out")
    for flags, decodes in (((), True), (("--disable_diffusion_decoder",), False)):
        line = (*words, "--input_image_or_video_path", clip, "--decoder_seam", "corrected")
        result = run("autoregressive", "base", *line, *flags)
        assert result.exit_code == 0, result.stderr
        report = report_of(tmp_path / "out" / "output.json")
        assert (report["diffusion_decoder"] is not None) == decodes
        reason = "one window of the decoder is enough" if decodes else "no diffusion decoder runs"
        assert f"--decoder_seam has no effect: {reason}" in result.stderr
    rows = json.loads(run("models", "--json", "--device", "cpu").stdout)
    [row] = [row for row in rows if row["name"] == f"tiny-{MODEL}"]
    # transformer, discrete tokenizer, decoder, continuous tokenizer
    assert [file["name"] for file in row["files"]].count("model.pt") == 2
    assert f"tiny-{DECODER}" not in {row["name"] for row in rows}


def test_more_than_one_window(run: Run, clip: Path, own_whole_world: Path, tmp_path: Path) -> None:
    """A model of 12 latent frames: the seam makes a difference, and --resume knows it."""
    path = own_whole_world / MODEL / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "video_latent_shape": [12, 2, 3]}))
    fixed = ("--checkpoint_dir", own_whole_world, "--video_save_folder", tmp_path / "out")
    words = ("autoregressive", "base", *fixed, "--input_image_or_video_path", clip)
    found = {}
    for seam in ("corrected", "as_released"):
        result = run(*words, "--disable_guardrail", "--decoder_seam", seam, "--resume")
        assert result.exit_code == 0, result.stderr
        assert "denoising in 30 steps" in result.stderr
        found[seam] = read_video(tmp_path / "out" / "output.mp4").frames
        assert found[seam].shape == (89, 32, 48, 3)
        assert report_of(tmp_path / "out" / "output.json")["diffusion_decoder"]["seam"] == seam
    difference = np.abs(found["corrected"].astype(int) - found["as_released"].astype(int))
    assert difference[:50].max() <= 40  # coded as videos, they differ a little before the seam
    assert difference[58:].mean() > 4 * difference[:50].mean()


def test_cosmos_1(run: Run, clip: Path, own_whole_world: Path, tmp_path: Path) -> None:
    root, old = own_whole_world, "Cosmos-1.0-Autoregressive-4B"
    (root / MODEL).rename(root / old)
    (root / DECODER).rename(root / OLD_DECODER)
    fixed = ("--checkpoint_dir", root, "--ar_model_dir", old)
    words = ("--video_save_folder", tmp_path / "out", "--input_image_or_video_path", clip)
    result = run("autoregressive", "base", *fixed, *words, "--disable_guardrail")
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path / "out" / "output.json")
    assert report["diffusion_decoder"]["sampler"] == "res_2ab"


@pytest.fixture
def prompts(clip: Path, tmp_path: Path) -> Path:
    """A batch of three lines."""
    path = tmp_path / "three.jsonl"
    words = (PROMPT, "Snow falls.", "Rain.")
    path.write_text("\n".join(json.dumps({"visual_input": str(clip), "prompt": w}) for w in words))
    return path


def test_in_step(ar_video2world: Make, prompts: Path, clip: Path, tmp_path: Path) -> None:
    """Two in step, then one alone; each is what it is alone."""
    out = tmp_path / "out"
    result = ar_video2world("--batch_input_path", prompts, "--batch_size", 2)
    assert result.exit_code == 0, result.stderr
    assert "1-2/3 in step: drawing 18 tokens" in result.stderr
    assert f"3/3 {clip}: drawing 18 tokens" in result.stderr
    assert result.stdout.count("2 in step, ") == 2
    assert [report_of(out / f"{n}.json")["clips_at_once"] for n in range(3)] == [2, 2, 1]
    alone = ("--input_image_or_video_path", clip, "--prompt", "Snow falls.")
    assert ar_video2world(*alone).exit_code == 0
    assert frames_of(out / "1.mp4") == frames_of(out / "output.mp4")
    again = ar_video2world("--batch_input_path", prompts, "--resume")
    assert "nothing left to do" in again.stdout


def test_a_group_that_fails_is_made_one_by_one(
    ar_video2world: Make, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = AutoregressiveWorld.stream_batch

    def stream_batch(self: AutoregressiveWorld, *args: Any, **options: Any) -> Any:
        for number, step in real(self, *args, **options):
            yield number, step
            if step.video is not None:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(AutoregressiveWorld, "stream_batch", stream_batch)
    result = ar_video2world("--batch_input_path", prompts, "--batch_size", 3)
    assert result.exit_code == 0, result.stderr
    assert "1-3/3 in step: OutOfMemoryError: CUDA out of memory.; made one by one" in result.stderr
    out = tmp_path / "out"
    assert [report_of(out / f"{n}.json")["clips_at_once"] for n in range(3)] == [3, 1, 1]
    assert "3 of 3 videos" in result.stdout


def test_more_in_step_than_the_kernels_take(
    ar_video2world: Make, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worldline.loading, "kernels_fit", lambda *_: True)
    monkeypatch.setattr(worldline.loading, "MAX_BATCH_SIZE", 2)
    words = ("--batch_size", 3, "--disable_diffusion_decoder")
    result = ar_video2world("--batch_input_path", prompts, *words)
    assert result.exit_code == 0, result.stderr
    assert "--batch_size 3: 2 are drawn in step, the most for the kernels" in result.stderr
    out = tmp_path / "out"
    assert [report_of(out / f"{n}.json")["clips_at_once"] for n in range(3)] == [2, 2, 1]


@pytest.mark.parametrize("given", ["0", "-1", "x", "1.5"])
def test_wrong_batch_size(given: str, ar_video2world: Make, prompts: Path) -> None:
    result = ar_video2world("--batch_input_path", prompts, "--batch_size", given)
    assert result.exit_code == 2
    assert "is neither auto nor a number of 1 or more" in result.stderr


def test_longer_than_the_window(ar_video2world: Make, clip: Path, tmp_path: Path) -> None:
    words = ("--input_image_or_video_path", clip, "--prompt", PROMPT)
    for way in ("tokens", "pixels"):
        result = ar_video2world(*words, "--num_video_frames", 49, "--rollout", way)
        assert result.exit_code == 0, result.stderr
        assert probe(tmp_path / "out" / "output.mp4", kind="video").frames == 49
        report = report_of(tmp_path / "out" / "output.json")
        assert report["request"]["rollout"] == way
        assert report["tokens"] == 6 * 5
    usual = ("--rollout", "pixels", "--batch_size", 4, "--disable_diffusion_decoder")
    result = ar_video2world(*words, *usual)
    assert "--rollout has no effect: the video is as long as the model's own" in result.stderr
    assert "--batch_size has no effect: there is one input" in result.stderr
    result = ar_video2world(*words, "--num_video_frames", 33, "--rollout", "pixels")
    assert "--rollout has no effect: the video is as long as the model's own" in result.stderr
    wrong = ar_video2world(*words, "--num_video_frames", 48)
    assert wrong.exit_code == 2
    assert "the nearest is 49" in wrong.stderr
