"""From files of samples to videos through the command line, and what may go wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import Result

import worldline.loading.parts
import worldline.world
from worldline import machine
from worldline.catalog import FLOW_MODELS
from worldline.cli import main
from worldline.cli.predict2_5 import predict2_5
from worldline.cli.samples import Sample
from worldline.errors import Error
from worldline.machine import Memory
from worldline.text.reason1 import RELEASED
from worldline.video.read import probe, read_image, read_video
from worldline.video.write import write_video
from worldline.weights.write import save

from ..conftest import frames_of
from ..tiny_predict2_5 import CONFIG, POST, PRE, write_transformer
from .conftest import run_words
from .parity import variants

Flow = Callable[..., Result]

ASSETS = Path(__file__).parents[3] / "shared" / "assets" / "predict2_5"
SMALL = ("--resolution", "32,48", "--num_output_frames", 9, "--num_steps", 2)
PROMPT = "a red ball rolls to the right"
TEXT = {"inference_type": "text2world", "prompt": PROMPT}


@pytest.fixture
def flow(tiny_predict2_5: Path, tmp_path: Path) -> Flow:
    """Run `worldline predict2.5` on the small world; outputs go to tmp_path / "out"."""

    def call(*words: object, checkpoint_dir: Path = tiny_predict2_5, small: bool = True) -> Result:
        fixed = ("--checkpoint_dir", checkpoint_dir, "-o", tmp_path / "out")
        size = SMALL if small else ()
        return run_words(("predict2.5", *fixed, "--disable_guardrails", *size, *words))

    return call


def write(path: Path, *samples: dict[str, Any]) -> Path:
    """Write one sample as JSON, several as its lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, samples)))
    return path


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def report_of(path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(path.read_text())
    return report


# --- what works


def test_every_kind_of_sample(flow: Flow, clip: Path, image: Path, tmp_path: Path) -> None:
    files = [
        write(tmp_path / "in" / "t.json", {**TEXT, "name": "t"}),
        write(
            tmp_path / "in" / "v.json",
            {"name": "v", "inference_type": "video2world", "prompt": "x", "input_path": str(clip)},
        ),
        write(
            tmp_path / "in" / "i.json",
            {"name": "i", "inference_type": "image2world", "prompt": "x", "input_path": str(image)},
        ),
    ]
    result = flow("-i", *files)
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    assert files_in(out) == {f"{n}.{end}" for n in "tvi" for end in ("mp4", "json", "txt")}
    assert f"3 of 3 videos are in {out}" in result.stdout
    for name, given in (("t", 0), ("i", 1), ("v", 5)):
        report = report_of(out / f"{name}.json")
        assert report["model"] == POST.name
        assert report["request"]["num_input_frames"] == given
        assert report["sample"]["name"] == name
        assert (report["schedule"], report["known_timestep"]) == ("karras", 0.1)
        assert (report["evaluations"], len(report["seconds_of_steps"])) == (3, 3)
        info = probe(out / f"{name}.mp4", kind="video")
        assert (info.frames, info.height, info.width, info.fps) == (9, 32, 48, 16)
    assert (out / "t.txt").read_text() == PROMPT
    again = flow("-i", out / "*.json", "-o", tmp_path / "again")
    refused(again, "t.json: this is the report of a video that worldline made", tmp_path / "again")
    assert again.stderr.count("\n") == 3  # a line each


@pytest.mark.skipif(not ASSETS.is_dir(), reason="the released samples are not here")
def test_the_released_files(flow: Flow, tiny_predict2_5: Path, tmp_path: Path) -> None:
    result = flow("-i", ASSETS / "single" / "*.json")
    assert result.exit_code == 0, result.stderr
    names = {path.stem for path in (ASSETS / "single").iterdir()}
    assert {path.stem for path in (tmp_path / "out").glob("*.mp4")} == names
    for path in sorted((ASSETS / "old").iterdir()):
        words = (path, tmp_path / path.stem, "--checkpoint_dir", tiny_predict2_5, *SMALL)
        result = run_words(("predict2.5", *words, "--disable-guardrails"))
        assert result.exit_code == 0, result.stderr
        stated = json.loads(path.read_text())["samples"]
        assert {made.stem for made in (tmp_path / path.stem).glob("*.mp4")} == set(stated)


def test_several_files_patterns_and_plain_arguments(
    flow: Flow, tiny_predict2_5: Path, tmp_path: Path
) -> None:
    for name in "abc":
        write(tmp_path / "in" / f"{name}.json", {**TEXT, "name": name})
    first, second = (tmp_path / "in" / f"{name}.json" for name in "ab")
    for number, words in enumerate(
        (
            ("-i", first, second),
            ("--input-files", first, "-i", second),
            (f"--input_files={first}", second, "--seed", 1),
            ("-i", tmp_path / "in" / "[ab].json"),
            ("-i", first, "--resume", "--input_files", second),
        )
    ):
        out = tmp_path / f"out{number}"
        result = flow("-o", out, *words, "--num_output_frames", 1)
        assert result.exit_code == 0, result.stderr
        assert {path.stem for path in out.glob("*.jpg")} == {"a", "b"}
    words = (first, tmp_path / "plain", "--checkpoint_dir", tiny_predict2_5, *SMALL)
    result = run_words(("predict2.5", *words, "--disable-guardrails"))
    assert result.exit_code == 0, result.stderr
    assert files_in(tmp_path / "plain") == {"a.mp4", "a.json", "a.txt"}


def test_one_frame_is_a_picture(flow: Flow, tmp_path: Path) -> None:
    result = flow("-i", write(tmp_path / "a.json", {**TEXT, "name": "a"}), "--num_output_frames", 1)
    assert result.exit_code == 0, result.stderr
    assert files_in(tmp_path / "out") == {"a.jpg", "a.json", "a.txt"}
    assert read_image(tmp_path / "out" / "a.jpg").frames.shape == (1, 32, 48, 3)


def test_what_is_given_for_all_wins(flow: Flow, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *({**TEXT, "name": n, "seed": 3} for n in "ab"))
    result = flow("-i", file, "--seed", 9, "--guidance", 2, "--negative_prompt", "fog")
    assert result.exit_code == 0, result.stderr
    for name in "ab":
        asked = report_of(tmp_path / "out" / f"{name}.json")["request"]
        assert (asked["seed"], asked["guidance"]) == (9, 2)
        assert asked["negative_prompt"] == "fog"
    assert frames_of(tmp_path / "out" / "a.mp4") == frames_of(tmp_path / "out" / "b.mp4")


def test_models(flow: Flow, own_predict2_5: Path, tmp_path: Path) -> None:
    """Which file runs, and by which schedule."""
    mine = own_predict2_5 / "mine" / "model.pt"
    write_transformer(mine, seed=2)
    file = write(tmp_path / "a.json", {**TEXT, "name": "a"})
    post, pre = "karras", "shifted"
    other = f"{POST.experiment}-mine"
    for words, model, schedule in (
        (("--model", PRE.name), PRE.name, pre),
        (("--model", POST.name, "--schedule", pre), POST.name, pre),
        (("--checkpoint_path", mine), "mine", pre),
        (("--checkpoint_path", "mine", "--model", POST.name), "mine", post),
        (("--checkpoint_path", "mine", "--experiment", POST.experiment), "mine", post),
        (("--checkpoint_path", "mine", "--experiment", other), "mine", pre),
        (("--model", "mine"), "mine", pre),
    ):
        result = flow("-i", file, *words, checkpoint_dir=own_predict2_5)
        assert result.exit_code == 0, result.stderr
        report = report_of(tmp_path / "out" / "a.json")
        assert (report["model"], report["schedule"]) == (model, schedule), words


def test_a_world_of_its_own_defaults(flow: Flow, own_predict2_5: Path, tmp_path: Path) -> None:
    write_transformer(own_predict2_5 / "mine" / "model.pt")
    own = {"num_video_frames": 13, "height": 32, "width": 32, "num_steps": 1, "guidance": 0}
    (own_predict2_5 / "mine" / "config.json").write_text(json.dumps(own))
    file = write(tmp_path / "a.json", {**TEXT, "name": "a"})
    words = ("-i", file, "--model", "mine")
    assert flow(*words, checkpoint_dir=own_predict2_5, small=False).exit_code == 0
    report = report_of(tmp_path / "out" / "a.json")
    assert {name: report["request"][name] for name in own} == own
    assert report["sample"] == {**TEXT, "name": "a"}  # and not what other worlds have by default
    result = flow(*words, "--guidance", 7, checkpoint_dir=own_predict2_5, small=False)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path / "out" / "a.json")
    assert report["request"]["guidance"] == report["sample"]["guidance"] == 7
    # a chunk is no longer than what the world makes
    long = ("--enable_autoregressive", "--num_output_frames", 20)
    result = flow(*words, *long, checkpoint_dir=own_predict2_5, small=False)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path / "out" / "a.json")
    assert (report["request"]["chunk_size"], report["chunks"]) == (13, 2)
    stated = {"enable_autoregressive": True, "num_output_frames": 20}
    assert report["sample"] == {**TEXT, "name": "a", **stated}


