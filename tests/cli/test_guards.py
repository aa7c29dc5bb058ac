"""Guardrails and prompt upsamplers in the commands: on, off, missing, refusing; one and many."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from torch import nn

import worldline
import worldline.locate
from worldline import guardrails, machine
from worldline.errors import GuardrailRefusal, InsufficientMemoryError
from worldline.guardrails import language
from worldline.guardrails.base import Guardrails, Verdict
from worldline.guardrails.frames import FrameFilter
from worldline.machine import Memory
from worldline.video.read import read_video
from worldline.world.autoregressive import AutoregressiveWorld

from ..conftest import MODEL
from ..guardrails.networks import write_classifier
from ..tiny_decoder import VIDEO2WORLD as AR_VIDEO2WORLD
from ..tiny_diffusion import TEXT2WORLD, VIDEO2WORLD
from ..tiny_guards import (
    CAPTION,
    DESCRIBES,
    GUARDRAILS,
    LENGTHENS,
    LONG,
    REFUSED_WORD,
    SAFE,
    UNSAFE,
    add_guardrails,
    add_upsampler,
)
from ..tiny_predict2_5 import CONFIG as FLOW_CONFIG
from ..tiny_predict2_5 import POST, SMALL
from .conftest import run_words

PROMPT = f"a red ball rolls to the {SAFE}"
REFUSED_BY_WORDS = f"a {REFUSED_WORD} and a {SAFE}"
REFUSED_BY_MODEL = f"the ball hits the {UNSAFE}"
ALL = ["blocklist", "llama_guard_3", "video_content_safety_filter", "face_blur_filter"]
OF_FLOW = ["blocklist", "qwen3guard", "video_content_safety_filter", "face_blur_filter"]
UNSAFE_CLASS = 2
UNSAFE_TO_FLOW = 1
Command = Callable[..., Result]


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory,
    whole_world: Path,
    diffusion_worlds: Path,
    tiny_predict2_5: Path,
) -> Path:
    """All small worlds with guardrails and upsamplers; copy it before changing it."""
    root = tmp_path_factory.mktemp("guarded") / "checkpoints"
    shutil.copytree(whole_world, root)
    for others in (diffusion_worlds, tiny_predict2_5):
        shutil.copytree(others, root, dirs_exist_ok=True)
    add_guardrails(root)
    add_upsampler(root, describes=False)
    add_upsampler(root, describes=True)
    return root


@pytest.fixture
def own_guarded(guarded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(guarded, tmp_path / "checkpoints"))


@pytest.fixture(autouse=True)
def _no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-cache"))


@pytest.fixture
def command(guarded: Path, tmp_path: Path) -> Command:
    """`command("diffusion", "text2world", …)` on the guarded worlds, into tmp_path / "out"."""

    def call(*words: object, checkpoint_dir: Path = guarded) -> Result:
        fixed = ("--checkpoint_dir", checkpoint_dir, "--video_save_folder", tmp_path / "out")
        return run_words((*words, *fixed))

    return call


@pytest.fixture
def flow(guarded: Path, tmp_path: Path) -> Command:
    """`flow("--seed", 1, prompts=…)`: `worldline predict2.5` likewise; samples are 0, 1, …."""

    def call(
        *words: object, prompts: Sequence[str] = (PROMPT,), checkpoint_dir: Path = guarded
    ) -> Result:
        samples = [
            {"name": str(number), "inference_type": "text2world", "prompt": prompt}
            for number, prompt in enumerate(prompts)
        ]
        file = jsonl(tmp_path, *samples)
        fixed = ("-i", file, "-o", tmp_path / "out", "--checkpoint_dir", checkpoint_dir)
        size = ("--resolution", "32,48", "--num_output_frames", 9, "--num_steps", 1)
        return run_words(("predict2.5", *fixed, *size, *words))

    return call


def report_of(folder: Path, name: str = "output") -> dict[str, Any]:
    return dict(json.loads((folder / "out" / f"{name}.json").read_text()))


def jsonl(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "batch.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def ran(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [(check["guard"], check["subject"]) for check in report["guardrail_checks"]]


TEXT = ("diffusion", "text2world", "--prompt")
CONTINUE = ("diffusion", "video2world", "--input_image_or_video_path")
BASE = ("autoregressive", "base", "--disable_diffusion_decoder", "--input_image_or_video_path")
PROMPTED = ("autoregressive", "video2world", *BASE[2:])


def words_of(prompt: str, clip: Path) -> dict[str, tuple[object, ...]]:
    """A command of each kind by its name."""
    return {
        "text2world": (*TEXT, prompt),
        "video2world": (*CONTINUE, clip, "--prompt", prompt),
        "prompted": (*PROMPTED, clip, "--prompt", prompt),
        "base": (*BASE, clip),
    }


# --- on


@pytest.mark.parametrize("offload", [(), ("--offload_guardrail_models",)])
def test_text2world(offload: tuple[str, ...], command: Command, tmp_path: Path) -> None:
    result = command(*TEXT, PROMPT, *offload)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path)
    frames = report["request"]["num_video_frames"]
    assert ran(report) == [
        ("blocklist", "prompt"),
        ("llama_guard_3", "prompt"),
        ("blocklist", "upsampled prompt"),
        ("llama_guard_3", "upsampled prompt"),
        ("video_content_safety_filter", f"video of {frames} frames"),
        ("face_blur_filter", f"video of {frames} frames"),
    ]
    verdicts = [check["verdict"] for check in report["guardrail_checks"]]
    assert set(verdicts[:-1]) == {"safe"}
    assert "regions changed" in verdicts[-1]
    assert (report["guardrail"], report["guardrail_off"]) == ("Predict1", None)
    assert (report["request"]["prompt"], report["prompt"]) == (PROMPT, LONG)
    assert (report["prompt_upsampler"], report["prompt_upsampler_ran"]) == (LENGTHENS, True)
    assert (tmp_path / "out" / "output.txt").read_text() == LONG
    stages = [stage["name"] for stage in report["run"]["stages"]]
    assert [name for name in stages if name != "read"][:2] == ["guardrail", "upsample"]
    loaded = [stage["name"] for stage in report["load"]["stages"]]
    assert loaded == ["load guardrails", "load prompt upsampler", "load"]
    assert f"guardrails: {', '.join(ALL)}" in result.stderr


def test_a_long_prompt_stays_as_it_is(command: Command, tmp_path: Path) -> None:
    result = command(*TEXT, PROMPT, "--word_limit_to_skip_upsampler", 3)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path)
    assert (report["prompt"], report["prompt_upsampler_ran"]) == (PROMPT, False)
    assert "upsampled prompt" not in dict(ran(report)).values()


def test_video2world_describes_its_input(command: Command, clip: Path, tmp_path: Path) -> None:
    result = command(*CONTINUE, clip)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path)
    assert (report["request"]["prompt"], report["prompt"]) == (None, CAPTION)
    assert report["prompt_upsampler"] == DESCRIBES
    assert ran(report)[:2] == [
        ("blocklist", "upsampled prompt"),
        ("llama_guard_3", "upsampled prompt"),
    ]
    assert (tmp_path / "out" / "output.txt").read_text() == CAPTION


def test_video2world_uses_a_prompt_that_is_given(
    command: Command, clip: Path, own_guarded: Path, tmp_path: Path
) -> None:
    shutil.rmtree(own_guarded / DESCRIBES)  # it is not even looked for
    result = command(*CONTINUE, clip, "--prompt", PROMPT, checkpoint_dir=own_guarded)
    assert result.exit_code == 0, result.stderr
    assert "prompts are used as they are" in result.stderr
    report = report_of(tmp_path)
    assert (report["prompt"], report["prompt_upsampler_ran"]) == (PROMPT, False)


def test_a_batch_with_prompts_and_without(command: Command, clip: Path, tmp_path: Path) -> None:
    batch = jsonl(
        tmp_path, {"visual_input": str(clip)}, {"visual_input": str(clip), "prompt": PROMPT}
    )
    words = ("diffusion", "video2world", "--batch_input_path", batch)
    result = command(*words)
    assert result.exit_code == 0, result.stderr
    assert [report_of(tmp_path, n)["prompt"] for n in "01"] == [CAPTION, PROMPT]
    assert "nothing left to do" in command(*words, "--resume").stdout
    again = command(*words, "--resume", "--disable_guardrail")
    assert again.stderr.count("was made in another way") == 2


def test_autoregressive_base_checks_the_video_alone(
    command: Command, clip: Path, own_guarded: Path, tmp_path: Path
) -> None:
    shutil.rmtree(own_guarded / language.LLAMA_GUARD_3.released)
    result = command(*BASE, clip, checkpoint_dir=own_guarded)
    assert result.exit_code == 0, result.stderr
    assert [guard for guard, _ in ran(report_of(tmp_path))] == ALL[2:]


@pytest.mark.parametrize("decoder", [True, False])
def test_autoregressive_video2world(
    decoder: bool, command: Command, clip: Path, tmp_path: Path
) -> None:
    words = words_of(PROMPT, clip)["prompted"]
    result = command(*(word for word in words if not (decoder and word == BASE[2])))
    assert result.exit_code == 0, result.stderr
    assert [guard for guard, _ in ran(report_of(tmp_path))] == ALL


def test_predict2_5(flow: Command, tmp_path: Path) -> None:
    result = flow()
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path, "0")
    assert ran(report) == [
        ("blocklist", "prompt"),
        ("qwen3guard", "prompt"),
        ("video_content_safety_filter", "video of 9 frames"),
        ("face_blur_filter", "video of 9 frames"),
    ]
    assert (report["guardrail"], report["guardrail_off"]) == ("predict2.5", None)
    assert [stage["name"] for stage in report["load"]["stages"]] == ["load guardrails", "load"]
    assert report["run"]["stages"][0]["name"] == "guardrail"
    assert f"guardrails: {', '.join(OF_FLOW)}" in result.stderr
    assert "has no effect" not in result.stderr  # of what nobody asked for
    result = flow("--offload_guardrail_models", "--preview_every", 1)
    assert "--offload_guardrail_models has no effect: the model runs on the CPU" in result.stderr
    assert "--preview_every has no effect: no frames are shown before" in result.stderr


# --- off


def test_disabled_is_reported(command: Command, tmp_path: Path, clip: Path) -> None:
    for words in ((*TEXT, PROMPT), (*BASE, clip)):
        result = command(*words, "--disable_guardrail")
        assert result.exit_code == 0, result.stderr
        assert "NVIDIA Open Model License" in result.stderr
        report = report_of(tmp_path)
        assert report["guardrail"] is None
        assert report["guardrail_off"] == "disabled by the user"
        assert report["guardrail_checks"] == []


def test_predict2_5_without(flow: Command, tmp_path: Path) -> None:
    words = ("--disable-guardrails", "--offload-guardrail-models", "--guardrail_dir", "x")
    result = flow(*words, prompts=[REFUSED_BY_WORDS])
    assert result.exit_code == 0, result.stderr
    assert "NVIDIA Open Model License" in result.stderr
    for flag in ("offload_guardrail_models", "guardrail_dir"):
        assert f"--{flag} has no effect: no guardrail runs" in result.stderr
    report = report_of(tmp_path, "0")
    assert (report["guardrail"], report["guardrail_off"]) == (None, "disabled by the user")
    assert report["guardrail_checks"] == []
    assert "is finished" in flow(words[0], "--resume", prompts=[REFUSED_BY_WORDS]).stderr
    result = flow("--resume", prompts=[REFUSED_BY_WORDS])
    assert "was made in another way" in result.stderr
    assert result.exit_code == 3


def test_bundled_worlds_of_predict2_5_have_none(
    flow: Command, own_predict2_5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worldline.locate, "BUNDLED", own_predict2_5)
    folder = own_predict2_5 / Path(POST.repository).name
    (folder / "config.json").write_text("{}")  # what a bundled world is known by
    words = ("--model", f"tiny-{folder.name}")
    result = flow(*words, "--disable_guardrails", checkpoint_dir=tmp_path)
    assert result.exit_code == 0, result.stderr
    assert f"--disable_guardrails has no effect: {words[1]} has no guardrails" in result.stderr
    result = flow(*words, checkpoint_dir=tmp_path)
    assert "no guardrail checks prompt or video: bundled worlds have none" in result.stderr
    assert report_of(tmp_path, "0")["guardrail_off"] == "bundled worlds have none"
    result = flow(*words, "--no-disable-guardrails", checkpoint_dir=tmp_path)
    assert result.exit_code == 2
    assert "nvidia/Cosmos-Guardrail1 is missing" in result.stderr


def test_bundled_worlds_have_none(run: Callable[..., Result], tmp_path: Path) -> None:
    words = ("--diffusion_transformer_dir", "tiny-Cosmos-Predict1-7B-Video2World")
    fixed = ("--prompt", REFUSED_BY_WORDS, "--num_steps", 1, "--num_video_frames", 9)
    size = ("--height", 32, "--width", 32, "--video_save_folder", tmp_path / "out")
    result = run("diffusion", "text2world", *words, *fixed, *size, "--offload_guardrail_models")
    assert result.exit_code == 0, result.stderr
    assert "no guardrail checks prompt or video: bundled worlds have none" in result.stderr
    assert "--offload_guardrail_models has no effect: no guardrail runs" in result.stderr
    report = report_of(tmp_path)
    assert report["guardrail_off"] == "bundled worlds have none"
    assert report["prompt_upsampler"] is None


# --- missing


@pytest.mark.usefixtures("forbid_weights")
@pytest.mark.parametrize(
    ("lost", "message", "kinds"),
    [
        (
            GUARDRAILS,
            "nvidia/Cosmos-Guardrail1 is missing",
            ("text2world", "video2world", "prompted", "base", "predict2.5"),
        ),
        (
            language.LLAMA_GUARD_3.released,
            "meta-llama/Llama-Guard-3-8B is missing",
            ("text2world", "video2world", "prompted"),
        ),
        (language.QWEN3GUARD.released, "Qwen/Qwen3Guard-Gen-0.6B is missing", ("predict2.5",)),
        (f"{GUARDRAILS}/blocklist", "blocklist", ("prompted", "predict2.5")),
        (f"{GUARDRAILS}/face_blur_filter", "Resnet50_Final.pth is missing", ("base", "predict2.5")),
    ],
)
def test_what_is_missing_stops_it_first(
    lost: str,
    message: str,
    kinds: tuple[str, ...],
    command: Command,
    flow: Command,
    own_guarded: Path,
    clip: Path,
    tmp_path: Path,
) -> None:
    (own_guarded / lost).rename(tmp_path / "lost")
    for kind in kinds:
        if kind == "predict2.5":
            result = flow(checkpoint_dir=own_guarded)
            flag, fetch = "--disable_guardrails", "Cosmos-Guardrail1 Qwen3Guard-Gen-0.6B"
        else:
            result = command(*words_of(PROMPT, clip)[kind], checkpoint_dir=own_guarded)
            flag, fetch = "--disable_guardrail", "guardrails"
        last = result.stderr.splitlines()[-1]
        assert result.exit_code == 2, last
        python = f"(in Python {flag.removeprefix('--')}=True)"
        for part in (message, f"{flag} {python}", f"worldline checkpoints download {fetch}"):
            assert part in last
        assert not (tmp_path / "out").exists()


def test_a_missing_upsampler(command: Command, own_guarded: Path, clip: Path) -> None:
    for name in (LENGTHENS, DESCRIBES):
        shutil.rmtree(own_guarded / name)
    for words in ((*TEXT, PROMPT), (*CONTINUE, clip)):
        result = command(*words, checkpoint_dir=own_guarded)
        assert result.exit_code == 2
        last = result.stderr.splitlines()[-1]
        assert "--disable_prompt_upsampler" in last
        assert "worldline checkpoints download Cosmos-Predict1-7B-" in last
    result = command(*TEXT, PROMPT, "--prompt_upsampler_dir", "x", checkpoint_dir=own_guarded)
    assert "(--prompt_upsampler_dir)" in result.stderr


def test_a_folder_of_guardrails_elsewhere(
    command: Command, own_guarded: Path, clip: Path, tmp_path: Path
) -> None:
    (own_guarded / GUARDRAILS).rename(tmp_path / "elsewhere")
    words = (*BASE, clip, "--guardrail_dir", tmp_path / "elsewhere")
    result = command(*words, checkpoint_dir=own_guarded)
    assert result.exit_code == 0, result.stderr
    assert [guard for guard, _ in ran(report_of(tmp_path))] == ALL[2:]


# --- refusing


@pytest.mark.parametrize(
    ("prompt", "guard"), [(REFUSED_BY_WORDS, "blocklist"), (REFUSED_BY_MODEL, "llama_guard_3")]
)
@pytest.mark.parametrize("kind", ["text2world", "video2world", "prompted"])
def test_a_refused_prompt(
    kind: str, prompt: str, guard: str, command: Command, clip: Path, tmp_path: Path
) -> None:
    result = command(*words_of(prompt, clip)[kind])
    assert result.exit_code == 3, result.stderr
    last = result.stderr.splitlines()[-1]
    assert f"guardrail {guard} refused the prompt" in last
    assert REFUSED_WORD not in result.stderr
    assert UNSAFE not in result.stderr
    assert not [*tmp_path.glob("out/*")]
    assert "denoising" not in result.stderr
    assert "drawing" not in result.stderr


def test_a_refused_upsampled_prompt(
    command: Command, own_guarded: Path, clip: Path, tmp_path: Path
) -> None:
    add_upsampler(own_guarded, describes=True, answer=f"a hall with a {UNSAFE}")
    result = command(*CONTINUE, clip, checkpoint_dir=own_guarded)
    assert result.exit_code == 3, result.stderr
    assert "refused the upsampled prompt" in result.stderr.splitlines()[-1]


@pytest.fixture
def unsafe_frames(own_guarded: Path) -> Path:
    folder = own_guarded / GUARDRAILS / "video_content_safety_filter"
    write_classifier(folder / "safety_filter.pt", UNSAFE_CLASS)
    return own_guarded


def test_a_refused_video(command: Command, unsafe_frames: Path, clip: Path, tmp_path: Path) -> None:
    for kind, words in words_of(PROMPT, clip).items():
        more = ("--preview_every", 1) if kind == "text2world" else ()
        result = command(*words, *more, checkpoint_dir=unsafe_frames)
        assert result.exit_code == 3, result.stderr
        last = result.stderr.splitlines()[-1]
        assert "guardrail video_content_safety_filter refused the video" in last
        assert "(Violence)" in last
        assert not [*tmp_path.glob("out/*")]


def test_a_batch_goes_on(command: Command, tmp_path: Path) -> None:
    batch = jsonl(tmp_path, *({"prompt": p} for p in (REFUSED_BY_WORDS, PROMPT, REFUSED_BY_MODEL)))
    result = command("diffusion", "text2world", "--batch_input_path", batch)
    assert result.exit_code == 3, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"1.mp4", "1.txt", "1.json"}
    assert "1 of 3 videos are in" in result.stdout
    refusals = [line for line in result.stderr.splitlines() if "refused the prompt" in line]
    assert len(refusals) == 2
    assert result.stderr.endswith("worldline: 2 of 3 inputs were refused: 2 by the prompt\n")
    assert REFUSED_WORD not in result.stderr
    assert UNSAFE not in result.stderr


def test_predict2_5_refuses(flow: Command, tmp_path: Path) -> None:
    for prompt, guard in ((REFUSED_BY_WORDS, "blocklist"), (REFUSED_BY_MODEL, "qwen3guard")):
        result = flow(prompts=[prompt])
        assert result.exit_code == 3, result.stderr
        assert f"guardrail {guard} refused the prompt" in result.stderr.splitlines()[-1]
    prompts = (REFUSED_BY_WORDS, PROMPT, REFUSED_BY_MODEL)
    result = flow("--no-keep-going", prompts=prompts)
    assert result.exit_code == 3, result.stderr
    assert not [*tmp_path.glob("out/*")]
    result = flow(prompts=prompts)
    assert result.exit_code == 3, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"1.mp4", "1.txt", "1.json"}
    assert "1 of 3 videos are in" in result.stdout
    assert result.stderr.count("refused the prompt") == 2
    for word in (REFUSED_WORD, UNSAFE):
        assert word not in result.stderr


@pytest.mark.parametrize(("kind", "status"), [(UNSAFE_CLASS, 0), (UNSAFE_TO_FLOW, 3)])
def test_which_videos_predict2_5_refuses(
    kind: int, status: int, flow: Command, own_guarded: Path, tmp_path: Path
) -> None:
    """Violence passes, as released."""
    folder = own_guarded / GUARDRAILS / "video_content_safety_filter"
    write_classifier(folder / "safety_filter.pt", kind)
    result = flow(checkpoint_dir=own_guarded)
    assert result.exit_code == status, result.stderr
    if status:
        last = result.stderr.splitlines()[-1]
        assert "guardrail video_content_safety_filter refused the video" in last
        assert not [*tmp_path.glob("out/*")]


def batch_words(clip: Path, folder: Path) -> tuple[object, ...]:
    """A command for three inputs, of which the second is refused."""
    prompts = (PROMPT, REFUSED_BY_MODEL, PROMPT)
    batch = jsonl(folder, *({"visual_input": str(clip), "prompt": p} for p in prompts))
    return (*PROMPTED[:-1], "--batch_input_path", batch)


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_batch_in_step_goes_on(
    at_once: int, command: Command, clip: Path, tmp_path: Path
) -> None:
    result = command(*batch_words(clip, tmp_path), "--batch_size", at_once)
    assert result.exit_code == 3, result.stderr
    names = {f"{n}.{end}" for n in "02" for end in ("mp4", "txt", "json")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in "02":
        assert [guard for guard, _ in ran(report_of(tmp_path, name))] == ALL
    assert "one by one" not in result.stderr
    assert result.stderr.count("drawing") == (2 if at_once == 1 else 1)  # not for the refused one
    assert "2/3: guardrail llama_guard_3 refused the prompt" in result.stderr


def test_a_video_refused_in_step_is_not_made_again(
    command: Command, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def check(_: FrameFilter, frames: np.ndarray) -> Verdict:
        asked.append(len(frames))
        return Verdict(len(asked) != 2, "", ("Violence",))

    monkeypatch.setattr(FrameFilter, "check", check)
    batch = jsonl(tmp_path, *[{"visual_input": str(clip)}] * 3)
    result = command(*BASE[:-1], "--batch_input_path", batch, "--batch_size", 3)
    assert result.exit_code == 3, result.stderr
    assert "1 of 3 inputs were refused: 1 by the video" in result.stderr
    assert {path.name for path in (tmp_path / "out").glob("*.mp4")} == {"0.mp4", "2.mp4"}
    assert len(asked) == 3


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_stages_of_a_batch_are_counted(
    at_once: int, command: Command, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrameFilter, "check", lambda *_: Verdict(False))
    result = command(*batch_words(clip, tmp_path), "--batch_size", at_once)
    assert result.exit_code == 3, result.stderr
    counts = "3 of 3 inputs were refused: 1 by the prompt, 2 by the video"
    assert result.stderr.endswith(f"worldline: {counts}\n")


# --- in Python


def test_frames_are_not_shown_before_the_check(guarded: Path, clip: Path) -> None:
    for name, options in (
        (MODEL, {"disable_diffusion_decoder": True}),
        (VIDEO2WORLD, {"disable_prompt_upsampler": True}),
        (POST.name, {}),
    ):
        world = worldline.load(name, guarded, **options)  # type: ignore[arg-type]
        given: dict[str, Any] = {} if name == MODEL else {"prompt": PROMPT, "preview_every": 1}
        if name == POST.name:
            given |= SMALL
        steps = [*world.stream(clip, **given)]
        assert all(step.frames is None and step.preview is None for step in steps[:-1])
        assert steps[-1].video is not None
        assert "guardrail" in {step.kind for step in steps}


def test_faces_are_blurred(
    guarded: Path, clip: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from worldline.guardrails.faces import FaceBlur

    def apply(_: FaceBlur, frames: np.ndarray) -> tuple[np.ndarray, int]:
        return np.zeros_like(frames), 7

    monkeypatch.setattr(FaceBlur, "apply", apply)
    world = worldline.load(MODEL, guarded, disable_diffusion_decoder=True)
    video = world.generate(clip)
    assert not video.frames.any()
    assert video.report["guardrail_checks"][-1]["verdict"] == "7 regions changed"
    video.save(tmp_path / "a.mkv")
    assert read_video(tmp_path / "a.mkv").frames.max() < 20


def test_a_refusal_is_an_exception(guarded: Path) -> None:
    world = worldline.load(TEXT2WORLD, guarded, disable_prompt_upsampler=True)
    with pytest.raises(GuardrailRefusal) as refusal:
        world.generate(prompt=REFUSED_BY_WORDS)
    assert refusal.value.stage == "prompt"
    assert refusal.value.exit_code == 3
    assert world.generate(prompt=PROMPT, num_steps=1).report["guardrail"] == "Predict1"
    flow = worldline.load(POST.name, guarded)
    with pytest.raises(GuardrailRefusal):
        flow.generate(prompt=REFUSED_BY_MODEL, **SMALL)
    assert flow.generate(prompt=PROMPT, **SMALL).report["guardrail"] == "predict2.5"


def test_a_refusal_of_several_names_their_stages(
    guarded: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = worldline.load(AR_VIDEO2WORLD, guarded, disable_diffusion_decoder=True)
    assert isinstance(world, AutoregressiveWorld)

    def stage(*prompts: str) -> str:
        with pytest.raises(GuardrailRefusal) as refusal:
            list(world.stream_batch([clip] * 3, [{"prompt": prompt} for prompt in prompts]))
        return refusal.value.stage

    assert stage(PROMPT, REFUSED_BY_WORDS, REFUSED_BY_MODEL) == "prompt"
    monkeypatch.setattr(FrameFilter, "check", lambda *_: Verdict(False))
    assert stage(PROMPT, REFUSED_BY_WORDS, PROMPT) == "prompt and video"
    assert stage(PROMPT, PROMPT, PROMPT) == "video"


def test_a_guard_that_fails_lets_nothing_pass(
    guarded: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_: FrameFilter, __: np.ndarray) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(FrameFilter, "check", check)
    world = worldline.load(MODEL, guarded, disable_diffusion_decoder=True)
    with pytest.raises(RuntimeError, match="broken"):
        world.generate(clip)


def test_offloaded_networks_visit_the_device(
    guarded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = worldline.load(
        TEXT2WORLD, guarded, offload_guardrail_models=True, offload_prompt_upsampler=True
    )
    visits: list[str] = []
    from worldline.parallel.offload import Part

    on_device = Part.on_device

    def watched(part: Part[Any]) -> Any:
        networks = part.module if isinstance(part.module, nn.ModuleList) else [part.module]
        visits.extend(type(network).__name__ for network in networks)
        return on_device(part)

    monkeypatch.setattr(Part, "on_device", watched)
    loaded.generate(prompt=PROMPT, num_steps=1)
    seen = [name for name in visits if name not in ("DiT", "CosmosTokenizer", "T5Encoder")]
    assert seen == [
        *("LlamaForCausalLM", "MistralForCausalLM", "LlamaForCausalLM"),
        *("SiglipVisionModel", "FrameClassifier", "RetinaFace"),
    ]


@pytest.mark.parametrize("name", [MODEL, TEXT2WORLD, POST.name])
def test_a_visit_is_planned(name: str, guarded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No world is read where the largest guard finds no room beside it."""
    room = Memory(10**12, 10**12)
    monkeypatch.setattr(machine, "host_memory", lambda: room)
    worldline.load(name, guarded)
    monkeypatch.setattr(Guardrails, "offloaded_bytes", room.free)
    with pytest.raises(
        InsufficientMemoryError, match=r"; a guardrail holds 1000\.0 GB as it looks"
    ):
        worldline.load(name, guarded)


