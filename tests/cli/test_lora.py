"""Adapters of worlds, from command lines and from Python."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result

import worldline
from worldline.errors import InputError
from worldline.families.predict2_5 import weights as flow_weights
from worldline.families.predict2_5.weights import open_network
from worldline.opening import split_scale
from worldline.weights.checkpoint import open_checkpoint, save
from worldline.weights.networks import open_adapter

from ..adapters import save_inside, write_peft
from ..conftest import MODEL
from ..tiny_predict2_5 import POST, SMALL
from .conftest import Run, run_words
from .results import check_mentions, report_of, write_lines

TEXT = {"inference_type": "text2world", "prompt": "a red ball", "name": "a"}


@pytest.fixture
def flow(tiny_predict2_5: Path, tmp_path: Path) -> Callable[..., Result]:
    """Run `worldline predict2.5` on one sample; outputs go to tmp_path / "out"."""
    file = write_lines(tmp_path / "a.json", TEXT)
    size = ("--resolution", "32,48", "--num_output_frames", 5, "--num_steps", 1)

    def call(*words: object) -> Result:
        fixed = ("--checkpoint_dir", tiny_predict2_5, "-o", tmp_path / "out", "-i", file)
        return run_words(("predict2.5", *fixed, "--disable_guardrails", *size, *words))

    return call


@pytest.fixture
def adapter(tiny_predict2_5: Path, tmp_path: Path) -> Path:
    model = tiny_predict2_5 / Path(POST.repository).name / POST.file
    return write_peft("predict2.5", model, tmp_path / "adapter:2", 0.5)


def frames(result: Result, folder: Path) -> str:
    assert result.exit_code == 0, result.stderr
    return str(report_of(folder, "a")["frames_sha256"])


def test_adapters_of_a_command(flow: Callable[..., Result], adapter: Path, tmp_path: Path) -> None:
    none = frames(flow(), tmp_path)
    assert report_of(tmp_path, "a")["lora"] == []
    assert frames(flow("--lora", f"{adapter}:0"), tmp_path) == none
    once = frames(flow("--lora", adapter), tmp_path)
    assert once != none
    [entry] = report_of(tmp_path, "a")["lora"]
    assert entry["file"] == str(adapter / "adapter_model.safetensors")
    assert (entry["scale"], entry["factors"], entry["ranks"]) == (1, [0.5], [3])
    assert entry["matrices"] == 20

    same = Path(adapter.rename(tmp_path / "moved"))
    source = open_checkpoint(same / "adapter_model.safetensors")
    halves = {name: source.read(name) for name in source.entries}
    kept = flow("--lora", same, "--resume")
    assert "1 there before" in kept.stdout
    changed = flow("--lora", f"{same}:1.5", "--resume")
    assert "made again" in changed.stderr
    assert frames(changed, tmp_path) not in (none, once)
    names = {name: name.removeprefix("base_model.model.") for name in halves if "q_proj" in name}
    save({names[n]: -halves[n] for n in names}, tmp_path / "q.safetensors")
    both = flow("--lora", same, "--lora", tmp_path / "q.safetensors", "--resume")
    assert "made again" in both.stderr
    assert "its file states no scale; 1 is taken" in both.stderr
    assert [entry["matrices"] for entry in report_of(tmp_path, "a")["lora"]] == [20, 4]


def test_an_input_may_follow_an_adapter(
    run: Run, whole_world: Path, image: Path, tmp_path: Path
) -> None:
    """And the adapter is the transformer's, not the diffusion decoder's."""
    write_peft("autoregressive", whole_world / MODEL, tmp_path / "a")
    words = ("--checkpoint_dir", whole_world, "--disable_guardrail", "-o", tmp_path / "x.mp4")
    result = run("generate", MODEL, "--lora", f"{tmp_path / 'a'}:0.5", image, *words)
    assert result.exit_code == 0, result.stderr
    assert f"transformer: LoRA {tmp_path / 'a'}" in result.stderr


@pytest.mark.parametrize(
    ("words", "mentioned"),
    [
        (["nowhere:0.5"], "nowhere --lora"),
        (["ADAPTER:much"], "adapter_model.safetensors:much 'much' no number"),
        (["ADAPTER:nan"], "nan not finite"),
        (["ADAPTER", "ADAPTER:2"], "adapter_model.safetensors merged once"),
        (["OTHER"], "none of its 28 tensors layers.0.attention.wk family autoregressive"),
        (["http://a/b"], "http://a/b URLs"),
        ([""], "--lora empty"),
    ],
)
def test_wrong_adapters(
    words: list[str],
    mentioned: str,
    flow: Callable[..., Result],
    adapter: Path,
    small_world: Path,
    tmp_path: Path,
) -> None:
    names = {"ADAPTER": adapter / "adapter_model.safetensors", "OTHER": tmp_path / "other"}
    if words == ["OTHER"]:
        write_peft("autoregressive", small_world / MODEL, names["OTHER"])
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    result = flow(*(part for word in words for part in ("--lora", word)))
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    check_mentions(result.stderr, mentioned)


def test_a_checkpoint_with_an_adapter_inside(
    run: Run, adapter: Path, own_predict2_5: Path, tmp_path: Path
) -> None:
    """It runs as it is, which `inspect` confirms; its adapter fits other models, too."""
    file = own_predict2_5 / Path(POST.repository).name / POST.file
    network = open_network(file, {})
    halves = {
        name: tuple(half.read() for half in update.halves)
        for name, update in network.match_adapter(open_adapter(adapter)).updates.items()
    }
    weights = {name: network.source.read(name) for name in network.source.entries}
    base = shutil.copy(file, tmp_path / "base.pt")
    save_inside(weights, halves, flow_weights, file)  # type: ignore[arg-type]
    shown = run("checkpoints", "inspect", file)
    assert shown.exit_code == 0, shown.output
    check_mentions(shown.stdout, "LoRA adapters q_proj predict2.5 complete")
    options: dict[str, Any] = {"checkpoint_dir": own_predict2_5, "disable_guardrail": True}
    inside, merged = (
        worldline.load(POST.name, **options, device="cpu"),
        worldline.load(str(base), **options, device="cpu", lora=f"{file}:1"),
    )
    for one, other in zip(
        *(w.parts.transformer.module.parameters() for w in (inside, merged)), strict=True
    ):
        assert torch.equal(one, other)
    notes = [w.opened["transformer"].notes[-1] for w in (inside, merged)]
    assert all("its file states no scale; 1 is taken" in note for note in notes)
    assert "other tensors of its checkpoint are not used" in notes[1]


@pytest.mark.parametrize("form", [str, lambda path: [path], lambda path: (f"{path}:1",), Path])
def test_adapters_in_python(form: Any, tiny_predict2_5: Path, adapter: Path) -> None:
    options: dict[str, Any] = {"checkpoint_dir": tiny_predict2_5, "disable_guardrail": True}
    adapted = worldline.load(POST.name, lora=form(adapter), **options, device="cpu")
    [found] = adapted.opened["transformer"].adapters
    assert found.scale == 1
    request = {**SMALL, "num_video_frames": 5, "num_steps": 1, "prompt": "a ball"}
    video = adapted.generate(**request)
    assert video.report["lora"][0]["factors"] == [0.5]
    if form is Path:
        plain = worldline.load(POST.name, **options, device="cpu").generate(**request)
        assert not np.array_equal(plain.frames, video.frames)


def test_the_last_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text, expected in (
        ("a.safetensors", ("a.safetensors", 1)),
        ("a.safetensors:-0.25", ("a.safetensors", -0.25)),
        ("C:\\loras\\a.safetensors", ("C:\\loras\\a.safetensors", 1)),
        ("C:\\a.safetensors:2", ("C:\\a.safetensors", 2)),
        ("run:3:1e-1", ("run:3", 0.1)),
        (":2", (":2", 1)),
    ):
        assert split_scale(text) == expected
    Path("run:3").mkdir()
    assert split_scale("run:3") == ("run:3", 1)
    Path("run").mkdir()
    assert split_scale("run:3") == ("run", 3)
    with pytest.raises(InputError, match="inf is not finite"):
        split_scale("a:inf")
