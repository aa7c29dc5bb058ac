"""From files of samples to videos through the command line, and what may go wrong."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

import worldline.memory
import worldline.opening
import worldline.world
from worldline.errors import Error
from worldline.memory import Memory
from worldline.text.reason1 import RELEASED
from worldline.video.read import probe, read_image, read_video
from worldline.video.write import write_video
from worldline.weights.checkpoint import save

from ..conftest import frames_of
from ..tiny_predict2_5 import CONFIG, POST, PRE, write_transformer
from .conftest import run_words
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


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """A file of one sample, a."""
    return write_lines(tmp_path / "a.json", {**TEXT, "name": "a"})


def test_every_kind_of_sample(flow: Flow, clip: Path, image: Path, tmp_path: Path) -> None:
    kinds = {"t": ("text2world", None), "v": ("video2world", clip), "i": ("image2world", image)}
    for name, (kind, path) in kinds.items():
        sample: dict[str, Any] = {"name": name, "inference_type": kind, "prompt": PROMPT}
        if path is not None:
            sample["input_path"] = str(path)
        write_lines(tmp_path / "in" / f"{name}.json", sample)
    result = flow("-i", tmp_path / "in" / "*.json")
    assert result.exit_code == 0, result.stderr
    out = tmp_path / "out"
    assert files_in(out) == videos(*"tvi")
    assert f"3 of 3 videos are in {out}" in result.stdout
    for name, given in (("t", 0), ("i", 1), ("v", 5)):
        report = report_of(tmp_path, name)
        assert report["model"] == POST.name
        assert report["request"]["num_input_frames"] == given
        assert report["sample"]["name"] == name
        assert (report["schedule"], report["known_timestep"]) == ("karras", 0.1)
        assert (report["evaluations"], len(report["seconds_of_steps"])) == (3, 3)
        info = probe(out / f"{name}.mp4")
        assert (info.frames, info.height, info.width, info.fps) == (9, 32, 48, 16)
    assert (out / "t.txt").read_text() == PROMPT


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


def test_several_files_and_patterns(flow: Flow, tmp_path: Path) -> None:
    """Of one frame each, which is a picture."""
    first, second, _ = (
        write_lines(tmp_path / "in" / f"{name}.json", {**TEXT, "name": name}) for name in "abc"
    )
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
        assert files_in(out) == {f"{name}.{end}" for name in "ab" for end in ("jpg", "json", "txt")}
        assert read_image(out / "a.jpg").frames.shape == (1, 32, 48, 3)


def test_flags_win_over_all_samples(flow: Flow, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", *({**TEXT, "name": n, "seed": 3} for n in "ab"))
    result = flow("-i", file, "--seed", 9, "--guidance", 2, "--negative_prompt", "fog")
    assert result.exit_code == 0, result.stderr
    for name in "ab":
        asked = report_of(tmp_path, name)["request"]
        assert (asked["seed"], asked["guidance"], asked["negative_prompt"]) == (9, 2, "fog")
    assert frames_of(tmp_path / "out" / "a.mp4") == frames_of(tmp_path / "out" / "b.mp4")


@pytest.mark.parametrize(
    ("words", "model", "schedule"),
    [
        (("--model", PRE.name), PRE.name, "shifted"),
        (("--model", POST.name, "--schedule", "shifted"), POST.name, "shifted"),
        (("--checkpoint_path", "mine/model.pt"), "mine", "shifted"),
        (("--checkpoint_path", "mine", "--model", POST.name), "mine", "karras"),
        (("--checkpoint_path", "mine", "--experiment", POST.experiment), "mine", "karras"),
        (("--checkpoint_path", "mine", "--experiment", "of-mine"), "mine", "shifted"),
        (("--model", "mine"), "mine", "shifted"),
        (("--model", "stated"), "stated", "karras"),
    ],
)
def test_the_model_and_its_schedule(
    words: tuple[object, ...],
    model: str,
    schedule: str,
    flow: Flow,
    one: Path,
    own_predict2_5: Path,
    tmp_path: Path,
) -> None:
    for name in ("mine", "stated"):
        write_transformer(own_predict2_5 / name / "model.pt", seed=2)
    (own_predict2_5 / "stated" / "config.json").write_text('{"schedule": "karras"}')
    result = flow("-i", one, *words, "--num_steps", 1, checkpoint_dir=own_predict2_5)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path, "a")
    assert (report["model"], report["schedule"]) == (model, schedule)


def test_a_world_of_its_own_defaults(
    flow: Flow, one: Path, own_predict2_5: Path, tmp_path: Path
) -> None:
    write_transformer(own_predict2_5 / "mine" / "model.pt")
    own = {"num_video_frames": 13, "height": 32, "width": 32, "num_steps": 1, "guidance": 0}
    (own_predict2_5 / "mine" / "config.json").write_text(json.dumps(own))
    words = ("-i", one, "--model", "mine")
    assert flow(*words, checkpoint_dir=own_predict2_5, small=False).exit_code == 0
    report = report_of(tmp_path, "a")
    assert {name: report["request"][name] for name in own} == own
    assert report["sample"] == {**TEXT, "name": "a"}  # and not what the world has by default
    result = flow(*words, "--guidance", 7, checkpoint_dir=own_predict2_5, small=False)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path, "a")
    assert report["request"]["guidance"] == report["sample"]["guidance"] == 7
    # a chunk is no longer than what the world makes
    long = (*words, "--enable_autoregressive", "--num_output_frames", 20, "--chunk_size")
    result = flow(*long, 14, checkpoint_dir=own_predict2_5, small=False)
    assert result.exit_code == 2
    check_mentions(result.stderr, "chunk_size 14 13")
    assert flow(*long, 13, checkpoint_dir=own_predict2_5, small=False).exit_code == 0
    assert report_of(tmp_path, "a")["chunks"] == 2


def test_long_videos(flow: Flow, clip: Path, tmp_path: Path) -> None:
    """By the file and by flags."""
    short = {"name": "b", "inference_type": "video2world", "prompt": "x", "input_path": str(clip)}
    long = {"enable_autoregressive": True, "chunk_size": 9, "chunk_overlap": 5}
    sample = {**short, **long, "name": "a", "num_output_frames": 14}
    size = (*SMALL[:2], *SMALL[4:])
    words = ("-i", write_lines(tmp_path / "a.json", sample), *size)
    result = flow(*words, small=False)
    assert result.exit_code == 0, result.stderr
    assert report_of(tmp_path, "a")["chunks"] == 3
    assert probe(tmp_path / "out" / "a.mp4").frames == 14
    flags = ("--enable-autoregressive", "True", "--num-output-frames", 14, "--chunk-size", 9)
    words = ("-i", write_lines(tmp_path / "b.json", short), *size, *flags, "--chunk-overlap", 5)
    assert flow(*words, small=False).exit_code == 0
    assert frames_of(tmp_path / "out" / "a.mp4") == frames_of(tmp_path / "out" / "b.mp4")


def test_embeddings_in_place_of_the_text_encoder(
    flow: Flow, one: Path, own_predict2_5: Path, tmp_path: Path
) -> None:
    shutil.rmtree(own_predict2_5 / "nvidia")
    result = flow("-i", one, checkpoint_dir=own_predict2_5)
    check_refused(result, f"{one} {RELEASED} prompt negative_prompt text_encoder_dir", tmp_path)
    path = tmp_path / "words.safetensors"
    save({n: torch.randn(7, CONFIG.feature_width) for n in ("prompt", "negative_prompt")}, path)
    result = flow("-i", one, "--prompt_embeddings", path, checkpoint_dir=own_predict2_5)
    assert result.exit_code == 0, result.stderr
    assert str(path) in {stamp["path"] for stamp in report_of(tmp_path, "a")["files"]}


def test_flags_without_effect_are_named(flow: Flow, one: Path) -> None:
    flags = ("--offload_guardrail_models", "--offload-tokenizer", "--num_steps", 1)
    result = flow("-i", one, *flags)
    assert result.exit_code == 0, result.stderr
    for flag in ("offload_guardrail_models", "offload_tokenizer"):
        line = next(line for line in result.stderr.splitlines() if f"--{flag}" in line)
        assert "no effect" in line
    quiet = ("--no-offload-tokenizer", "--no-keep-going", "--no-profile", "--num_steps", 1)
    result = flow("-i", one, *quiet)
    assert result.exit_code == 0, result.stderr
    assert "no effect" not in result.stderr


# --- wrong words and inputs; what needs no model is in test_refusals.py


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        ("--model 14B/pre-trained", "14B/pre-trained download"),
        ("--checkpoint_path nvidia/Cosmos-Reason1-7B", "nvidia/Cosmos-Reason1-7B"),
        ("--tokenizer_dir nowhere", "nowhere --tokenizer_dir"),
        ("--text_encoder_dir nowhere", "nowhere --text_encoder_dir"),
        ("--prompt_embeddings nowhere", "nowhere"),
        ("--device abacus", "abacus"),
        ("--num_output_frames 10", "num_output_frames 10 4k 9"),
        ("--resolution 100,32", "resolution 100 16 96"),
        ("--enable_autoregressive --chunk_size 101", "chunk_size 101 93"),
        ("--enable_autoregressive --chunk_overlap 3", "--chunk_overlap 3 4k"),
    ],
)
@pytest.mark.usefixtures("forbid_weights")
def test_refusals(words: str, mentioned: str, flow: Flow, one: Path, tmp_path: Path) -> None:
    check_refused(flow("-i", one, "--seed", 1, *words.split()), mentioned, tmp_path)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_damaged_checkpoint_is_named(
    share: float, pickled: bool, flow: Flow, one: Path, own_predict2_5: Path, tmp_path: Path
) -> None:
    checkpoint = own_predict2_5 / Path(POST.repository).name / POST.file
    whole = pickle.dumps({"step": 1}) if pickled else checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(share * len(whole))])
    result = flow("-i", one, "--checkpoint_path", checkpoint)
    check_refused(result, str(checkpoint), tmp_path)
    assert result.stderr.splitlines()[-1].startswith(f"worldline: {checkpoint}")


@pytest.mark.usefixtures("forbid_weights")
def test_everything_that_is_wrong_is_named_at_once(
    flow: Flow, short_clip: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First what the files say, with their inputs; what the model cannot make, by sample, later."""
    (tmp_path / "noise.mp4").write_text("hello")
    monkeypatch.chdir(tmp_path)  # short paths, so that no line is cut
    shutil.copy(short_clip, tmp_path / "one.mp4")
    shutil.copy(image, tmp_path / "in.png")
    write_video(np.zeros((4, 16, 16, 3), np.uint8), tmp_path / "four.mp4", 25)
    (tmp_path / "folder.mp4").mkdir()
    video = {"inference_type": "video2world", "prompt": "x"}
    lines = write_lines(
        Path("a.jsonl"),
        {**video, "name": "good", "input_path": "one.mp4"},
        {**video, "name": "still", "input_path": "in.png"},
        {**video, "name": "gone", "input_path": "gone.mp4"},
        {**video, "name": "good", "input_path": "one.mp4"},
        {"name": "empty"},
        {**video, "name": "noise", "input_path": "noise.mp4"},
        {**video, "name": "again", "input_path": "noise.mp4"},
        {**video, "name": "short", "input_path": "four.mp4"},
        {**video, "name": "folder", "input_path": "folder.mp4"},
        {**TEXT, "name": "blank", "prompt": " "},
        {**TEXT, "name": "seed", "seed": -1, "num_output_frames": 0},
    )
    broken = write_lines(Path("b.json"))
    result = flow("-i", lines, broken, "c.txt", small=False)
    check_refused(result, f"{broken} c.txt", tmp_path)
    for number, mentioned in (
        (2, "'still' input_path"),
        (3, "'gone' gone.mp4"),
        (4, "'good' name 1"),
        (5, "'empty' inference_type"),
        (6, "'noise' noise.mp4"),
        (7, "'again' noise.mp4"),
        (8, "'short' four.mp4 4 5"),
        (9, "'folder' folder.mp4"),
        (10, "'blank' prompt"),
        (11, "'seed' seed -1 num_output_frames 0"),
    ):
        named = [row for row in result.stderr.splitlines() if f"{lines}, line {number}," in row]
        assert len(named) == (2 if number == 11 else 1), (number, result.stderr)
        check_mentions(" ".join(named), mentioned)
    assert "line 1," not in result.stderr.replace("line 1, sample 'good' has", "")
    sizes = write_lines(
        tmp_path / "d.jsonl",
        *({**TEXT, "name": f"s{frames}", "num_output_frames": frames} for frames in (9, 10, 11)),
        {"name": "mute", "inference_type": "text2world"},
    )
    result = flow("-i", sizes, "--resolution", "32,48", small=False)
    check_refused(result, "", tmp_path)
    *rows, mute = result.stderr.splitlines()
    check_mentions(mute, f"{sizes} 'mute' prompt")
    for row, frames in zip(rows, (10, 11), strict=True):
        check_mentions(row, f"{sizes} 's{frames}' num_output_frames {frames}")