def test_guardrails_of_predict2_5_are_offloaded_by_default(
    guarded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def load(*_: object, offload: bool, **__: object) -> Guardrails:
        seen.append(offload)
        return Guardrails()

    monkeypatch.setattr(guardrails, "load", load)
    worldline.load(POST.name, guarded)
    worldline.load(POST.name, guarded, offload_guardrail_models=False)
    assert seen == [True, False]


def test_embeddings_have_no_words_to_check(
    guarded: Path, clip: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warning = "no guardrail checks the prompt: its embedding is given"
    world = worldline.load(AR_VIDEO2WORLD, guarded, disable_diffusion_decoder=True)
    width = world.parts.config.context_width  # type: ignore[union-attr]
    given = np.zeros((3, width), np.float32)
    video = world.generate(clip, prompt_embeddings=given)
    assert warning in caplog.text
    assert [check["guard"] for check in video.report["guardrail_checks"]] == ALL[2:]
    caplog.clear()  # words beside it are checked, and do not decide
    assert world.generate(clip, prompt=PROMPT, prompt_embeddings=given).report["guardrail_checks"]
    assert warning in caplog.text
    flow = worldline.load(POST.name, guarded)
    one = {"prompt_embeddings": np.zeros((3, FLOW_CONFIG.feature_width), np.float32)}
    for prompt, guards in ((None, OF_FLOW[2:]), (PROMPT, OF_FLOW)):
        caplog.clear()
        report = flow.generate(prompt=prompt, **one, **{**SMALL, "guidance": 0}).report
        assert warning in caplog.text
        assert [check["guard"] for check in report["guardrail_checks"]] == guards
