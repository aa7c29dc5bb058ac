"""The captured step of a model that GPUs share, against the plain modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.test_tensor import write_model
from tests.ranks import Together
from tests.threads import tensor_parallel
from tests.tiny_decoder import video2world
from worldline.families.autoregressive.model import (
    SHARD_PLAN,
    ARTransformer,
    ARTransformerConfig,
    make_positions,
)
from worldline.families.autoregressive.step import CapturedDecoder
from worldline.families.autoregressive.weights import open_network
from worldline.family import Compute
from worldline.nn.rope import Yarn
from worldline.parallel import tensor
from worldline.parallel.mesh import Axis
from worldline.parallel.tensor import Rehearsal
from worldline.sampling.solvers import finish
from worldline.sampling.tokens import Sampling, decode, draw_noise
from worldline.shapes import LatentShape

pytestmark = pytest.mark.gpu

BASE = ARTransformerConfig(
    depth=3,
    width=320,
    num_heads=16,
    num_kv_heads=4,
    head_size=64,
    hidden=768,
    vocabulary=1024,
    embedding_rows=1024,
    grid=LatentShape(5, 8, 12),
    yarn=Yarn(),
)
VIDEO2WORLD = video2world(BASE, context_width=96, head_size=32, yarn=None)
CONFIGS = {"base": BASE, "video2world": VIDEO2WORLD}
PROMPT = 96


def inputs(config: ARTransformerConfig, clips: int) -> tuple[Tensor, list[Tensor | None]]:
    """Tokens of whole clips, and contexts, the same in all processes."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(config.vocabulary, (clips, config.length), generator=generator)
    contexts: list[Tensor | None] = [None] * clips
    if config.context_width is not None:
        contexts = [*torch.randn(clips, 1, 70, config.context_width, generator=generator).cuda()]
    return tokens.cuda(), contexts


def logits_of(model: ARTransformer, tokens: Tensor, context: Tensor | None) -> Tensor:
    """Logits (S, V) of one clip, all at once."""
    positions = make_positions(model.config, "cuda", model.norm.weight.dtype)
    encoded = None if context is None else model.encode_context(context)
    return model(tokens[None], positions, context=encoded)[0]  # type: ignore[no-any-return]


def stepped(model: ARTransformer, axis: Axis, given: Any, steps: int = 40) -> Tensor:
    """Logits (steps, clips, V) of the captured step, which reads given tokens."""
    tokens, contexts = given
    decoder = CapturedDecoder(model, Sampling(temperature=0), contexts, axis)
    decoder.start(tokens[:, :PROMPT], None)
    rows = []
    for at in range(PROMPT, PROMPT + steps):
        decoder.ids[:, at] = tokens[:, at]
        decoder.step(None)
        rows.append(decoder.logits.clone())
    return torch.stack(rows)


def check(captured: Tensor, plain: list[Tensor], exact: list[Tensor]) -> None:
    """Captured logits are about as close to float32 as those of the plain modules."""
    for clip, (ours, theirs) in enumerate(zip(plain, exact, strict=True)):
        for step, logits in enumerate(captured[:, clip]):
            at = PROMPT + step
            scale = theirs[at].norm()
            error, allowed = ((x - theirs[at]).norm() / scale for x in (logits, ours[at]))
            assert error <= 1.5 * allowed + 4e-3, (clip, step)


def build(config: ARTransformerConfig, axis: Axis) -> ARTransformer:
    """A part of a model with random weights, whose layers ask `axis`."""
    torch.manual_seed(0)
    model = ARTransformer(config.part(axis.count))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.05)
    model = model.cuda().requires_grad_(False).eval()
    SHARD_PLAN.join(model, axis)
    return model


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("clips", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_part_alone(name: str, clips: int, count: int) -> None:
    """With no other GPU there, a captured part is the plain part."""
    config, axis = CONFIGS[name], Rehearsal(count=count, device=torch.device("cuda"))
    tokens, contexts = given = inputs(config.part(count), clips)
    exact = [logits_of(build(config, axis), *one) for one in zip(tokens, contexts, strict=True)]
    model = build(config, axis).bfloat16()
    plain = [logits_of(model, *one) for one in zip(tokens, contexts, strict=True)]
    check(stepped(model, axis, given), plain, exact)


def load(axis: Axis, folder: Path, dtype: torch.dtype) -> ARTransformer:
    compute = Compute(axis.device, dtype, dtype, False, mesh=tensor_parallel(axis))
    model: ARTransformer = open_network(folder).load(compute, offload=False).module
    return model


def shared_steps(axis: Axis, folder: Path, clips: int, symmetric: bool) -> tuple[Any, Any, bool]:
    """Logits of the captured step; drawn tokens beyond the window; whether memory is shared."""
    with pytest.MonkeyPatch.context() as patch:
        if not symmetric:
            patch.setattr(tensor, "kept", {})
            patch.setattr(tensor, "_symmetric", lambda *_: [])
        return _shared_steps(axis, folder, clips)


def _shared_steps(axis: Axis, folder: Path, clips: int) -> tuple[Any, Any, bool]:
    model, config = load(axis, folder, torch.bfloat16), open_network(folder).config
    tokens, contexts = given = inputs(config, clips)
    logits = stepped(model, axis, given)
    count = config.length + config.grid.tokens_per_frame - PROMPT
    decoder = CapturedDecoder(model, Sampling(top_p=0.9), contexts, axis)
    noise = draw_noise(range(clips), config.vocabulary, count, tokens.device)
    drawn = finish(decode(decoder, tokens[:, :PROMPT], count, noise))
    assert decoder.sum is not None
    return logits.cpu(), drawn.cpu(), decoder.sum.places is not None


@pytest.mark.multigpu
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("clips", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_two_gpus(tmp_path: Path, gpus: Together, name: str, clips: int, symmetric: bool) -> None:
    """By torch's symmetric memory and by NCCL, in a graph; both draw the same tokens."""
    config = CONFIGS[name]
    folder = write_model(tmp_path / "model", config, "safetensors")
    first, second = gpus(shared_steps, folder, clips, symmetric)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert first[2] == symmetric
    tokens, contexts = inputs(config, clips)
    one = Axis(device=torch.device("cuda"))
    exact, plain = (
        [logits_of(load(one, folder, dtype), *each) for each in zip(tokens, contexts, strict=True)]
        for dtype in (torch.float32, torch.bfloat16)
    )
    check(first[0].cuda(), plain, exact)
