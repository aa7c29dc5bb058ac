"""Whole chains from folders laid out as each release has them; what is absent is an error."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from worldline import guardrails
from worldline.errors import CheckpointError, GuardrailRefusal
from worldline.guardrails import RELEASES, SIGLIP, language

from .folders import write_blocklist
from .networks import write_classifier, write_retinaface, write_siglip
from .test_language import ANSWERS, write_adapter, write_model

FRAMES = np.random.RandomState(0).randint(0, 256, (4, 32, 48, 3), np.uint8)


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of each part, to be linked into the layouts."""
    root = tmp_path_factory.mktemp("made")
    write_blocklist(root / "blocklist")
    write_classifier(root / "video_content_safety_filter" / "safety_filter.pt")
    write_siglip(root / "siglip")
    write_retinaface(root / "face_blur_filter" / "Resnet50_Final.pth")
    for kind in (language.AEGIS, language.LLAMA_GUARD_3, language.QWEN3GUARD):
        write_model(root / kind.name, kind)
    write_adapter(root / "adapter", 2 * len(ANSWERS["aegis"]) + 2, lora_alpha=0)
    return root


def put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target, dirs_exist_ok=True)


def cached(repository: str) -> str:
    return f"models--{repository.replace('/', '--')}/snapshots/0123abcd"


def parts(made: Path, folder: Path) -> None:
    for name in ("blocklist", "video_content_safety_filter", "face_blur_filter"):
        put(made / name, folder / name)


def lay_out(release: str, made: Path, root: Path, cache: Path) -> None:
    """Lay the files out as a release does below `root`, or in the cache."""
    aegis, llama, qwen = language.AEGIS, language.LLAMA_GUARD_3, language.QWEN3GUARD
    if release == "1.0":
        folder = root / "Cosmos-1.0-Guardrail"
    elif release == "march":
        folder = root / "Cosmos-Predict1-7B-Text2World" / "guardrail"
    elif release == "Predict1":
        folder = root / "nvidia" / "Cosmos-Guardrail1"
    else:
        folder = cache / cached("nvidia/Cosmos-Guardrail1")
    parts(made, folder)
    siglip = cache if release == "predict2.5" else folder / "video_content_safety_filter"
    put(made / "siglip", siglip / cached(SIGLIP))
    if release == "Predict1":
        put(made / llama.name, root / llama.released)
    elif release == "predict2.5":
        put(made / qwen.name, cache / cached(qwen.released))
    else:
        put(made / aegis.name, folder / "aegis" / cached(aegis.released))
        put(made / "adapter", folder / "aegis" / cached(aegis.adapter))


@pytest.mark.parametrize("layout", ["1.0", "march", "Predict1", "predict2.5"])
def test_layouts(layout: str, made: Path, tmp_path: Path, no_cache: Path) -> None:
    lay_out(layout, made, tmp_path / "root", no_cache)
    (tmp_path / "root").mkdir(exist_ok=True)
    release = "Predict1" if layout == "march" else layout
    chain = guardrails.load(release, [tmp_path / "root"])
    asked = {"Predict1": "llama_guard_3", "predict2.5": "qwen3guard"}.get(layout, "aegis")
    assert [guard.name for guard in chain.text] == ["blocklist", asked]
    with pytest.raises(GuardrailRefusal, match="blocklist"):
        chain.check_prompt("a zorbash")
    if asked != "aegis":  # whose model refuses whatever it is asked here
        chain.check_prompt("a kitten")
    with pytest.raises(GuardrailRefusal, match=asked):
        chain.check_prompt("a dagger")
    frames, checks = chain.check_video(FRAMES)
    assert frames.shape == FRAMES.shape
    assert [each["guard"] for each in checks] == ["video_content_safety_filter", "face_blur_filter"]
    assert sum(len(part.module) for part in chain.parts.values()) == 4


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("layout", ["1.0", "Predict1", "predict2.5"])
def test_files_that_decide(
    layout: str, text: bool, made: Path, tmp_path: Path, no_cache: Path
) -> None:
    lay_out(layout, made, tmp_path / "root", no_cache)
    (tmp_path / "root").mkdir(exist_ok=True)
    paths = guardrails.files(layout, [tmp_path / "root"], text=text)
    names = {"/".join(path.parts[-2:]) for path in paths}
    assert {"face_blur_filter/Resnet50_Final.pth", "0123abcd/preprocessor_config.json"} <= names
    assert ("custom/words" in names) == ("english/abbrev_types.txt" in names) == text
    assert ("0123abcd/adapter_config.json" in names) == (text and layout == "1.0")
    assert any(path.name == "tokenizer.json" for path in paths) == text


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("nvidia/Cosmos-Guardrail1", "nvidia/Cosmos-Guardrail1 is missing"),
        ("nvidia/Cosmos-Guardrail1/blocklist", "blocklist"),
        ("meta-llama", "meta-llama/Llama-Guard-3-8B is missing"),
        ("nvidia/Cosmos-Guardrail1/face_blur_filter", "Resnet50_Final.pth is missing"),
        (
            f"nvidia/Cosmos-Guardrail1/video_content_safety_filter/{cached(SIGLIP)}",
            f"{SIGLIP} is missing",
        ),
    ],
)
def test_what_is_absent_is_named(
    lost: str, message: str, made: Path, tmp_path: Path, no_cache: Path
) -> None:
    lay_out("Predict1", made, tmp_path / "root", no_cache)
    shutil.rmtree(tmp_path / "root" / lost)
    with pytest.raises(CheckpointError, match=f"{message}"):
        guardrails.load("Predict1", [tmp_path / "none", tmp_path / "root"])


def test_prompts_that_are_not_checked_need_no_files(
    made: Path, tmp_path: Path, no_cache: Path
) -> None:
    lay_out("Predict1", made, tmp_path / "root", no_cache)
    folder = (tmp_path / "root" / "nvidia" / "Cosmos-Guardrail1").rename(tmp_path / "elsewhere")
    shutil.rmtree(folder / "blocklist")
    chain = guardrails.load("Predict1", [tmp_path], folder=folder, text=False)
    assert [*chain.parts] == ["video_content_safety_filter", "face_blur_filter"]
    with pytest.raises(CheckpointError, match="nowhere"):
        guardrails.load("Predict1", [tmp_path], folder=tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is missing"):
        guardrails.files("Predict1", [tmp_path / "none"])
    assert set(RELEASES) == {"1.0", "Predict1", "predict2.5"}