def test_long_videos(flow: Flow, clip: Path, tmp_path: Path) -> None:
    """By the released file, and by flags; the first chunk is the video that is made alone."""
    sample = {
        "name": "a",
        "inference_type": "video2world",
        "prompt": "x",
        "input_path": str(clip),
        "enable_autoregressive": True,
        "num_output_frames": 14,
        "chunk_size": 9,
        "chunk_overlap": 5,
    }
    words = ("-i", write(tmp_path / "a.json", sample), *SMALL[:2], *SMALL[4:])
    assert flow(*words, small=False).exit_code == 0
    report = report_of(tmp_path / "out" / "a.json")
    assert report["chunks"] == 3
    assert probe(tmp_path / "out" / "a.mp4", kind="video").frames == 14
    alone = {name: value for name, value in sample.items() if not name.startswith("chunk")}
    del alone["enable_autoregressive"], alone["num_output_frames"]
    write(tmp_path / "b.json", {**alone, "name": "b"})
    flags = ("--enable-autoregressive", "True", "--num-output-frames", 14, "--chunk-size", 9)
    again = ("-i", tmp_path / "b.json", *words[2:], *flags, "--chunk-overlap", 5)
    assert flow(*again, small=False).exit_code == 0
    assert frames_of(tmp_path / "out" / "a.mp4") == frames_of(tmp_path / "out" / "b.mp4")


