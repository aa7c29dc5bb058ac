"""`worldline generate WORLD [INPUT]`: one command for every family, with each world's options."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from worldline import locate
from worldline.video.read import probe

from ..conftest import MODEL, frames_of
from ..tiny_decoder import VIDEO2WORLD as PROMPTED
from ..tiny_diffusion import VIDEO2WORLD
from .conftest import Make, Run
from .results import check_refused

FLAGS = ("--disable_guardrail", "--disable_diffusion_decoder")


@pytest.fixture
def generate(run: Run, whole_world: Path) -> Make:
    """Run `worldline generate WORLD …` on autoregressive worlds, by the tokenizer alone."""

    def call(world: str, *words: object) -> Any:
        return run("generate", world, *words, "--checkpoint_dir", whole_world, *FLAGS)

    return call


@pytest.mark.parametrize(
    ("world", "words"),
    [
        (MODEL, ["CLIP", "--seed", 3]),
        (MODEL, ["--seed=3", "CLIP", "--num-input-frames", 1]),
        (MODEL, ["IMAGE"]),
        (PROMPTED, ["CLIP", "--prompt", "A ball rolls."]),
    ],
)
def test_it_makes_what_the_released_command_makes(
    world: str,
    words: list[Any],
    generate: Make,
    base: Make,
    ar_video2world: Make,
    clip: Path,
    image: Path,
    tmp_path: Path,
) -> None:
    media = {"CLIP": clip, "IMAGE": image}
    output = tmp_path / "new" / "a.webm"
    result = generate(world, *(media.get(str(word), word) for word in words), "-o", output)
    assert result.exit_code == 0, result.stderr
    assert str(output) in result.stdout
    assert probe(output).frames == 33
    [source] = [word for word in words if word in media]
    kind = "image" if source == "IMAGE" else "video"
    old, kind = (base, kind) if world == MODEL else (ar_video2world, f"text_and_{kind}")
    others = [word for word in words if word != source]
    flags = ("--input_image_or_video_path", media[source], "--input_type", kind)
    released = old(*flags, *others, "--disable_diffusion_decoder")
    assert released.exit_code == 0, released.stderr
    assert frames_of(output) == frames_of(tmp_path / "out" / "output.mp4")


def test_a_prompt_alone_and_resume(run: Run, tiny_diffusion: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.mp4"
    words = ("--checkpoint_dir", tiny_diffusion, "--prompt", "A ball.", "--num_steps", 2)
    guards = ("--disable_guardrail", "--disable_prompt_upsampler", "--resume", "-o", output)
    result = run("generate", "Cosmos-Predict1-7B-Text2World", *words, *guards)
    assert result.exit_code == 0, result.stderr
    assert output.with_suffix(".txt").read_text() == "A ball."
    again = run("generate", "Cosmos-Predict1-7B-Text2World", *words, *guards)
    assert again.stdout == f"1 of 1 videos are in {tmp_path}: 0 made now, 1 there before\n"


def test_the_help_has_the_world_s_own_defaults(
    run: Run, tiny_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(shutil.copytree(tiny_diffusion, tmp_path / "worlds"))
    path = root / VIDEO2WORLD / "config.json"
    settings = json.loads(path.read_text())
    own = {"num_steps": 17, "guidance": 2.5, "rotary_precision": "float32"}
    path.write_text(json.dumps({**settings, **own}))
    monkeypatch.setattr(locate, "BUNDLED", root)
    for words in ((f"tiny-{VIDEO2WORLD}",), (VIDEO2WORLD, f"--checkpoint-dir={root}")):
        result = run("generate", *words, "--help")
        assert result.exit_code == 0, result.stderr
        text = " ".join(result.stdout.split())
        assert words[0] in text
        for field, default in {**own, "seed": 1}.items():
            described = text.split(f"--{field} ")[1].split(" --")[0]
            assert described.endswith(f"[default: {default}]")
        assert "--disable_prompt_upsampler" in text
        assert "--temperature" not in text  # of another family
    assert "WORLD" in run("generate", "--help").stdout


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("2B/pre-trained", "--schedule"),
        ("Cosmos-1.0-Diffusion-14B-Text2World", "--rotary_precision"),
        ("Cosmos-Predict1-12B", "--rollout"),
    ],
)
def test_the_help_of_a_released_model_that_is_not_here(
    name: str, flag: str, run: Run, tmp_path: Path
) -> None:
    words = ("generate", name, "--checkpoint_dir", tmp_path)
    result = run(*words, "--help")
    assert result.exit_code == 0, result.stderr
    assert flag in result.stdout
    assert run(*words).exit_code == 2


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        (["Nowhere", "CLIP"], f"Nowhere {MODEL}"),
        (["tiny-Nowhere"], "tiny-Nowhere"),
        ([f"tiny-{MODEL[:-1]}", "--help"], f"no bundled model tiny-{MODEL}"),
        ([MODEL, "CLIP", "--guidance", 3], "--guidance"),
        ([MODEL, "CLIP", "--temperatur", 3], "--temperature"),
        ([MODEL, "CLIP", "CLIP"], "extra argument"),
        ([MODEL], "no input"),
        ([MODEL, "nowhere.mp4"], "nowhere.mp4: no such file"),
        ([MODEL, "CLIP", "--prompt", "x"], f"{MODEL} base model"),
        ([MODEL, "CLIP", "-o", "a.avi"], "a.avi .mp4 .mov"),
        ([MODEL, "CLIP", "-o", "CLIP"], "clip.mp4 is an input"),
        ([PROMPTED, "CLIP"], f"{PROMPTED} prompt"),
    ],
)
@pytest.mark.usefixtures("forbid_weights")
def test_wrong_words(words: list[Any], mentioned: str, generate: Make, clip: Path) -> None:
    check_refused(
        generate(*(clip if word == "CLIP" else word for word in words)), mentioned, clip.parent
    )
