"""Files of other trainers, for every network: the same weights, or an error by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from worldline.errors import CheckpointError
from worldline.families.autoregressive.weights import open_network as open_ar
from worldline.families.diffusion.weights import open_network as open_dit
from worldline.families.predict2_5.weights import open_network as open_flow
from worldline.guardrails.frames import frame_classifier, key_map
from worldline.locate import BUNDLED
from worldline.opening import open_model_weights
from worldline.text.reason1 import Reason1Files
from worldline.text.t5 import T5Files
from worldline.tokenizers.cosmos.weights import open_tokenizer
from worldline.tokenizers.wan.weights import open_wan
from worldline.weights.checkpoint import open_checkpoint, save
from worldline.weights.known import find_known
from worldline.weights.networks import read_network

from ..guardrails.networks import write_classifier


def classifier(folder: Path) -> Any:
    return read_network(frame_classifier, folder / "model.pt", key_map)


def read(opened: Any) -> Any:
    return opened if isinstance(opened, torch.nn.Module) else opened.read("cpu", torch.bfloat16)


NETWORKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "Cosmos-Predict1-4B": (open_ar, "model.safetensors"),
    "Cosmos-Predict1-7B-Video2World": (open_dit, "model.safetensors"),
    "Cosmos-Predict2.5-2B": (open_flow, "model.safetensors"),
    "Cosmos-Predict2.5-2B/vae": (open_wan, "diffusion_pytorch_model.safetensors"),
    "Cosmos-Tokenize1-CV8x8x8-720p": (open_tokenizer, "decoder.safetensors"),
    "Cosmos-Tokenize1-DV8x16x16-720p": (open_tokenizer, "encoder.safetensors"),
    T5Files.released: (T5Files.open, "model.safetensors"),
    Reason1Files.released: (Reason1Files.open, "model.safetensors"),
    "classifier": (classifier, "model.pt"),
}
PAIRS = ("decoder", "encoder")  # of which each is a part of a network


@pytest.fixture(params=NETWORKS)
def network(request: Any, tmp_path: Path) -> tuple[Callable[[Path], Any], Path]:
    """Opener of a folder of one's own, and its file of weights."""
    name = request.param
    opener, file = NETWORKS[name]
    folder = tmp_path / "own" / Path(name).name
    if name == "classifier":
        folder.mkdir(parents=True)
        write_classifier(folder / file, 3)
    else:
        shutil.copytree(BUNDLED / name, folder, ignore=shutil.ignore_patterns("vae"))
    return opener, folder / file


def stored(path: Path) -> dict[str, Tensor]:
    source = open_checkpoint(path)
    return {name: source.read(name) for name in source.entries}


@pytest.mark.parametrize("layout", ["ddp", "compiled", "fsdp", "averaged"])
def test_layouts_of_trainers(network: Any, layout: str) -> None:
    opener, path = network
    expected = read(opener(path.parent)).state_dict()
    tensors = stored(path)
    wrong = {name: tensor + 1 for name, tensor in tensors.items()}
    value: Any = {f"module.{name}": tensor for name, tensor in tensors.items()}
    if layout == "compiled":
        value = {name.replace(".", "._orig_mod.", 1): t for name, t in tensors.items()}
    elif layout == "fsdp":
        value = {"model": {f"_fsdp_wrapped_module.{n}": t for n, t in tensors.items()}, "step": 1}
    elif layout == "averaged":
        if path.stem in PAIRS:
            pytest.skip("a file of half a network is no set")
        value = {"model": wrong, "model_ema": {"module": tensors}, "optimizer": {0: wrong}}
    torch.save(value, path)
    again = read(opener(path.parent)).state_dict()
    assert again.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
def test_values_that_are_not_finite(network: Any, bad: float) -> None:
    opener, path = network
    tensors = stored(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[tensors[name].numel() // 3] = bad
    save(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    with pytest.raises(CheckpointError, match=f"{path.stem}.*{name} holds (NaN|Inf)"):
        read(opener(path.parent))


def test_quantised_weights_are_refused_by_header(network: Any) -> None:
    opener, path = network
    tensors = stored(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    torch.save({**tensors, name: tensors[name].char()}, path)
    with pytest.raises(CheckpointError, match=r"torch\.int8"):  # noqa: PT012 - either refuses
        opened = opener(path.parent)
        opened.check()


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["net.action_embedder_B_3D.fc1.weight", "net.x_embedder.proj.1.weight"], "action"),
        (["view_embeddings.weight", "net.x_embedder.proj.1.weight"], "multi-view"),
        (["net.control_embedder.proj.1.weight"], "Cosmos-Transfer"),
        (["module.input_hint_block.0.weight"], "Cosmos-Transfer"),
        (["x_embedder.proj.1.weight", "blocks.0.self_attn.q_proj.weight"], "Cosmos-Predict2"),
        (
            ["patch_embed.proj.weight", "transformer_blocks.0.attn1.norm_q.weight"],
            "Cosmos-Predict2",
        ),
        (["time_projection.1.weight", "blocks.0.cross_attn.norm_q.weight"], "Wan"),
        (["double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["model.diffusion_model.input_blocks.0.0.weight", "x.time_embed.0.weight"], "SDXL"),
        (["quant_conv.weight", "encoder.down.0.block.0.conv1.weight"], "images"),
        (
            ["visual.merger.ln_q.weight", "model.layers.0.self_attn.q_proj.weight"],
            "vision-language",
        ),
        (["model.layers.0.self_attn.q_proj.weight"], "language"),
    ],
)
def test_other_models_are_named(names: list[str], kind: str, tmp_path: Path) -> None:
    save({name: torch.ones(2, 2) for name in names}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=f"model.safetensors: it is an? .*{kind}.*, not a world"
    ):
        open_model_weights(tmp_path)


def test_worlds_are_not_taken_for_others() -> None:
    for manifest in (Path(__file__).parents[1] / "keys").glob("Cosmos-Predict*.json"):
        assert not find_known(json.loads(manifest.read_text())["tensors"]), manifest.name