def test_embeddings_in_place_of_the_text_encoder(
    flow: Flow, own_predict2_5: Path, tmp_path: Path
) -> None:
    shutil.rmtree(own_predict2_5 / "nvidia")
    path = tmp_path / "words.safetensors"
    save({n: torch.randn(7, CONFIG.feature_width) for n in ("prompt", "negative_prompt")}, path)
    file = write(tmp_path / "a.json", {**TEXT, "name": "a"})
    result = flow("-i", file, "--prompt_embeddings", path, checkpoint_dir=own_predict2_5)
    assert result.exit_code == 0, result.stderr
    assert "the embeddings decide" in result.stderr
    stamp = report_of(tmp_path / "out" / "a.json")["files"]["prompt_embeddings"]
    assert stamp["path"] == str(path)
    result = flow("-i", file, checkpoint_dir=own_predict2_5)
    refused(result, "there is no text encoder", tmp_path / "nowhere")
    assert "--prompt_embeddings" in result.stderr


def test_notes_of_what_has_no_effect(flow: Flow, tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {**TEXT, "name": "a"})
    config = "cosmos_predict2/_src/predict2/configs/video2world/config.py"
    words = ("--config_file", config, "--offload_guardrail_models", "--offload-tokenizer")
    result = flow("-i", file, *words)
    assert result.exit_code == 0, result.stderr
    for flag in ("config_file", "offload_guardrail_models", "offload_tokenizer"):
        assert result.stderr.count(f"--{flag} has no effect") == 1
    result = flow("-i", file, "--chunk_size", 9, "--experiment", "mine")
    assert f"{file}, sample 'a': chunk_size has no effect: " in result.stderr
    assert "--experiment mine is no released run" in result.stderr
    quiet = ("--no-offload-tokenizer", "--no-keep-going", "--no-profile")
    result = flow("-i", file, *quiet)
    assert result.exit_code == 0, result.stderr
    assert "has no effect" not in result.stderr


def test_previews_come_and_go(flow: Flow, tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {**TEXT, "name": "a"})
    result = flow("-i", file, "--preview_every", 1)
    assert result.exit_code == 0, result.stderr
    assert "a.preview.mp4" in result.stderr
    assert files_in(tmp_path / "out") == {"a.mp4", "a.json", "a.txt"}


# --- parity


