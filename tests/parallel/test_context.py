"""Several processes that share the tokens of a clip make what one makes alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import MODEL
from tests.families import worlds
from tests.families.worlds import CPU, PROMPT
from tests.ranks import Together
from tests.test_memory import Live
from tests.tiny_diffusion import TEXT2WORLD, VIDEO2WORLD, fill
from tests.tiny_predict2_5 import POST, PRE, SMALL
from worldline.errors import InputError
from worldline.families import denoise
from worldline.families.autoregressive.family import Decoding
from worldline.families.autoregressive.request import ARRequest
from worldline.families.diffusion.model import DiT, DiTConfig
from worldline.families.predict2_5.model import FlowDiT, FlowDiTConfig
from worldline.family import Parts
from worldline.memory import denoise_bytes
from worldline.nn.dit import ALL_TOKENS
from worldline.parallel.context import SplitTokens, Way, split_tokens
from worldline.parallel.halo import SharedRows
from worldline.parallel.mesh import Axis, Layout, make_mesh
from worldline.report import Recorder
from worldline.shapes import LatentShape, VideoShape

SIZES: dict[str, Any] = {
    "depth": 2,
    "head_size": 24,
    "hidden": 56,
    "context_width": 20,
    "lora_rank": 4,
    "latent_channels": 5,
    "rope_ratio": (1.0, 2.0, 1.5),
    "max_grid": LatentShape(5, 43, 45),
}
# of tokens; none divides a frame's by 2 or 3, but for the last
GRIDS = (LatentShape(3, 5, 7), LatentShape(1, 1, 7), LatentShape(4, 2, 3))


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def ready(model: Any, like: Tensor) -> Any:
    """The model with weights, in the dtype and on the device of a tensor."""
    fill(model, 0.3)
    return model.requires_grad_(False).to(like)


def predict1(heads: int, grid: LatentShape, like: Tensor) -> tuple[DiT, dict[str, Any]]:
    """A model with learned positions and known frames, and its inputs."""
    model = ready(DiT(DiTConfig(**SIZES, width=36, num_heads=heads, condition_mask=True)), like)
    mask = torch.zeros(1, 1, grid.frames, 2 * grid.height, 2 * grid.width)
    mask[:, :, :1] = 1
    return model, {
        "latents": draw(1, 5, *mask.shape[2:]),
        "timesteps": draw(1),
        "context": model.encode_context(draw(1, 6, 20)),
        "positions": model.make_positions(LatentShape(*mask.shape[2:]), 30.0),
        "condition_mask": mask,
    }


def predict2_5(heads: int, grid: LatentShape, like: Tensor) -> tuple[FlowDiT, dict[str, Any]]:
    """A model with a noise level for each latent frame, and inputs of a batch of two."""
    sizes = FlowDiTConfig(**SIZES, width=36, num_heads=heads, feature_width=9)
    model = ready(FlowDiT(sizes), like)
    shape = grid.frames, 2 * grid.height, 2 * grid.width
    return model, {
        "latents": draw(2, 5, *shape),
        "timesteps": 1000 * draw(2, grid.frames).abs(),
        "context": model.encode_context(draw(2, 6, 9)),
        "positions": model.make_positions(LatentShape(*shape)),
        "condition_mask": draw(2, 1, *shape).sign().relu(),
        "padding_mask": torch.ones(2, 1, 4, 4),
    }


def decoder(heads: int, grid: LatentShape, like: Tensor) -> tuple[DiT, dict[str, Any]]:
    """A model that reads ids, and both branches of its guidance as a batch."""
    sizes = {**SIZES, "width": 36, "num_heads": heads, "vocabulary": 11, "id_width": 3}
    config = DiTConfig(**sizes, condition_mask=False, learned_positions=False)
    model = ready(DiT(config), like)
    latents = LatentShape(grid.frames, 2 * grid.height, 2 * grid.width)
    ids = torch.arange(2 * grid.tokens).view(2, grid.frames, grid.height, grid.width) % 11
    return model, {
        "latents": draw(2, 5, grid.frames, latents.height, latents.width),
        "timesteps": draw(2),
        "context": model.encode_context(draw(2, 6, 20)),
        "positions": model.make_positions(latents, 24.0),
        "ids": model.encode_ids(ids.to(like.device), latents),
    }


NETWORKS = {"predict1": predict1, "predict2.5": predict2_5, "decoder": decoder}


@torch.inference_mode()
def forward(
    axis: Axis, network: str, heads: int, way: Way, dtype: torch.dtype, grids: tuple[Any, ...]
) -> list[tuple[str, bool, float]]:
    """How each grid is shared, whether all have the same output, and how far it is off."""
    found, like = [], torch.empty(0, dtype=dtype, device=axis.device)
    for grid in grids:
        model, inputs = NETWORKS[network](heads, grid, like)
        tensors = {n: x.to(like.device) for n, x in inputs.items() if isinstance(x, Tensor)}
        tokens = split_tokens(axis, grid, heads, way)
        whole, shared = (model(**{**inputs, **tensors, "tokens": t}) for t in (ALL_TOKENS, tokens))
        off = ((shared - whole).abs().max() / whole.abs().max()).item()
        found.append((str(tokens), len(set(axis.every(shared.float().sum().item()))) == 1, off))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
    ("count", "heads", "way", "expected"),
    [
        (2, 4, "auto", "Ulysses over 2 processes"),
        (2, 3, "auto", "ring attention over 2 processes"),
        (2, 2, "ring", "ring attention over 2 processes"),
        (3, 3, "ulysses", "Ulysses over 3 processes"),
        (3, 2, "auto", "ring attention over 3 processes"),
    ],
)
def test_networks_of_shared_tokens(
    two: Together, three: Together, network: str, count: int, heads: int, way: Way, expected: str
) -> None:
    for found in (two, three)[count - 2](forward, network, heads, way, torch.float32, GRIDS):
        for name, same, off in found:
            assert (name, same) == (expected, True)
            assert off < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ulysses", "ring"])
def test_half_precision_is_as_near_as_on_one(two: Together, way: Way) -> None:
    for found in two(forward, "predict1", 2, way, torch.bfloat16, GRIDS):
        assert all(same and off < 0.03 for _, same, off in found)


@pytest.mark.multigpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("way", ["ulysses", "ring"])
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_on_gpus(gpus: Together, network: str, way: Way, dtype: torch.dtype) -> None:
    # as many tokens that those of one process are attended to by cuDNN
    grids = (*GRIDS, LatentShape(5, 43, 45))
    for found in gpus(forward, network, 2, way, dtype, grids):
        for _, same, off in found:
            assert same
            assert off < (0.03 if dtype == torch.bfloat16 else 1e-4)


def arranged(axis: Axis, parts: Parts, layout: Layout, **options: Any) -> Parts:
    """Parts in the processes of a layout."""
    opened = replace(parts.opened, options=parts.opened.options.model_copy(update=options))
    compute = replace(parts.compute, mesh=make_mesh(layout, axis))
    return replace(parts, opened=opened, compute=compute)


def request(
    axis: Axis, model: str, folder: Path, layout: Layout, options: dict[str, Any]
) -> tuple[float, int, str]:
    """How far frames are off those of one process, number of texts encoded, the report's entry."""
    way = options.pop("context_parallel", "auto")
    parts = worlds.load_named(model, folder, context_parallel=way)
    recorder, number = Recorder(CPU), options.get("num_input_frames", 0)
    clip = worlds.clip(9) if number else None
    encoded: list[Tensor] = []
    whole = worlds.frames_of(worlds.run(parts, clip, **options))
    shared, module = arranged(axis, parts, layout), parts.transformer.module
    real = module.encode_context

    def encode(text: Tensor) -> Any:
        encoded.append(text)
        return real(text)

    with mock.patch.object(module, "encode_context", encode):
        made = worlds.frames_of(worlds.run(shared, clip, recorder, **options))
    asked = worlds.checked(parts.opened, **options)
    entry = parts.opened.family.report(shared, asked, recorder)["attention"]
    # the first process decodes
    off = np.abs(made.astype(int) - whole).max() if shared.compute.mesh.video.first else 0
    return off, len(encoded), entry


