"""A fine-tune as five trainers save it gives the video of its plain weights, without a conversion.

The tensors are the bundled worlds' with a little noise, as a short training would leave them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

import worldline

from .bad_inputs.cases import AR, BUNDLED, DIT, FLOW, moving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # of `dcp.save`
]
Tensors = dict[str, torch.Tensor]


def plain(tensors: Tensors, folder: Path) -> None:
    torch.save(tensors, folder / "model.pt")


def ddp(tensors: Tensors, folder: Path) -> None:
    """Compiled, then wrapped; beside an optimizer, a step and the arguments of the script."""
    model = {f"module._orig_mod.{name}": value for name, value in tensors.items()}
    moments = {n: {"exp_avg": torch.zeros(3)} for n in range(3)}
    beside = {"args": argparse.Namespace(lr=1e-5, out=PurePosixPath("runs/5"))}
    torch.save(
        {"model": model, "optimizer": {"state": moments}, "step": 500, **beside},
        folder / "checkpoint_500.pth",
    )


def fsdp(tensors: Tensors, folder: Path) -> None:
    """Sharded, with averaged weights; the blocks' activations were recomputed."""
    averaged = {}
    for name, value in tensors.items():
        block, dot, inside = name.partition("layers.0.")
        averaged[f"{block}{dot}_checkpoint_wrapped_module.{inside}" if dot else name] = value
    state = {"net": {name: value + 1 for name, value in tensors.items()}, "net_ema": averaged}
    place = folder / "checkpoints/iter_000000500/model"
    dcp.save(state, checkpoint_id=str(place), no_dist=True)


def lightning(tensors: Tensors, folder: Path) -> None:
    held = {
        "epoch": 1,
        "global_step": 500,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{name}": value for name, value in tensors.items()},
        "callbacks": {"ModelCheckpoint": {"best_model_path": "x", "kth_best": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}],
        "hyper_parameters": {"root": PurePosixPath("data")},
    }
    torch.save(held, folder / "epoch=1-step=500.ckpt")


def comfy(tensors: Tensors, folder: Path) -> None:
    renamed = {
        f"model.diffusion_model.{name.removeprefix('net.')}": value.contiguous()
        for name, value in tensors.items()
    }
    save_file(renamed, folder / "my_world_fp16.safetensors")


Save = Callable[[Tensors, Path], None]


@pytest.fixture(scope="module", params=[FLOW, DIT, AR])
def tuned(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Tensors, dict[str, Any]]:
    """Name and fine-tuned tensors of a world, and the report of a video of their plain form."""
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(BUNDLED / request.param / "model.safetensors")
    for value in tensors.values():
        if value.ndim == 2:
            noise = torch.randn(value.shape, generator=generator)
            value += (0.05 * value.float().std() * noise).to(value.dtype)
    root = tmp_path_factory.mktemp("plain")
    return request.param, tensors, report_of(root, request.param, tensors, plain)


def report_of(root: Path, name: str, tensors: Tensors, save: Save) -> dict[str, Any]:
    """Report of a video of a world whose transformer a trainer saved."""
    for path in BUNDLED.iterdir():
        if path.name != name:
            (root / path.name).symlink_to(path)
    (root / name).mkdir()
    for path in (BUNDLED / name).iterdir():
        if path.name != "model.safetensors":
            (root / name / path.name).symlink_to(path)
    save(tensors, root / name)
    off = {"disable_guardrails" if name == FLOW else "disable_guardrail": True}
    if name != FLOW:
        off["disable_diffusion_decoder" if name == AR else "disable_prompt_upsampler"] = True
    return report_by(worldline.load(root / name, checkpoint_dir=root, device="cpu", **off))


def report_by(world: worldline.World) -> dict[str, Any]:
    """Report of a short video."""
    options: dict[str, Any] = {"seed": 3}
    if not world.name.endswith(AR):
        options |= {"prompt": "a ball", "num_steps": 2, "num_video_frames": 9}
    return world.generate(moving(12, 128, 192), **options).report


@pytest.mark.parametrize("save", [ddp, fsdp, lightning, comfy])
def test_a_trainers_file_gives_the_video_of_its_plain_weights(
    save: Save, tuned: tuple[str, Tensors, dict[str, Any]], tmp_path: Path
) -> None:
    name, tensors, expected = tuned
    report = report_of(tmp_path, name, tensors, save)
    assert report["frames_sha256"] == expected["frames_sha256"]
    off = {"disable_diffusion_decoder": True} if name == AR else {}
    before = report_by(worldline.load(f"tiny-{name}", device="cpu", **off))
    assert before["frames_sha256"] != expected["frames_sha256"], "the fine-tuning shows"