@pytest.mark.parametrize("variant", variants("examples/inference.py"))
def test_every_flag(variant: dict[str, Any]) -> None:
    options = {name: option for option in predict2_5.params for name in option.opts}
    against = {name for option in predict2_5.params for name in option.secondary_opts}
    defaults = predict2_5.make_context("predict2.5", [], resilient_parsing=True).params
    fields = {name: field.default for name, field in Sample.model_fields.items()}
    first_release = any("2025-10" in release for release in variant["releases"])
    changed = ("keep_going", "offload_guardrail_models")  # from release to release
    for flag in variant["args"]:
        name = flag["dest"]
        if flag["group"] == "file-only":
            assert name in {*fields, "samples"}  # of the first release: samples by name
            continue
        if flag["positional"]:
            assert options["earlier"].nargs == -1
            continue
        option = options[flag["name"].replace("-", "_").replace("__", "--")]
        assert isinstance(option, click.Option)
        assert option.name == name
        for alias in flag["aliases"]:
            spelling = alias if len(alias) == 2 else alias.replace("-", "_").replace("__", "--")
            assert spelling in {*option.opts, *against}
        if name == "model":
            known = {model.name for model in FLOW_MODELS}
            assert set(flag["choices"]) <= {*known, "2B/distilled"}
        elif flag["choices"]:
            assert isinstance(option.type, click.Choice)
            assert [*option.type.choices] == flag["choices"]
        if flag["group"] == "override":
            assert defaults[name] is None
            given = fields[name]
            if flag["file_default"] is not None and name == "negative_prompt":
                assert given.startswith("The video captures a series of frames showing ugly")
            elif flag["file_default"] is not None and name != "num_output_frames":
                assert given == flag["file_default"] or (name == "seed" and not first_release)
        elif name == "model" or (flag["type"] == "bool" and name not in changed):
            assert defaults[name] == flag["default"]


def test_the_help_says_what_the_files_default_to() -> None:
    told = " ".join(run_words(("predict2.5", "--help")).stdout.split())
    for words in ("1 where a file says nothing", "7 where a file", "35 where a file", "77 of a"):
        assert words in told


# --- wrong words and inputs


