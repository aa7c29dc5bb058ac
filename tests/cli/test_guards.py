"""Guardrails and prompt upsamplers in the commands: on, off, missing, refusing; one and many."""

from __future__ import annotations

import os
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
from worldline import guardrails
from worldline.errors import GuardrailRefusal, InsufficientMemoryError
from worldline.guardrails import language
from worldline.guardrails.base import Guardrails, Verdict
from worldline.guardrails.faces import FaceBlur
from worldline.guardrails.frames import FrameFilter
from worldline.guards import Guards
from worldline.memory import Memory
from worldline.parallel.offload import Offloadable

from ..conftest import MODEL
from ..guardrails.networks import write_classifier
from ..tiny_decoder import VIDEO2WORLD as AR_VIDEO2WORLD
from ..tiny_diffusion import CONTEXT_WIDTH, TEXT2WORLD, VIDEO2WORLD
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
from .results import check_refused, files_in, report_of, videos, write_lines

PROMPT = f"a red ball rolls to the {SAFE}"
REFUSED_BY_WORDS = f"a {REFUSED_WORD} and a {SAFE}"
REFUSED_BY_MODEL = f"the ball hits the {UNSAFE}"
ALL = ["blocklist", "llama_guard_3", "video_content_safety_filter", "face_blur_filter"]
OF_FLOW = ["blocklist", "qwen3guard", "video_content_safety_filter", "face_blur_filter"]
UNSAFE_CLASS, UNSAFE_TO_FLOW = 2, 1
Command = Callable[..., Result]

TEXT = ("diffusion", "text2world", "--prompt")
CONTINUE = ("diffusion", "video2world", "--input_image_or_video_path")
BASE = ("autoregressive", "base", "--disable_diffusion_decoder", "--input_image_or_video_path")
PROMPTED = ("autoregressive", "video2world", *BASE[2:])


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
    """`flow("--seed", 1, prompts=…)`: `worldline predict2.5`; samples are 0, 1, …."""

    def call(
        *words: object, prompts: Sequence[str] = (PROMPT,), checkpoint_dir: Path = guarded
    ) -> Result:
        samples = [
            {"name": str(number), "inference_type": "text2world", "prompt": prompt}
            for number, prompt in enumerate(prompts)
        ]
        file = write_lines(tmp_path / "samples.jsonl", *samples)
        fixed = ("-i", file, "-o", tmp_path / "out", "--checkpoint_dir", checkpoint_dir)
        size = ("--resolution", "32,48", "--num_output_frames", 9, "--num_steps", 1)
        return run_words(("predict2.5", *fixed, *size, *words))

    return call


def ran(report: dict[str, Any]) -> list[tuple[str, str]]:
    return [(check["guard"], check["subject"]) for check in report["guardrail_checks"]]


def guards_of(report: dict[str, Any]) -> list[str]:
    return [guard for guard, _ in ran(report)]


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
    video = f"video of {report['request']['num_video_frames']} frames"
    assert ran(report) == [
        ("blocklist", "prompt"),
        ("llama_guard_3", "prompt"),
        ("blocklist", "upsampled prompt"),
        ("llama_guard_3", "upsampled prompt"),
        ("video_content_safety_filter", video),
        ("face_blur_filter", video),
    ]
    verdicts = [check["verdict"] for check in report["guardrail_checks"]]
    assert set(verdicts[:-1]) == {"safe"}
    assert "regions changed" in verdicts[-1]
    assert (report["guardrail"], report["guardrail_off"]) == ("Predict1", None)
    assert (report["request"]["prompt"], report["prompt"]) == (PROMPT, LONG)
    assert (report["prompt_upsampler"], report["prompt_upsampler_ran"]) == (LENGTHENS, True)
    assert (tmp_path / "out" / "output.txt").read_text() == LONG
    stages = [stage["name"] for stage in report["run"]["stages"]]
    assert stages[:2] == ["guardrail", "upsample"]
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
    subject = "upsampled prompt"
    assert ran(report)[:2] == [("blocklist", subject), ("llama_guard_3", subject)]
    assert (tmp_path / "out" / "output.txt").read_text() == CAPTION


