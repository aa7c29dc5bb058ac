"""Bytes that autograd keeps of a block, counted, against what the memory plan has for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from worldline.families.autoregressive import weights as autoregressive_weights
from worldline.families.autoregressive.model import (
    ARTransformer,
    ARTransformerConfig,
    make_positions,
)
from worldline.families.diffusion import weights as diffusion_weights
from worldline.families.diffusion.model import DiT, DiTConfig
from worldline.families.predict2_5 import weights as flow_weights
from worldline.families.predict2_5.model import FlowDiT, FlowDiTConfig
from worldline.nn.dit import NoiseLevel
from worldline.nn.modulation import Residual
from worldline.shapes import LatentShape
from worldline.train.lora import add_adapters
from worldline.weights.keymap import LoRARecipe

GRID, LATENTS = LatentShape(2, 12, 16), LatentShape(2, 24, 32)  # of tokens
ROWS, TEXT, RANK = 64, 96, 4  # of a text and its width, of adapters
SIZES: dict[str, Any] = {
    "depth": 2,
    "width": 256,
    "num_heads": 3,
    "head_size": 128,
    "hidden": 640,
}
# a head for each key: a CPU copies those that several queries share
AR = ARTransformerConfig(**SIZES, num_kv_heads=3, vocabulary=64, embedding_rows=64, grid=GRID)
DIT = {**SIZES, "context_width": TEXT, "lora_rank": 16, "max_grid": GRID}
Call = Callable[[], object]


def autoregressive(network: Any, block: Any, dtype: torch.dtype) -> tuple[list[Tensor], Call]:
    """What a layer is called with beside the stream, and the call."""
    config = network.config
    x = torch.randn(1, config.length, config.width, dtype=dtype, requires_grad=True)
    positions = make_positions(config, "cpu", dtype)
    text = torch.randn(1, ROWS, TEXT, dtype=dtype)

    def call() -> Tensor:
        encoded = block.cross_attention and block.cross_attention.encode(text)
        result: Tensor = block(x, positions, None, 0, encoded, None)
        return result

    return [*positions.rotation, text], call


def diffusion(network: Any, block: Any, dtype: torch.dtype) -> tuple[list[Tensor], Call]:
    """As `autoregressive`, of a block behind another one."""
    width = network.config.width
    stream, update = (
        torch.randn(1, GRID.tokens, width, dtype=dtype, requires_grad=True) for _ in range(2)
    )
    noise = NoiseLevel(*(torch.randn(1, n * width, dtype=dtype) for n in (1, 3)))
    # it needs a gradient where the layers that made it are trained
    gates = block.feed_forward.modulation.first.weight.requires_grad
    gate = torch.randn(1, width, dtype=dtype, requires_grad=gates)
    rotation, text = network.rotation(LATENTS, time_scale=None), torch.randn(1, ROWS, TEXT)

    def call() -> Residual:
        encoded = block.cross_attention.body.encode(text.to(dtype))
        result: Residual = block(Residual(stream, update, gate), noise, rotation, encoded)
        return result

    return [*rotation, text], call


@dataclass(frozen=True)
class Case:
    """A small network; how a block of it is called.

    Attributes:
        blocks: name of its list of blocks.
    """

    build: Callable[[], Any]
    recipe: LoRARecipe
    blocks: str
    inputs: Callable[[Any, Any, torch.dtype], tuple[list[Tensor], Call]]


WITH_TEXT = replace(AR, context_width=TEXT, absolute_positions=True)
DIFFUSION = DiTConfig(**DIT, condition_mask=True, rope_ratio=(1.0, 1.0, 1.0))
FLOW = FlowDiTConfig(**DIT, feature_width=48)
LORA = autoregressive_weights.LORA, "layers", autoregressive
CASES = {
    "autoregressive": Case(lambda: ARTransformer(AR), *LORA),
    "autoregressive with a text": Case(lambda: ARTransformer(WITH_TEXT), *LORA),
    "diffusion": Case(lambda: DiT(DIFFUSION), diffusion_weights.LORA, "blocks", diffusion),
    "predict2.5": Case(lambda: FlowDiT(FLOW), flow_weights.LORA, "blocks", diffusion),
}
OTHERS = ("*.q.weight", "*attention.*v.weight", "*.down.weight", "blocks.*modulation*.weight")


def prepared(case: Case, train: str, dtype: torch.dtype) -> tuple[Any, set[str]]:
    """The network, of which adapters or all are trained, and what is trained of its blocks."""
    network = case.build()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)
    if train == "all":
        network.requires_grad_(True)
        trained = [name for name, _ in network.named_parameters()]
    else:
        targets = case.recipe.targets if train == "adapters" else OTHERS
        targets = tuple(each for each in targets if case.blocks == "blocks" or "block" not in each)
        recipe = replace(case.recipe, rank=RANK, targets=targets)
        trained = [*add_adapters(network, recipe, torch.Generator())]
    first = f"{case.blocks}.0."
    names = {each.removeprefix(first) for each in trained if each.startswith(first)}
    # adapters are gathered in the computation's precision, too
    return network.to(dtype), {name.removesuffix(".weight") for name in names}


def kept(network: nn.Module, inputs: list[Tensor], call: Call) -> int:
    """Bytes that are kept for the way back: of other memory than parameters and inputs."""
    known = {each.untyped_storage().data_ptr() for each in (*network.parameters(), *inputs)}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # which stays, so that no other has its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    del result
    return sum(storage.nbytes() for place, storage in storages.items() if place not in known)


def check(name: str, train: str, dtype: torch.dtype, *, compiled: bool) -> None:
    """Compare what a block keeps of its tokens, and of the rows of its text."""
    case, wide = CASES[name], 4 // dtype.itemsize
    network, trained = prepared(case, train, dtype)
    block = getattr(network, case.blocks)[1]
    if compiled:  # forward and backward are cut from each other as on a GPU
        torch._dynamo.reset()
        how: Any = {"backend": "aot_eager_decomp_partition", "dynamic": False}
        block.forward = torch.compile(block.forward, **how)
    inputs, call = case.inputs(network, block, dtype)
    config = network.config
    adapters = RANK * len(trained) if train != "all" else 0
    tokens = GRID.tokens + getattr(config, "leading_tokens", 0)
    planned = tokens * (config.saved_numbers(trained, wide, compiled) + adapters)
    planned += ROWS * config.text_numbers(trained, wide) // config.depth
    bound = 0.03 if compiled else 0.02
    assert kept(network, inputs, call) == pytest.approx(dtype.itemsize * planned, rel=bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("train", ["all", "adapters", "other adapters"])
@pytest.mark.parametrize("name", CASES)
def test_what_a_block_keeps(name: str, train: str, dtype: torch.dtype) -> None:
    check(name, train, dtype, compiled=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of what torch itself imports
@pytest.mark.parametrize(
    ("name", "train"),
    [
        ("autoregressive", "all"),
        ("autoregressive with a text", "adapters"),
        ("diffusion", "all"),
        ("diffusion", "adapters"),
        ("predict2.5", "adapters"),
    ],
)
def test_what_a_compiled_block_keeps(name: str, train: str) -> None:
    check(name, train, torch.bfloat16, compiled=True)