@pytest.mark.usefixtures("forbid_weights")
def test_clips_that_leave_nothing_to_make(flow: Flow, tmp_path: Path) -> None:
    """In the words of a sample."""
    write_video(np.zeros((5, 32, 48, 3), np.uint8), tmp_path / "in.mp4", 25)
    file = write_lines(tmp_path / "a.json", {**TEXT, "name": "a", "input_path": "in.mp4"})
    words = ("-i", file, "--resolution", "32,48", "--num_output_frames")
    for frames, kind in ((5, "video2world"), (1, "image2world")):
        result = flow(*words, frames, "--inference_type", kind, small=False)
        check_refused(result, f"num_output_frames num_input_frames {frames} {frames + 4}", tmp_path)


@pytest.mark.usefixtures("forbid_weights")
def test_an_output_never_replaces_an_input(flow: Flow, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "out" / "a.json", {**TEXT, "name": "a"})
    words = tmp_path / "out" / "b.txt"
    words.write_text("snow")
    sample = {"name": "b", "inference_type": "text2world", "prompt_path": str(words)}
    for path, result in (
        (file, flow("-i", file)),
        (words, flow("-i", write_lines(tmp_path / "b.json", sample))),
    ):
        assert result.exit_code == 2
        check_mentions(result.stderr, f"{path} input")