def test_video2world_uses_a_prompt_that_is_given(
    command: Command, clip: Path, own_guarded: Path, tmp_path: Path
) -> None:
    shutil.rmtree(own_guarded / DESCRIBES)  # it is not even looked for
    result = command(*CONTINUE, clip, "--prompt", PROMPT, checkpoint_dir=own_guarded)
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path)
    assert (report["prompt"], report["prompt_upsampler_ran"]) == (PROMPT, False)


def test_a_batch_with_prompts_and_without(command: Command, clip: Path, tmp_path: Path) -> None:
    visual = {"visual_input": str(clip)}
    batch = write_lines(tmp_path / "b.jsonl", visual, {**visual, "prompt": PROMPT})
    words = ("diffusion", "video2world", "--batch_input_path", batch)
    result = command(*words)
    assert result.exit_code == 0, result.stderr
    assert [report_of(tmp_path, n)["prompt"] for n in "01"] == [CAPTION, PROMPT]
    assert command(*words, "--resume").stderr.count("is finished") == 2
    again = command(*words, "--resume", "--disable_guardrail")
    assert again.stderr.count("made again") == 2


def test_autoregressive_base_checks_the_video_alone(
    command: Command, clip: Path, own_guarded: Path, tmp_path: Path
) -> None:
    """Its guardrails may lie elsewhere, and need no language model."""
    shutil.rmtree(own_guarded / language.LLAMA_GUARD_3.released)
    (own_guarded / GUARDRAILS).rename(tmp_path / "elsewhere")
    words = (*BASE, clip, "--guardrail_dir", tmp_path / "elsewhere")
    result = command(*words, checkpoint_dir=own_guarded)
    assert result.exit_code == 0, result.stderr
    assert guards_of(report_of(tmp_path)) == ALL[2:]


@pytest.mark.parametrize("decoder", [True, False])
def test_autoregressive_video2world(
    decoder: bool, command: Command, clip: Path, tmp_path: Path
) -> None:
    words = words_of(PROMPT, clip)["prompted"]
    result = command(*(word for word in words if not (decoder and word == BASE[2])))
    assert result.exit_code == 0, result.stderr
    assert guards_of(report_of(tmp_path)) == ALL


def test_predict2_5(flow: Command, tmp_path: Path) -> None:
    result = flow()
    assert result.exit_code == 0, result.stderr
    report = report_of(tmp_path, "0")
    subjects = ["prompt"] * 2 + ["video of 9 frames"] * 2
    assert ran(report) == [*zip(OF_FLOW, subjects, strict=True)]
    assert (report["guardrail"], report["guardrail_off"]) == ("predict2.5", None)
    assert [stage["name"] for stage in report["load"]["stages"]] == ["load guardrails", "load"]
    assert report["run"]["stages"][0]["name"] == "guardrail"
    assert f"guardrails: {', '.join(OF_FLOW)}" in result.stderr
    assert "no effect" not in result.stderr  # of what nobody asked for
    result = flow("--offload_guardrail_models", "--preview_every", 1)
    for flag in ("--offload_guardrail_models", "--preview_every"):
        assert any(flag in line and "no effect" in line for line in result.stderr.splitlines())


# --- off


def test_disabled_is_reported(command: Command, flow: Command, tmp_path: Path, clip: Path) -> None:
    ignored = ("--offload-guardrail-models", "--guardrail_dir", "x")
    for result, name in (
        (command(*TEXT, REFUSED_BY_WORDS, "--disable_guardrail", *ignored), "output"),
        (command(*BASE, clip, "--disable_guardrail", *ignored), "output"),
        (flow("--disable-guardrails", *ignored, prompts=[REFUSED_BY_WORDS]), "0"),
    ):
        assert result.exit_code == 0, result.stderr
        assert "NVIDIA Open Model License" in result.stderr
        for flag in ("offload_guardrail_models", "guardrail_dir"):
            assert f"--{flag} has no effect: no guardrail runs" in result.stderr
        report = report_of(tmp_path, name)
        assert (report["guardrail"], report["guardrail_off"]) == (None, "disabled by the user")
        assert report["guardrail_checks"] == []
    result = flow("--disable_guardrails", "--resume", prompts=[REFUSED_BY_WORDS])
    assert "is finished" in result.stderr
    result = flow("--resume", prompts=[REFUSED_BY_WORDS])
    assert "made again" in result.stderr
    assert result.exit_code == 3