def refused(result: Result, message: str, out: Path) -> None:
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "2B/distilled"], "released names are 2B/post-trained"),
        (["--model", "2B/posttrained"], "did you mean 2B/post-trained?"),
        (["--model", "14B/pre-trained"], "`worldline checkpoints download 14B/pre-trained`"),
        (["--model", "tiny-nothing"], "no bundled model tiny-nothing"),
        (["--model", ""], "--model is empty"),
        (["--checkpoint_path", "nowhere.pt"], "/nowhere.pt; "),
        (["--checkpoint_path", "nvidia/Cosmos-Reason1-7B"], "not a Cosmos diffusion transformer"),
        (["--checkpoint_dir", "nowhere"], "there is no checkpoint folder nowhere"),
        (["--tokenizer_dir", "nowhere"], "no folder nowhere (--tokenizer_dir)"),
        (["--text_encoder_dir", "nowhere"], "no folder nowhere (--text_encoder_dir)"),
        (["--prompt_embeddings", "nowhere"], "--prompt_embeddings nowhere: no such file"),
        (["--guardrail_dir", ""], "--guardrail_dir is empty"),
        (["--context-parallel-size", 8], "--context_parallel_size is 8; this version runs on 1"),
        (["--profile"], "this version does not profile"),
        (["--config-file", "mine.py"], "worldline runs no configuration in Python"),
        (["--schedule", "linear"], "'karras', 'shifted'"),
        (["--device", "abacus"], "no device abacus here"),
        (["-o", "x" * 300], "cannot be written: a name in it has 300 bytes"),
        (["--seed", -1], "--seed: -1: "),
        (["--guidance", "nan"], "--guidance: nan: input should be a finite number"),
        (["--input_path", ""], "--input_path: it is empty"),
        (["--num_steps", 0], "--num_steps: 0: "),
        (["--resolution", "32"], "--resolution: '32' is neither"),
        (["--num_output_frames", 10], "--num_output_frames is 10; it must be 1 + 4k"),
        (["--num_output_frames", 10**13], "num_output_frames is 10000000000000; it must be 1 to"),
        (["--inference_type", "video2world"], "sample 'a': input_path: video2world needs one"),
        (["--inference_type", "world"], "'text2world', 'image2world', 'video2world'"),
        (["--prompt_path", "nowhere.txt"], "--prompt_path: there is no file"),
        (["--enable_autoregressive", "--chunk_overlap", 3], "it counts frames and must be 1 + 4k"),
        (["--enable_autoregressive", "--chunk_size", 101], "chunk_size is 101; it must be at most"),
        (["--enable_autoregressive", "maybe"], "'maybe' is not a valid boolean"),
        (["--prompt", "x", "--prompt_path", "x"], "--prompt and --prompt_path exclude each other"),
        (["--name", "b"], "No such option"),
        (["b.json"], "b.json stands alone: files of samples follow -i"),
    ],
)
@pytest.mark.usefixtures("forbid_weights")
def test_wrong_words(words: list[Any], message: str, flow: Flow, tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {**TEXT, "name": "a"})
    refused(flow("-i", file, "--seed", 1, *words), message, tmp_path / "out")


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_damaged_checkpoint_is_told_alone(
    share: float, pickled: bool, flow: Flow, own_predict2_5: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.json", {**TEXT, "name": "a"})
    checkpoint = own_predict2_5 / Path(POST.repository).name / POST.file
    whole = pickle.dumps({"step": 1}) if pickled else checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(share * len(whole))])
    result = flow("-i", file, "--checkpoint_path", checkpoint)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"worldline: {checkpoint}")
    assert "diffusion" not in result.stderr
    assert "autoregressive" not in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no samples: give -i FILE"),
        (["-i"], "-i needs a file of samples"),
        (["-i", "-o", "x"], "-i needs a file of samples"),
        (["-i", "a.json"], "no output folder: give -o DIR"),
        (["-o", "x"], "no samples"),
        (["a.json"], "1 plain argument; give PARAMS_FILE and OUTPUT_DIR"),
        (["-i", "", "-o", "x"], "-i is empty"),
        (["", "x"], "PARAMS_FILE is empty"),
        (["a.json", "b", "c"], "3 plain arguments"),
        (["a.json", "x", "-o", "x"], "a.json stands alone"),
        (["-i", "*.json", "-o", "x"], "-i *.json: no file has such a name"),
        (["-i", ".", "-o", "x"], ". is a folder; name its files"),
    ],
)
@pytest.mark.usefixtures("forbid_weights")
def test_wrong_usage(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(run_words(("predict2.5", *words)), message, tmp_path / "x")


@pytest.mark.usefixtures("forbid_weights")
def test_everything_that_is_wrong_is_told_at_once(
    flow: Flow, short_clip: Path, image: Path, tmp_path: Path
) -> None:
    """By file, sample and field; of inputs when all else is right."""
    noise = tmp_path / "noise.mp4"
    noise.write_text("hello")
    one = tmp_path / "one.mp4"
    shutil.copy(short_clip, one)
    video = {"inference_type": "video2world", "prompt": "x"}
    lines = write(
        tmp_path / "a.jsonl",
        {**TEXT, "name": "good"},
        {**video, "name": "still", "input_path": str(image)},
        {**video, "name": "gone", "input_path": "gone.mp4"},
        {**TEXT, "name": "good"},
        {"name": "empty"},
    )
    broken = write(tmp_path / "b.json")
    result = flow("-i", lines, broken, tmp_path / "c.txt")
    refused(result, f"{lines}, line 2, sample 'still': input_path: ", tmp_path / "out")
    for part in (
        "line 3, sample 'gone': input_path: there is no file",
        "line 4, sample 'good': name: ",
        "line 5, sample 'empty': inference_type: it is missing",
        f"{broken} is no valid JSON",
        "c.txt: .txt is none of",
    ):
        assert part in result.stderr
    media = write(
        tmp_path / "e.jsonl",
        {**video, "name": "one", "input_path": "one.mp4"},
        *({**video, "name": name, "input_path": "noise.mp4"} for name in ("noise", "again")),
    )
    result = flow("-i", media)
    refused(result, f"{media}, line 2, sample 'noise': input_path: ", tmp_path / "out")
    assert f"{media}, line 3, sample 'again': input_path: " in result.stderr
    sizes = write(
        tmp_path / "d.jsonl",
        *({**TEXT, "name": f"s{frames}", "num_output_frames": frames} for frames in (9, 10, 11)),
    )
    result = flow("-i", sizes, "--resolution", "32,48", small=False)
    assert result.exit_code == 2
    assert result.stderr.count("num_output_frames is ") == 2


@pytest.mark.usefixtures("forbid_weights")
def test_clips_that_are_too_short(flow: Flow, tmp_path: Path) -> None:
    from worldline.video.write import write_video

    write_video(np.zeros((4, 16, 16, 3), np.uint8), tmp_path / "in.mp4", 25)
    sample = {"name": "a", "inference_type": "video2world", "prompt": "x", "input_path": "in.mp4"}
    file = write(tmp_path / "a.json", sample)
    refused(flow("-i", file), "in.mp4 has 4 frames, but video2world continues", tmp_path / "out")


@pytest.mark.usefixtures("forbid_weights")
def test_clips_that_leave_nothing_to_make(flow: Flow, tmp_path: Path) -> None:
    """In the words of a sample; a video whose last frame alone is continued is told."""
    from worldline.video.write import write_video

    write_video(np.zeros((5, 32, 48, 3), np.uint8), tmp_path / "in.mp4", 25)
    sample = {**TEXT, "name": "a", "input_path": "in.mp4"}
    file = write(tmp_path / "a.json", sample)
    words = ("-i", file, "--resolution", "32,48", "--num_output_frames")
    result = flow(*words, 5, "--inference_type", "video2world", small=False)
    message = "num_output_frames is 5, but video2world is given 5 of them: nothing is left to make"
    refused(result, message, tmp_path / "out")
    assert "the last frame" not in result.stderr
    result = flow(*words, 1, "--inference_type", "image2world", small=False)
    refused(result, "is 1, but image2world is given 1 of them", tmp_path / "out")
    assert f"{file}, sample 'a': of the video, image2world continues the last" in result.stderr


def test_a_bundled_model_that_does_not_exist(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {**TEXT, "name": "a"})
    result = run_words(("predict2.5", "-i", file, "-o", tmp_path / "out", "--model", "tiny-x"))
    refused(result, "there is no bundled model tiny-x", tmp_path / "out")
    assert "coloured fog" not in result.stderr


@pytest.mark.usefixtures("forbid_weights")
def test_an_output_never_replaces_an_input(flow: Flow, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = write(out / "a.json", {**TEXT, "name": "a"})
    result = flow("-i", file)
    assert result.exit_code == 2
    assert f"{file} is an input; choose another --output_dir" in result.stderr
    words = out / "b.txt"
    words.write_text("snow")
    sample = {"name": "b", "inference_type": "text2world", "prompt_path": str(words)}
    result = flow("-i", write(tmp_path / "b.json", sample))
    assert result.exit_code == 2
    assert f"{words} is an input" in result.stderr


@pytest.mark.parametrize("ending", ["mp4", "json", "txt"])
@pytest.mark.usefixtures("forbid_weights")
def test_a_folder_in_the_way_is_told_first(ending: str, flow: Flow, tmp_path: Path) -> None:
    folder = tmp_path / "out" / f"b.{ending}"
    folder.mkdir(parents=True)
    samples = [{**TEXT, "name": name} for name in "ab"]
    result = flow("-i", write(tmp_path / "a.jsonl", *samples))
    assert result.exit_code == 2
    assert f"{folder} is a folder" in result.stderr
    assert files_in(tmp_path / "out") == {folder.name}


# --- interrupted, resumed


def failing_stream(monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int) -> None:
    """Make the run of number `at` raise after its first step of denoising."""
    from worldline.world import FlowWorld

    real = FlowWorld.stream
    runs = iter(range(100))

    def stream(self: FlowWorld, *args: Any, **options: Any) -> Iterator[Any]:
        number = next(runs)
        for step in real(self, *args, **options):
            yield step
            if number == at and step.kind == "denoise" and step.done:
                raise error

    monkeypatch.setattr(FlowWorld, "stream", stream)


def test_a_batch_goes_on_after_a_bad_sample(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_stream(monkeypatch, Error("this one failed"), at=0)
    file = write(tmp_path / "a.jsonl", *({**TEXT, "name": name} for name in "ab"))
    result = flow("-i", file)
    assert result.exit_code == 1
    assert "error: 1/2 a: this one failed" in result.stderr
    assert files_in(tmp_path / "out") == {"b.mp4", "b.txt", "b.json"}
    failing_stream(monkeypatch, Error("this one failed"), at=0)
    result = flow("-i", file, "-o", tmp_path / "other", "--no-keep-going")
    assert result.exit_code == 1
    assert not (tmp_path / "other").exists()


def test_ctrl_c_leaves_no_partial_video(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_stream(monkeypatch, KeyboardInterrupt(), at=1)
    file = write(tmp_path / "a.jsonl", *({**TEXT, "name": name} for name in "ab"))
    result = flow("-i", file)
    assert result.exit_code == 130
    assert files_in(tmp_path / "out") == {"a.mp4", "a.txt", "a.json"}


def test_out_of_memory_names_the_flags(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_stream(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried."), at=0)
    file = write(tmp_path / "a.json", {**TEXT, "name": "a"})
    result = flow("-i", file, "--offload_tokenizer", "--offload_text_encoder")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith("--offload_diffusion_model lowers the need")


def test_memory_is_planned_for_what_needs_most(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of fewer pixels than a clip, which is coded in pieces, may need more."""
    planned: list[tuple[int, int, int]] = []

    def load(*_: Any, video: tuple[int, int, int], **__: Any) -> None:
        planned.append(video)
        raise Error("enough")

    monkeypatch.setattr(worldline.world, "load_files", load)
    samples = (
        {**TEXT, "name": "clip", "num_output_frames": 93, "resolution": "192,208"},
        {**TEXT, "name": "picture", "num_output_frames": 1, "resolution": "1920,1920"},
    )
    assert 93 * 192 * 208 > 1920 * 1920
    assert flow("-i", write(tmp_path / "a.jsonl", *samples), small=False).exit_code == 1
    assert planned == [(1, 1920, 1920)]


@pytest.mark.usefixtures("forbid_weights")
def test_the_sample_that_needs_most_is_named(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "host_memory", lambda: Memory(10**8, 24 * 10**9))
    small = {**TEXT, "name": "small", "resolution": "32,48", "num_output_frames": 9}
    clip = {**small, "name": "clip", "resolution": "640,480", "num_output_frames": 93}
    picture = {**small, "name": "picture", "resolution": "1920,1904", "num_output_frames": 1}
    long = {**clip, "name": "long", "enable_autoregressive": True, "num_output_frames": 78}
    needs = rf"{re.escape(POST.name)} needs about \S+ GB of host memory, 0\.1 of 24\.0 GB are free"
    for samples, told in (
        ([small, clip], "resolution (640,480) or num_output_frames (93)"),
        ([small, picture], "resolution (1920,1904)"),
        ([small, long], "resolution (640,480)"),
        ([clip], "resolution (640,480) or num_output_frames (93)"),
    ):
        file = write(tmp_path / "a.jsonl", *samples)
        result = flow("-i", file, small=False)
        refused(result, "", tmp_path / "out")
        most = " needs most" if len(samples) > 1 else ""
        place = f"{file}, line {len(samples)}, sample '{samples[-1]['name']}'{most}"
        line = result.stderr.splitlines()[-1]
        assert re.search(
            rf"{re.escape(place)}: {needs}; a lower {re.escape(told)} needs less$", line
        ), line


@pytest.mark.usefixtures("forbid_weights")
def test_frames_that_find_no_room(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long video is made piece by piece, but held as a whole."""
    monkeypatch.setattr(machine, "host_memory", lambda: Memory(20 * 10**9, 24 * 10**9))
    long = {**TEXT, "enable_autoregressive": True, "resolution": "704,1280", "chunk_size": 9}
    file = write(
        tmp_path / "a.jsonl",
        {**TEXT, "name": "short", "resolution": "32,48"},
        {**long, "name": "long", "num_output_frames": 1_000_001},
        {**long, "name": "longer", "num_output_frames": 1_000_002, "resolution": "32,48"},
        {**long, "name": "longest", "num_output_frames": 1_048_576},
    )
    result = flow("-i", file, small=False)
    refused(result, "", tmp_path / "out")
    told = [line for line in result.stderr.splitlines() if "sample" in line]
    assert len(told) == 2
    assert (
        f"{file}, line 2, sample 'long': num_output_frames is 1000001: all frames of 704 x 1280 "
        "pixels take 2703.4 GB of host memory, 20.0 of 24.0 GB are free"
    ) in told[0]
    assert "sample 'longest': num_output_frames is 1048576" in told[1]


def test_resume(flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [{**TEXT, "name": name} for name in "abc"]
    words = ("-i", write(tmp_path / "a.jsonl", *samples), "--resume")
    out = tmp_path / "out"
    assert flow(*words, "--preview_every", 1).exit_code == 0
    times = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "b.json").unlink()  # as if killed between the video and its report
    write(tmp_path / "a.jsonl", *samples[:2], {**samples[2], "prompt": "another"})
    result = flow(*words)
    assert result.exit_code == 0
    assert f"{out / 'a.mp4'} is finished" in result.stderr
    assert result.stdout.endswith(f"\n3 of 3 videos are in {out}: 2 made now, 1 there before\n")
    (out / "b.mp4").unlink()
    result = flow(*words, "--no_keep_going")
    assert result.stdout.endswith(f"\n3 of 3 videos are in {out}: 1 made now, 2 there before\n")
    changed = {p.name for p in out.iterdir() if p.stat().st_mtime_ns != times[p.name]}
    assert {Path(name).stem for name in changed} == {"b", "c"}
    # nothing is left: no weights are read
    monkeypatch.setattr(worldline.loading.parts, "load_into", None)
    result = flow(*words)
    assert result.exit_code == 0
    assert result.stdout == f"nothing left to do in {out}: 3 of 3 videos were there before\n"


@pytest.mark.parametrize(
    ("words", "finished"),
    [
        (("--schedule", "karras"), True),
        (("--schedule", "shifted"), False),
        (("--model", PRE.name), False),
        (("--seed", 2), False),
        (("--offload_tokenizer",), True),
    ],
)
def test_resume_knows_other_ways(
    words: tuple[object, ...], finished: bool, flow: Flow, tmp_path: Path
) -> None:
    file = write(tmp_path / "a.json", {**TEXT, "name": "a"})
    assert flow("-i", file, "--device", "cpu").exit_code == 0
    result = flow("-i", file, "--device", "cpu", "--resume", *words)
    assert result.exit_code == 0, result.stderr
    assert ("is finished" if finished else "was made in another way") in result.stderr


def test_resume_makes_damaged_videos_again(flow: Flow, tmp_path: Path) -> None:
    names = ("empty", "half", "shorter", "whole", "long")
    samples = [{**TEXT, "name": name, "num_output_frames": 9} for name in names]
    samples[-1] |= {"enable_autoregressive": True, "chunk_size": 5, "num_output_frames": 12}
    words = ("-i", write(tmp_path / "a.jsonl", *samples), "--resume")
    out = tmp_path / "out"
    size = ("--resolution", "32,48", "--num_steps", 1)
    assert flow(*words, *size, small=False).exit_code == 0
    made = {name: (out / f"{name}.mp4").read_bytes() for name in names}
    (out / "empty.mp4").write_bytes(b"")
    (out / "half.mp4").write_bytes(made["half"][: len(made["half"]) // 2])
    clip = read_video(out / "shorter.mp4")
    write_video(clip.frames[:8], out / "shorter.mp4", clip.fps)
    result = flow(*words, *size, small=False)
    assert result.exit_code == 0, result.stderr
    assert f"{out / 'empty.mp4'} is empty (0 bytes): made again" in result.stderr
    assert f"{out / 'half.mp4'} is truncated: made again" in result.stderr
    assert f"{out / 'shorter.mp4'} has 8 of 9 frames: made again" in result.stderr
    assert result.stdout.endswith(f"5 videos are in {out}: 3 made now, 2 there before\n")
    assert {name: (out / f"{name}.mp4").read_bytes() for name in names} == made
    assert "nothing left to do" in flow(*words, *size, small=False).stdout


def test_resume_knows_what_has_no_effect(flow: Flow, own_predict2_5: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {**TEXT, "name": "a"})
    prompt, both = tmp_path / "prompt.safetensors", tmp_path / "both.safetensors"
    save({"prompt": torch.randn(7, CONFIG.feature_width)}, prompt)
    save({n: torch.randn(7, CONFIG.feature_width) for n in ("prompt", "negative_prompt")}, both)
    touched = next((own_predict2_5 / RELEASED).rglob("*.safetensors"))
    cases = (
        (0, None, True, False),
        (0, prompt, True, True),
        (2, prompt, False, False),  # the negative prompt is encoded
        (2, both, False, True),
    )
    for number, (guidance, embeddings, of_words, of_encoder) in enumerate(cases, 1):
        words: tuple[object, ...] = ("-i", file, "--guidance", guidance, "--device", "cpu")
        if embeddings is not None:
            words += ("--prompt_embeddings", embeddings)
        assert flow(*words, checkpoint_dir=own_predict2_5).exit_code == 0
        other = (*words, "--negative_prompt", "fog", "--resume")
        result = flow(*other, checkpoint_dir=own_predict2_5)
        assert ("is finished" in result.stderr) == of_words, (guidance, embeddings)
        os.utime(touched, (number, number))
        result = flow(*other, checkpoint_dir=own_predict2_5)
        assert ("is finished" in result.stderr) == of_encoder, (guidance, embeddings)


def test_resume_knows_changed_files(flow: Flow, own_predict2_5: Path, tmp_path: Path) -> None:
    words = ("-i", write(tmp_path / "a.json", {**TEXT, "name": "a"}), "--resume")
    for path in (None, *sorted(own_predict2_5.rglob("*.p*t*"))):
        if path is not None and "pre-trained" not in str(path) and path.is_file():
            os.utime(path, (1, 1))
            result = flow(*words, checkpoint_dir=own_predict2_5)
            assert "was made in another way" in result.stderr, path
        flow(*words, checkpoint_dir=own_predict2_5)
        assert "is finished" in flow(*words, checkpoint_dir=own_predict2_5).stderr


def test_the_command_is_listed() -> None:
    assert "predict2.5" in main.list_commands(click.Context(main))