T2W = {"prompt": PROMPT, "num_video_frames": 25, "height": 48, "width": 80, "num_steps": 3}
P25 = {**SMALL, "prompt": PROMPT, "height": 48, "width": 80}
HALVES, CONTEXT, WIDE = Layout(cfg=2), Layout(cp=2), Layout(cp=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "layout", "options", "texts", "ways"),
    [
        (TEXT2WORLD, CONTEXT, {"guidance": 3.0}, 2, "Ulysses over 2"),
        (TEXT2WORLD, HALVES, {"guidance": 3.0}, 1, "guidance halves"),
        (TEXT2WORLD, HALVES, {"guidance": 0}, 1, "Ulysses over 2"),
        (TEXT2WORLD, WIDE, {"negative_prompt": None}, 2, "ring attention over 3"),
        (VIDEO2WORLD, HALVES, {"num_input_frames": 9, "sampler": "res_2mid"}, 1, "guidance halves"),
        (VIDEO2WORLD, HALVES, {"num_input_frames": 1, "negative_prompt": ""}, 1, "Ulysses over 2"),
        (VIDEO2WORLD, WIDE, {"num_input_frames": 1}, 2, "ring attention over 3"),
        (POST.name, HALVES, {}, 1, "guidance halves"),
        (POST.name, CONTEXT, {"num_input_frames": 5}, 2, "Ulysses over 2"),
        (PRE.name, WIDE, {"num_input_frames": 1, "guidance": 0}, 1, "ring attention over 3"),
        (
            PRE.name,
            CONTEXT,
            {"num_video_frames": 14, "chunk_size": 9, "context_parallel": "ring"},
            4,
            "ring attention over 2",
        ),
    ],
)
def test_requests(
    two: Together,
    three: Together,
    tiny_diffusion: Path,
    tiny_predict2_5: Path,
    model: str,
    layout: Layout,
    options: dict[str, Any],
    texts: int,
    ways: str,
) -> None:
    old = model in (TEXT2WORLD, VIDEO2WORLD)
    folder, options = (tiny_diffusion, T2W | options) if old else (tiny_predict2_5, P25 | options)
    for found in (two, three)[layout.count - 2](request, model, folder, layout, options):
        off, encoded, entry = found
        assert off <= 1
        assert encoded == texts
        assert ways in entry
        assert entry.count("over") + entry.count("halves") == 1