def test_bundled_models_have_none(
    flow: Command, own_predict2_5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless they are insisted on."""
    monkeypatch.setattr(worldline.locate, "BUNDLED", own_predict2_5)
    folder = own_predict2_5 / Path(POST.repository).name
    (folder / "config.json").write_text("{}")  # what a bundled world is known by
    words = ("--model", f"tiny-{folder.name}", "--offload_guardrail_models")
    result = flow(*words, prompts=[REFUSED_BY_WORDS], checkpoint_dir=tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "--offload_guardrail_models has no effect: no guardrail runs" in result.stderr
    report = report_of(tmp_path, "0")
    assert report["guardrail_off"] == "bundled models have none"
    assert report["prompt_upsampler"] is None
    result = flow(*words, "--no-disable-guardrails", checkpoint_dir=tmp_path)
    assert result.exit_code == 2
    assert "nvidia/Cosmos-Guardrail1" in result.stderr


# --- missing, broken


def test_a_broken_guardrail_is_named(flow: Command, own_guarded: Path, tmp_path: Path) -> None:
    """Of a file with the released size the hash is compared, too."""
    folder = own_guarded / GUARDRAILS
    classifier = folder / "video_content_safety_filter" / "safety_filter.pt"
    added = folder / "blocklist" / "custom" / "second.12ab34cd.incomplete"
    added.write_text("a\n")
    for path in (classifier, added):
        if path == classifier:
            path.write_bytes(b"x" * 2_906_156)
        result = flow(checkpoint_dir=own_guarded)
        assert result.exit_code == 2, result.stderr
        assert str(path) in result.stderr
        assert not (tmp_path / "out").exists()
        write_classifier(classifier)


def test_look_alikes_are_refused(flow: Command, tmp_path: Path) -> None:
    wide = "".join(chr(ord(c) + 0xFEE0) for c in REFUSED_WORD)
    result = flow(prompts=[f"caf\N{LATIN SMALL LETTER E WITH ACUTE} {SAFE}", f"{wide} {SAFE}"])
    assert result.exit_code == 3, result.stderr
    assert "blocklist refused the prompt" in result.stderr
    assert wide not in result.stderr
    assert files_in(tmp_path / "out") == videos("0")


@pytest.mark.usefixtures("forbid_weights")
@pytest.mark.parametrize(
    ("lost", "message", "kinds"),
    [
        (
            GUARDRAILS,
            "nvidia/Cosmos-Guardrail1",
            ("text2world", "video2world", "prompted", "base", "predict2.5"),
        ),
        (
            language.LLAMA_GUARD_3.released,
            "meta-llama/Llama-Guard-3-8B",
            ("text2world", "video2world", "prompted"),
        ),
        (language.QWEN3GUARD.released, "Qwen/Qwen3Guard-Gen-0.6B", ("predict2.5",)),
        (f"{GUARDRAILS}/blocklist", "blocklist", ("prompted", "predict2.5")),
        (f"{GUARDRAILS}/face_blur_filter", "Resnet50_Final.pth", ("base", "predict2.5")),
    ],
)
def test_a_missing_guardrail_stops_everything(
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
            flag, fetch = "disable_guardrails", "Cosmos-Guardrail1 Qwen3Guard-Gen-0.6B"
        else:
            result = command(*words_of(PROMPT, clip)[kind], checkpoint_dir=own_guarded)
            flag, fetch = "disable_guardrail", "guardrails"
        mentioned = f"{message} --{flag} worldline checkpoints download {fetch}"
        check_refused(result, mentioned, tmp_path)


def test_a_missing_upsampler(
    command: Command, own_guarded: Path, clip: Path, tmp_path: Path
) -> None:
    for name in (LENGTHENS, DESCRIBES):
        shutil.rmtree(own_guarded / name)
    mentioned = "--disable_prompt_upsampler download Cosmos-Predict1-7B-"
    for words in ((*TEXT, PROMPT), (*CONTINUE, clip)):
        check_refused(command(*words, checkpoint_dir=own_guarded), mentioned, tmp_path)
    result = command(*TEXT, PROMPT, "--prompt_upsampler_dir", "x", checkpoint_dir=own_guarded)
    check_refused(result, "--prompt_upsampler_dir", tmp_path)


# --- refusing


def check_guardrail(result: Result, guard: str, subject: str, folder: Path) -> None:
    """Fail unless a guardrail refused something, and nothing was made or quoted."""
    assert result.exit_code == 3, result.stderr
    assert f"guardrail {guard} refused the {subject}" in result.stderr.splitlines()[-1]
    for word in (REFUSED_WORD, UNSAFE):
        assert word not in result.stderr
    assert not [*folder.glob("out/*")]


@pytest.mark.parametrize(
    ("prompt", "guard"), [(REFUSED_BY_WORDS, "blocklist"), (REFUSED_BY_MODEL, "llama_guard_3")]
)
@pytest.mark.parametrize("kind", ["text2world", "video2world", "prompted"])
def test_a_refused_prompt(
    kind: str, prompt: str, guard: str, command: Command, clip: Path, tmp_path: Path
) -> None:
    result = command(*words_of(prompt, clip)[kind])
    check_guardrail(result, guard, "prompt", tmp_path)
    assert "denoising" not in result.stderr
    assert "drawing" not in result.stderr


def test_a_refused_upsampled_prompt(
    command: Command, own_guarded: Path, clip: Path, tmp_path: Path
) -> None:
    add_upsampler(own_guarded, describes=True, answer=f"a hall with a {UNSAFE}")
    result = command(*CONTINUE, clip, checkpoint_dir=own_guarded)
    check_guardrail(result, "llama_guard_3", "upsampled prompt", tmp_path)


def test_a_refused_video(command: Command, own_guarded: Path, clip: Path, tmp_path: Path) -> None:
    folder = own_guarded / GUARDRAILS / "video_content_safety_filter"
    write_classifier(folder / "safety_filter.pt", UNSAFE_CLASS)
    for kind, words in words_of(PROMPT, clip).items():
        more = ("--preview_every", 1) if kind == "text2world" else ()
        result = command(*words, *more, checkpoint_dir=own_guarded)
        check_guardrail(result, "video_content_safety_filter", "video", tmp_path)
        assert "(Violence)" in result.stderr.splitlines()[-1]


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
        check_guardrail(result, "video_content_safety_filter", "video", tmp_path)


@pytest.mark.parametrize("family", ["diffusion", "predict2.5"])
def test_a_batch_goes_on(family: str, command: Command, flow: Command, tmp_path: Path) -> None:
    prompts = (REFUSED_BY_WORDS, PROMPT, REFUSED_BY_MODEL)
    if family == "diffusion":
        batch = write_lines(tmp_path / "b.jsonl", *({"prompt": prompt} for prompt in prompts))
        result = command("diffusion", "text2world", "--batch_input_path", batch)
    else:
        first = flow("--no-keep-going", prompts=prompts)
        check_guardrail(first, "blocklist", "prompt", tmp_path)
        result = flow(prompts=prompts)
    assert result.exit_code == 3, result.stderr
    assert files_in(tmp_path / "out") == videos("1")
    assert "1 of 3 videos are in" in result.stdout
    assert result.stderr.count("refused the prompt") == 2
    assert result.stderr.endswith("worldline: 2 of 3 inputs were refused, by prompt\n")
    for word in (REFUSED_WORD, UNSAFE):
        assert word not in result.stderr


def batch_words(clip: Path, folder: Path) -> tuple[object, ...]:
    """A command for three inputs, of which the second is refused."""
    lines = [{"visual_input": str(clip), "prompt": p} for p in (PROMPT, REFUSED_BY_MODEL, PROMPT)]
    return (*PROMPTED[:-1], "--batch_input_path", write_lines(folder / "b.jsonl", *lines))


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_batch_in_step_goes_on(
    at_once: int, command: Command, clip: Path, tmp_path: Path
) -> None:
    result = command(*batch_words(clip, tmp_path), "--batch_size", at_once)
    assert result.exit_code == 3, result.stderr
    assert files_in(tmp_path / "out") == videos("0", "2")
    for name in "02":
        assert guards_of(report_of(tmp_path, name)) == ALL
    assert "one by one" not in result.stderr
    assert result.stderr.count("drawing") == (2 if at_once == 1 else 1)  # not for the refused one
    assert "2/3: guardrail llama_guard_3 refused the prompt" in result.stderr


def test_a_video_refused_in_step_is_not_made_again(
    command: Command, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def check(_: FrameFilter, frames: np.ndarray) -> Verdict:
        asked.append(len(frames))
        return Verdict(len(asked) != 2, ("Violence",))

    monkeypatch.setattr(FrameFilter, "check", check)
    batch = write_lines(tmp_path / "b.jsonl", *[{"visual_input": str(clip)}] * 3)
    result = command(*BASE[:-1], "--batch_input_path", batch, "--batch_size", 3)
    assert result.exit_code == 3, result.stderr
    assert "1 of 3 inputs were refused, by video" in result.stderr
    assert {path.name for path in (tmp_path / "out").glob("*.mp4")} == {"0.mp4", "2.mp4"}
    assert len(asked) == 3


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_stages_of_a_batch_are_counted(
    at_once: int, command: Command, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrameFilter, "check", lambda *_: Verdict(False))
    result = command(*batch_words(clip, tmp_path), "--batch_size", at_once)
    assert result.exit_code == 3, result.stderr
    counts = "3 of 3 inputs were refused, by prompt and video"
    assert result.stderr.endswith(f"worldline: {counts}\n")


# --- in Python


def load(name: str, root: Path, **options: Any) -> worldline.World:
    """A world without diffusion decoder or prompt upsampler."""
    own = {MODEL: "disable_diffusion_decoder", AR_VIDEO2WORLD: "disable_diffusion_decoder"}
    own |= dict.fromkeys((TEXT2WORLD, VIDEO2WORLD), "disable_prompt_upsampler")
    plain = {own[name]: True} if name in own else {}
    return worldline.load(name, checkpoint_dir=root, **{**plain, **options})


@pytest.mark.parametrize("name", [MODEL, VIDEO2WORLD, POST.name])
def test_no_frames_leave_before_the_check(name: str, guarded: Path, clip: Path) -> None:
    asked: dict[str, Any] = {} if name == MODEL else {"prompt": PROMPT, "preview_every": 1}
    if name == POST.name:
        asked |= SMALL
    steps = [*load(name, guarded).stream(clip, **asked)]
    assert all(step.frames is None and step.preview is None for step in steps[:-1])
    assert steps[-1].video is not None
    assert "guardrail" in {step.kind for step in steps}


def test_faces_are_blurred(guarded: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(_: FaceBlur, frames: np.ndarray) -> tuple[np.ndarray, int]:
        return np.zeros_like(frames), 7

    monkeypatch.setattr(FaceBlur, "apply", apply)
    video = load(MODEL, guarded).generate(clip)
    assert not video.frames.any()
    assert video.report["guardrail_checks"][-1]["verdict"] == "7 regions changed"


@pytest.mark.parametrize(
    ("name", "size", "release"),
    [(TEXT2WORLD, {"num_steps": 1}, "Predict1"), (POST.name, SMALL, "predict2.5")],
)
def test_a_refusal_is_an_exception(
    name: str, size: dict[str, Any], release: str, guarded: Path
) -> None:
    world = load(name, guarded)
    for prompt in (REFUSED_BY_WORDS, REFUSED_BY_MODEL):
        with pytest.raises(GuardrailRefusal) as refusal:
            world.generate(prompt=prompt, **size)
        assert (refusal.value.stage, refusal.value.exit_code) == ("prompt", 3)
    assert world.generate(prompt=PROMPT, **size).report["guardrail"] == release


def test_a_refusal_of_several_names_their_stages(
    guarded: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = load(AR_VIDEO2WORLD, guarded)

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
    with pytest.raises(RuntimeError, match="broken"):
        load(MODEL, guarded).generate(clip)


def test_offloaded_networks_visit_the_device(
    guarded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("offload_guardrail_models", "offload_prompt_upsampler")
    world = worldline.load(TEXT2WORLD, checkpoint_dir=guarded, **dict.fromkeys(flags, True))
    visits: list[str] = []
    on_device = Offloadable.on_device

    def watched(part: Offloadable[Any], tokens: int | None = None) -> Any:
        networks = part.module if isinstance(part.module, nn.ModuleList) else [part.module]
        visits.extend(type(network).__name__ for network in networks)
        return on_device(part, tokens)

    monkeypatch.setattr(Offloadable, "on_device", watched)
    world.generate(prompt=PROMPT, num_steps=1)
    assert [name for name in visits if name not in ("DiT", "CosmosTokenizer", "T5Encoder")] == [
        *("LlamaForCausalLM", "MistralForCausalLM", "LlamaForCausalLM"),
        *("SiglipVisionModel", "Sequential", "RetinaFace"),
    ]


@pytest.mark.parametrize("name", [MODEL, TEXT2WORLD, POST.name])
def test_a_visit_is_planned(name: str, guarded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No world is read where the largest guard finds no room beside it."""
    room = Memory(10**12, 10**12)
    monkeypatch.setattr("worldline.memory.host_memory", lambda: room)
    load(name, guarded)
    monkeypatch.setattr(Guards, "guardrail_bytes", room.free)
    with pytest.raises(InsufficientMemoryError, match=r"1000\.\d GB"):
        load(name, guarded)


def test_guardrails_of_predict2_5_are_offloaded_by_default(
    guarded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def spy(*_: object, offload: bool, **__: object) -> Guardrails:
        seen.append(offload)
        return Guardrails()

    monkeypatch.setattr(guardrails, "load", spy)
    load(POST.name, guarded)
    load(POST.name, guarded, offload_guardrail_models=False)
    assert seen == [True, False]


@pytest.mark.parametrize(
    ("name", "width", "size", "guards"),
    [
        (AR_VIDEO2WORLD, CONTEXT_WIDTH, {}, ALL),
        (POST.name, FLOW_CONFIG.feature_width, {**SMALL, "guidance": 0}, OF_FLOW),
    ],
)
def test_embeddings_have_no_words_to_check(
    name: str,
    width: int,
    size: dict[str, Any],
    guards: list[str],
    guarded: Path,
    clip: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = load(name, guarded)
    given = np.zeros((3, width), np.float32)
    for prompt, expected in ((None, guards[2:]), (PROMPT, guards)):
        caplog.clear()
        video = world.generate(clip, prompt=prompt, prompt_embeddings=given, **size)
        assert "no guardrail checks the prompt" in caplog.text
        assert guards_of(video.report) == expected


@pytest.mark.parametrize("part", ["blocklist", "classifier", "upsampler"])
def test_resume_knows_changed_guards(
    part: str, command: Command, own_guarded: Path, tmp_path: Path
) -> None:
    words = (*TEXT, f"a {SAFE}", "--resume")
    assert command(*words, checkpoint_dir=own_guarded).exit_code == 0
    assert "is finished" in command(*words, checkpoint_dir=own_guarded).stderr
    folders = {"blocklist": GUARDRAILS, "classifier": GUARDRAILS, "upsampler": LENGTHENS}
    patterns = {"blocklist": "custom/*", "classifier": "safety_filter.pt", "upsampler": "*.json"}
    path = sorted((own_guarded / folders[part]).rglob(patterns[part]))[0]
    status = path.stat()
    path.write_bytes(path.read_bytes() + b"\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert "is made again" in command(*words, checkpoint_dir=own_guarded).stderr
