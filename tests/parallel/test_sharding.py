"""A network of whose blocks each process holds some rows gives what the whole one gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import worldline
from tests.adapters import write_peft
from tests.ranks import Together
from tests.test_memory import DIFFUSION, FLOW, GPU, released
from tests.tiny_diffusion import TEXT2WORLD
from tests.tiny_predict2_5 import POST
from worldline import memory
from worldline.errors import CheckpointError
from worldline.locate import locate
from worldline.memory import Memory
from worldline.opening import choose_compute, open_world, plan
from worldline.parallel.mesh import Axis, Layout, plan_mesh
from worldline.parallel.offload import BlockPlan, ShardedModule
from worldline.weights.networks import Network

from .test_offload import Stack

BUNDLED = "tiny-Cosmos-Predict2.5-2B"
PLAN = BlockPlan("blocks", kept=("kept.weight",))
SIZE = {"num_steps": 2, "prompt": "a blue ring", "height": 32, "width": 48, "num_video_frames": 9}


def nbytes(module: nn.Module) -> int:
    storages = (parameter.untyped_storage() for parameter in module.parameters())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def share(
    axis: Axis, depth: int, width: int, offload: bool, sizes: Sequence[int] = (3,)
) -> tuple[bool, float]:
    """Whether parts give what the whole gives, again and again, and the part that one holds."""
    torch.manual_seed(width)
    whole = Stack(depth, width).requires_grad_(False)
    with torch.device("meta"):
        module = Stack(depth, width).requires_grad_(False)
    held = PLAN.cut(module, axis)
    assert {name.rpartition(".")[2] for name in held} == {"weight"}
    home = "cpu" if offload else axis.device
    rows = {name: slice(own.start, own.stop) for name, (_, own) in held.items()}
    state = {
        n: t[rows.get(n, slice(None))].to(home, copy=True) for n, t in whole.state_dict().items()
    }
    module.load_state_dict(state, assign=True)
    part = ShardedModule(module, axis.device, held, axis, offload=offload)
    whole, before = whole.to(axis.device), nbytes(module)
    same = []
    for x in (torch.randn(size, width, device=axis.device) for size in sizes):
        expected = whole(x)
        with part.on_device() as gathered:
            same += [torch.equal(gathered(x), expected) for _ in range(4)]
        same.append(nbytes(module) == before and module.first.weight.device == torch.device(home))
    own, all_rows = (sum(m.get_parameter(n).nbytes for n in held) for m in (module, whole))
    return all(same), own / all_rows


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "width"), [(1, 8), (2, 12), (5, 7)])
def test_parts_give_what_the_whole_gives(
    two: Together, three: Together, depth: int, width: int
) -> None:
    for together, count in ((two, 2), (three, 3)):
        outcomes = together(share, depth, width, count == 3)
        assert all(same for same, _ in outcomes)
        parts = [part for _, part in outcomes]
        assert sum(parts) == pytest.approx(1)
        assert max(parts) <= -(-width // count) / width + 1e-9


@pytest.mark.multigpu
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("depth", [4, 5])
def test_parts_on_gpus(gpus: Together, depth: int, offload: bool) -> None:
    """Blocks that compute longer than they travel, and the reverse: each sees its own weights."""
    assert gpus(share, depth, 2048, offload, (1, 8192, 1)) == [(True, 0.5)] * 2


def make(
    axis: Axis, name: str, root: Path, options: dict[str, Any], free: int | None = None
) -> tuple[Any, float, int]:
    """Frames, the part of the weights that is held, and the number of all weights."""
    with pytest.MonkeyPatch.context() as patch:
        if free is not None:
            patch.setattr(memory, "host_memory", lambda: Memory(free, 10**12))
        world = worldline.load(
            name, checkpoint_dir=root, device="cpu", disable_guardrail=True, **options
        )
    video = world.generate(**SIZE)
    module, part = world.parts.transformer.module, world.opened["transformer"]
    return video.frames, nbytes(module) / (4 * part.num_parameters), world.parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"), [(POST.name, {}), (TEXT2WORLD, {"disable_prompt_upsampler": True})]
)
def test_a_world_in_parts(
    two: Together,
    name: str,
    options: dict[str, Any],
    tiny_predict2_5: Path,
    tiny_diffusion: Path,
) -> None:
    root = tiny_diffusion if options else tiny_predict2_5
    whole, held, parameters = two(make, name, root, {"fsdp": "off", **options})[0]
    assert held == pytest.approx(1, abs=0.01)
    for frames, held, count in two(make, name, root, {"fsdp": "on", **options}):
        assert np.array_equal(frames, whole)
        assert 0.5 < held < 0.9  # of small blocks, much is in all: what encodes the text
        assert count == parameters


@pytest.mark.slow
def test_an_adapter_in_parts(two: Together, tiny_predict2_5: Path, tmp_path: Path) -> None:
    """Rows of merged matrices: each process reads those of the adapter that it needs."""
    model = tiny_predict2_5 / Path(POST.repository).name / POST.file
    options = {"lora": [write_peft("predict2.5", model, tmp_path / "a")]}
    whole, _, _ = two(make, POST.name, tiny_predict2_5, {"fsdp": "off", **options})[0]
    for frames, _, _ in two(make, POST.name, tiny_predict2_5, {"fsdp": "on", **options}):
        assert np.array_equal(frames, whole)


def fail_to_read(axis: Axis, root: Path) -> str:
    """What a program raises where the rows of one process cannot be read."""
    read = Network.read_rows

    def read_rows(*arguments: Any) -> Any:
        if not axis.first:
            raise CheckpointError("rows of another process")
        return read(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Network, "read_rows", read_rows)
        options = {"disable_guardrail": True, "fsdp": "on"}
        with pytest.raises(CheckpointError) as caught:
            worldline.load(POST.name, checkpoint_dir=root, device="cpu", **options)
    return str(caught.value)


@pytest.mark.slow
def test_rows_that_one_process_cannot_read(two: Together, tiny_predict2_5: Path) -> None:
    assert two(fail_to_read, tiny_predict2_5) == ["rows of another process"] * 2


@pytest.mark.slow
def test_parts_are_held_where_the_whole_does_not_fit(two: Together, tmp_path: Path) -> None:
    opened = open_world(locate(BUNDLED, tmp_path), {})
    request = opened.family.request.parse(opened.defaults)
    compute = replace(choose_compute(opened.options), mesh=plan_mesh(Layout(cp=2)))
    whole, parts = (
        plan(opened, [request], replace(compute, sharded=sharded)).peak()
        for sharded in (False, True)
    )
    assert parts < whole
    frames = 3 * 33 * 128 * 192  # bytes of the video, beside the networks
    for free, least in ((whole, 0.99), (whole - 1, 0.5)):
        for _, held, _ in two(make, BUNDLED, tmp_path, {}, free + frames):
            assert least < held < least + 0.4
    with pytest.raises(AssertionError, match="InsufficientMemoryError"):
        two(make, BUNDLED, tmp_path, {"fsdp": "off"}, whole + frames - 1)
    with pytest.raises(AssertionError, match="InsufficientMemoryError"):
        two(make, BUNDLED, tmp_path, {}, parts + frames - 1)


@pytest.mark.parametrize("name", [DIFFUSION, FLOW, "Cosmos-Predict1-14B-Text2World"])
def test_what_a_process_holds(name: str) -> None:
    """Nearly all weights of released models are rows of blocks; two blocks come beside them."""
    part = released(name)["transformer"]
    whole = part.nbytes(GPU)
    for count in (2, 3, 8):
        compute = replace(GPU, mesh=plan_mesh(Layout(cp=count)), sharded=True)
        gathered = 2 * whole / part.config.depth
        assert whole / count < part.nbytes(compute) < 1.12 * whole / count + gathered + whole / 12
        assert part.nbytes(replace(compute, sharded=False)) == whole