def decode(axis: Axis, folder: Path, seam: str) -> float:
    """How far the decoder's frames are off those of one process, of a clip of three windows."""
    parts = worlds.load_named(MODEL, folder)
    tokens = torch.arange(15 * 6).view(1, 15, 2, 3) * 7 % 64
    made = []
    for each in (parts, arranged(axis, parts, Layout(tp=axis.count))):
        video = Decoding(VideoShape(113, 32, 48), 1, SharedRows(Axis()))
        asked = ARRequest.parse({"decoder_seam": seam})
        job = SimpleNamespace(request=asked, recorder=Recorder(CPU))
        network = replace(parts.opened["decoder"], num_steps=2)
        with torch.inference_mode():
            list(network.decode(each, video, tokens, job, None))
        made.append(video.frames.astype(int))
    return np.abs(made[0] - made[1]).max() if axis.first else 0  # the first process decodes


@pytest.mark.slow
def test_the_diffusion_decoder(two: Together, three: Together, whole_world: Path) -> None:
    for together, seam in ((two, "corrected"), (three, "as_released")):
        assert max(together(decode, whole_world, seam)) <= 1


@pytest.mark.parametrize(
    ("count", "guidances", "options", "expected"),
    [
        (8, (2, 3), {}, Layout(cfg=2, cp=4)),
        (8, (2, 0), {}, Layout(cp=8)),
        (3, (2,), {}, Layout(cp=3)),
        (8, (2,), {"guidance_parallel": "off"}, Layout(cp=8)),
        (2, (0,), {"guidance_parallel": "on"}, Layout(cp=2)),
        (3, (0,), {"guidance_parallel": "on"}, Layout(cp=3)),
        (2, (0, 2), {"guidance_parallel": "on"}, Layout(cfg=2)),
        (1, (2,), {"guidance_parallel": "on"}, Layout()),
        (4, (2,), {"context_parallel": "ulysses"}, Layout(cfg=2, cp=2)),
        (12, (2,), {}, Layout(cfg=2, cp=6)),
    ],
)
def test_layouts(
    tiny_predict2_5: Path,
    count: int,
    guidances: tuple[float, ...],
    options: dict[str, Any],
    expected: Layout,
) -> None:
    opened = worlds.open_named(POST.name, tiny_predict2_5, **options)
    wide = {**SMALL, "prompt": "x", "width": 64}
    asked = [worlds.checked(opened, **{**wide, "guidance": g}) for g in guidances]
    assert denoise.layout(opened, asked, count) == expected