@pytest.mark.parametrize("ending", ["mp4", "json", "txt"])
@pytest.mark.usefixtures("forbid_weights")
def test_a_folder_in_the_way_is_named_first(ending: str, flow: Flow, tmp_path: Path) -> None:
    folder = tmp_path / "out" / f"b.{ending}"
    folder.mkdir(parents=True)
    samples = write_lines(tmp_path / "a.jsonl", *({**TEXT, "name": name} for name in "ab"))
    result = flow("-i", samples)
    assert result.exit_code == 2
    check_mentions(result.stderr, f"{folder} folder")
    assert files_in(tmp_path / "out") == {folder.name}


# --- memory


def test_memory_is_planned_for_what_needs_most(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of fewer pixels than a clip, which is coded in pieces, may need more."""
    samples = (
        {**TEXT, "name": "clip", "num_output_frames": 93, "resolution": "192,208"},
        {**TEXT, "name": "picture", "num_output_frames": 1, "resolution": "1920,1920"},
    )
    assert 93 * 192 * 208 > 1920 * 1920
    file = write_lines(tmp_path / "a.jsonl", *samples)
    plans = []

    def load(opened: Any, requests: Any, compute: Any, **_: Any) -> None:
        for chosen in ([requests[0]], requests):
            plans.append(worldline.opening.plan(opened, chosen, compute).peak())
        raise Error("enough")

    monkeypatch.setattr(worldline.world, "load_world", load)
    assert flow("-i", file, small=False).exit_code == 1
    assert plans[0] < plans[1]


@pytest.mark.usefixtures("forbid_weights")
def test_models_that_find_no_room(
    flow: Flow, one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worldline.memory, "host_memory", lambda: Memory(10**8, 24 * 10**9))
    result = flow("-i", one, "--resolution", "640,480", "--num_output_frames", 93, small=False)
    check_refused(result, f"{POST.name} GB 0.1 24.0", tmp_path)


@pytest.mark.usefixtures("forbid_weights")
def test_frames_that_find_no_room(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long video is made piece by piece, but held as a whole."""
    monkeypatch.setattr(worldline.memory, "host_memory", lambda: Memory(20 * 10**9, 24 * 10**9))
    long = {**TEXT, "enable_autoregressive": True, "resolution": "704,1280", "chunk_size": 9}
    file = write_lines(
        tmp_path / "a.jsonl",
        {**TEXT, "name": "short", "resolution": "32,48"},
        {**long, "name": "long", "num_output_frames": 1_000_001},
        {**long, "name": "longer", "num_output_frames": 1_000_002, "resolution": "32,48"},
        {**long, "name": "longest", "num_output_frames": 1_048_576},
    )
    result = flow("-i", file, small=False)
    check_refused(result, "", tmp_path)
    first, second = (line for line in result.stderr.splitlines() if "sample" in line)
    check_mentions(first, f"{file} 2 'long' 1000001 704 1280 2703.4 20.0 24.0")
    check_mentions(second, "'longest' 1048576")


# --- failed, resumed; what all families share is in test_diffusion.py


def test_a_batch_goes_on_after_a_bad_sample(
    flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_lines(tmp_path / "a.jsonl", *({**TEXT, "name": name} for name in "ab"))
    with monkeypatch.context() as patch:
        fail_at(patch, Error("this one failed"), 0)
        result = flow("-i", file)
    assert result.exit_code == 1
    assert "error: 1/2 a: this one failed" in result.stderr
    assert files_in(tmp_path / "out") == videos("b")
    fail_at(monkeypatch, Error("this one failed"), 0)
    result = flow("-i", file, "-o", tmp_path / "other", "--no-keep-going")
    assert result.exit_code == 1
    assert not (tmp_path / "other").exists()


def test_resume_knows_other_ways(flow: Flow, one: Path) -> None:
    words = ("-i", one, "--device", "cpu", "--num_steps", 1)
    assert flow(*words).exit_code == 0
    for more, finished in (
        (("--offload_tokenizer",), True),
        (("--preview_every", 1), True),
        (("--schedule", "shifted"), False),
        (("--model", PRE.name), False),
        (("--seed", 2), False),
        ((), False),  # the last had another seed
    ):
        result = flow(*words, "--resume", *more)
        assert result.exit_code == 0, result.stderr
        assert ("is finished" in result.stderr) == finished, more
        assert ("made again" in result.stderr) != finished, more


def test_resume_makes_damaged_videos_again(flow: Flow, tmp_path: Path) -> None:
    names = ("empty", "half", "shorter", "whole", "long")
    samples = [{**TEXT, "name": name, "num_output_frames": 9} for name in names]
    samples[-1] |= {"enable_autoregressive": True, "chunk_size": 5, "num_output_frames": 12}
    words = ("-i", write_lines(tmp_path / "a.jsonl", *samples), "--resume")
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
    again = [line for line in result.stderr.splitlines() if "made again" in line]
    assert len(again) == 3
    for line, mentioned in zip(again, ("empty", "half", "shorter 8 9"), strict=True):
        check_mentions(line, mentioned)
    assert result.stdout.endswith(f"5 videos are in {out}: 3 made now, 2 there before\n")
    assert {name: (out / f"{name}.mp4").read_bytes() for name in names} == made


def test_resume_knows_what_has_no_effect(
    flow: Flow, one: Path, own_predict2_5: Path, tmp_path: Path
) -> None:
    prompt, both = tmp_path / "prompt.safetensors", tmp_path / "both.safetensors"
    save({"prompt": torch.randn(7, CONFIG.feature_width)}, prompt)
    save({n: torch.randn(7, CONFIG.feature_width) for n in ("prompt", "negative_prompt")}, both)
    touched = next((own_predict2_5 / RELEASED).rglob("*.safetensors"))
    cases = (
        # guidance, embeddings; whether it is finished with another negative prompt, text encoder
        (0, None, True, False),
        (0, prompt, True, True),
        (2, prompt, False, False),  # the negative prompt is encoded
        (2, both, False, True),
    )
    for guidance, embeddings, of_words, of_encoder in cases:
        words: tuple[object, ...] = ("-i", one, "--guidance", guidance, "--device", "cpu")
        if embeddings is not None:
            words += ("--prompt_embeddings", embeddings)
        assert flow(*words, checkpoint_dir=own_predict2_5).exit_code == 0
        other = (*words, "--negative_prompt", "fog", "--resume")
        result = flow(*other, checkpoint_dir=own_predict2_5)
        assert ("is finished" in result.stderr) == of_words, (guidance, embeddings)
        alter(touched)
        result = flow(*other, checkpoint_dir=own_predict2_5)
        assert ("is finished" in result.stderr) == of_encoder, (guidance, embeddings)


def test_resume_knows_changed_files(flow: Flow, one: Path, own_predict2_5: Path) -> None:
    words = ("-i", one, "--resume", "--num_steps", 1)
    flow(*words, checkpoint_dir=own_predict2_5)
    files = [path for path in sorted(own_predict2_5.rglob("*.p*t*")) if path.is_file()]
    for path in (path for path in files if "pre-trained" not in str(path)):
        assert "is finished" in flow(*words, checkpoint_dir=own_predict2_5).stderr
        alter(path)
        assert "made again" in flow(*words, checkpoint_dir=own_predict2_5).stderr, path