@pytest.mark.parametrize(
    ("count", "options", "words"),
    [
        (7, {}, ("7 processes", "6 tokens", " 3, 4, 5, 6, 8, 10")),
        (14, {"guidance_parallel": "on"}, ("7 processes", "6 tokens", " 2, 4, 6, 8, 10, 12")),
        (3, {"guidance_parallel": "on"}, ("guidance_parallel='on'", "3 processes", " 1, 2, 4")),
        (3, {"context_parallel": "ulysses"}, ("3 processes", "2 heads", "'ring'", " 1, 2, 4")),
    ],
)
def test_numbers_that_cannot_share(
    tiny_predict2_5: Path, count: int, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    opened = worlds.open_named(POST.name, tiny_predict2_5, **options)
    asked = worlds.checked(opened, **{**SMALL, "prompt": "x"})
    with pytest.raises(InputError) as caught:
        denoise.layout(opened, [asked], count)
    assert all(word in str(caught.value) for word in words)


def test_few_tokens_are_not_split() -> None:
    axis = Axis(0, 4)
    assert split_tokens(axis, LatentShape(9, 1, 3), 4, "auto") is ALL_TOKENS
    tokens = split_tokens(axis, LatentShape(9, 2, 3), 4, "auto")
    assert isinstance(tokens, SplitTokens)
    assert sum(tokens.counts) == 6
    assert min(tokens.counts) == 1


@torch.inference_mode()
def memory(axis: Axis, way: Way) -> tuple[int, int, int]:
    """Bytes that a network needs beside its weights, those planned, and those of one process."""
    grid, sizes = LatentShape(2, 15, 16), {**SIZES, "max_grid": LatentShape(2, 15, 16)}
    sizes |= {"width": 512, "hidden": 1024, "head_size": 128, "num_heads": 4}
    model = DiT(DiTConfig(**sizes, condition_mask=False)).bfloat16().requires_grad_(False)
    fill(model, 0.02)
    tokens, latents = split_tokens(axis, grid, 4, way), LatentShape(2, 30, 32)
    with Live(model.parameters()) as live:
        context, positions = model.encode_context(draw(1, 8, 20)), model.make_positions(latents, 24)
        model(draw(1, 5, 2, 30, 32), draw(1), context, positions, tokens=tokens)
    plans = (
        denoise_bytes(model.config, latents, model.dtype, 8, fused=False, sharing=sharing)
        for sharing in (tokens, ALL_TOKENS)
    )
    return live.peak, *plans


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ulysses", "ring"])
def test_memory_falls_as_planned(two: Together, three: Together, way: Way) -> None:
    states = 12 * 5 * 2 * 30 * 32 * 8  # of a sampler, which is not there
    for peak, planned, alone in (*two(memory, way), *three(memory, way)):
        assert 0.6 * planned < peak <= planned - states < 0.85 * alone
