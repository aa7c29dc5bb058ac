"""Processes that each hold a part of an autoregressive model compute what one computes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

import worldline
from tests.conftest import MODEL, moving
from tests.plain_kernels import Eager, replace_kernels
from tests.ranks import Together
from tests.threads import in_threads, tensor_parallel
from tests.tiny_decoder import VIDEO2WORLD as VIDEO2WORLD_NAME
from tests.tiny_decoder import video2world
from tests.weights.test_distributed import write
from worldline.errors import CheckpointError, InputError
from worldline.families.autoregressive.family import FAMILY
from worldline.families.autoregressive.model import (
    PRESETS,
    ARTransformer,
    ARTransformerConfig,
    make_positions,
)
from worldline.families.autoregressive.step import PlainDecoder, make_decoder
from worldline.families.autoregressive.weights import KEYS, open_network, settings_of
from worldline.family import Compute
from worldline.nn.rope import Yarn
from worldline.parallel import tensor
from worldline.parallel.mesh import Axis, Layout, make_mesh, plan_mesh
from worldline.sampling.solvers import finish
from worldline.sampling.tokens import Sampling, decode, draw_noise
from worldline.shapes import LatentShape
from worldline.weights.checkpoint import FileTensor, cut, open_checkpoint, save

CPU = torch.device("cpu")
BASE = ARTransformerConfig(
    depth=2,
    width=40,
    num_heads=16,
    num_kv_heads=8,
    head_size=6,
    hidden=80,
    vocabulary=72,
    embedding_rows=72,
    grid=LatentShape(4, 2, 3),
    yarn=Yarn(),
)
VIDEO2WORLD = video2world(BASE, context_width=20, context_every=2, yarn=None)
NORM = "model.norm.weight"
CONFIGS = {"base": BASE, "video2world": VIDEO2WORLD}


def released(config: ARTransformerConfig) -> dict[str, Tensor]:
    """Random weights by released names, bf16."""
    torch.manual_seed(29)
    tensors = {}
    for name, parameter in ARTransformer(config).named_parameters():
        scale = parameter.shape[-1] ** -0.5
        value = torch.randn(parameter.shape) * scale if parameter.dim() > 1 else 1 + torch.rand(1)
        tensors[KEYS.released(name)] = value.expand(parameter.shape).bfloat16().contiguous()
    return tensors


def shards(tensors: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """What each rank holds in the reference's files."""
    columns = (".wo.weight", ".w2.weight")
    return [
        {
            name: tensor
            if tensor.dim() == 1
            else tensor.chunk(count, int(name.endswith(columns)))[rank].clone()
            for name, tensor in tensors.items()
        }
        for rank in range(count)
    ]


def write_model(folder: Path, config: ARTransformerConfig, form: str) -> Path:
    """Save a model in a form that is read: a suffix, or a number of shards."""
    folder.mkdir(parents=True)
    tensors = released(config)
    (folder / "config.json").write_text(json.dumps(settings_of(config)))
    if form.isdigit():
        for rank, shard in enumerate(shards(tensors, int(form))):
            torch.save(shard, folder / f"model_model_mp_{rank}.pt")
    elif form == "dcp":
        thirds = {
            name: [(slice(a, b), slice(None)) for a, b in ((0, 16), (16, 24), (24, len(tensor)))]
            for name, tensor in tensors.items()
            if tensor.dim() == 2
        }
        write(folder, tensors, thirds)
    elif form == "transposed":
        torch.save({n: t.t().contiguous().t() for n, t in tensors.items()}, folder / "model.pt")
    else:
        save(tensors, folder / f"model.{form}")
    return folder


def load(axis: Axis, folder: Path) -> ARTransformer:
    compute = Compute(CPU, torch.float32, torch.float32, False, mesh=tensor_parallel(axis))
    model: ARTransformer = open_network(folder).load(compute, offload=False).module
    return model


def run(
    axis: Axis,
    folder: Path,
    clips: int,
    frames: int,
    greedy: bool = False,
    kind: Any = make_decoder,
) -> Any:
    """Logits of a prompt, drawn tokens of clips of some latent frames, and the cache's heads."""
    model, config = load(axis, folder), open_network(folder).config
    generator = torch.Generator().manual_seed(3)
    size, leading = config.grid.tokens_per_frame, config.leading_tokens
    prompt = torch.randint(config.vocabulary, (clips, leading + size), generator=generator)
    contexts: list[Tensor | None] = [None] * clips
    if config.context_width is not None:
        prompt[:, 0] = config.begin_token
        contexts = [*torch.randn(clips, 1, 7, config.context_width, generator=generator)]
    encoded = model.encode_context(contexts[0])
    logits = model(prompt[:1], make_positions(config, CPU, torch.float32), context=encoded)
    decoder = kind(model, Sampling(0 if greedy else 0.9), contexts, axis)
    assert isinstance(decoder, PlainDecoder)
    count = (frames - 1) * size
    noise = draw_noise(range(clips), config.vocabulary, count, CPU)
    tokens = finish(decode(decoder, prompt, count, None if greedy else noise))
    return logits, tokens, decoder.cache.keys.shape[2]


def by_gloo(axis: Axis, *arguments: Any) -> Any:
    return run(make_mesh(Layout(tp=axis.count), axis).tp, *arguments)


def check(parts: list[Any], whole: Any, config: ARTransformerConfig) -> None:
    for logits, tokens, heads in parts:
        torch.testing.assert_close(logits, whole[0], atol=3e-5, rtol=1e-5)
        assert torch.equal(tokens, whole[1])
        assert heads * len(parts) == config.num_kv_heads


@pytest.mark.parametrize(
    ("name", "form", "count"),
    [
        ("base", "pt", 2),
        ("video2world", "safetensors", 8),
        ("base", "dcp", 4),
        ("video2world", "transposed", 4),
        ("video2world", "2", 2),
        ("base", "4", 2),
        ("video2world", "4", 8),
        ("base", "8", 4),
    ],
)
def test_parts_compute_what_the_whole_does(
    tmp_path: Path, name: str, form: str, count: int
) -> None:
    """Batches and clips beyond the window, from whole files and shards of any number."""
    config = CONFIGS[name]
    folder = write_model(tmp_path / "model", config, form)
    whole = run(Axis(), folder, 2, 5)
    check(in_threads(count, run, folder, 2, 5), whole, config)


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_step_that_is_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    """Its sums and residuals, with kernels in torch: `test_tensor_gpu` has the real ones."""
    replace_kernels(monkeypatch)
    folder = write_model(tmp_path / "model", CONFIGS[name], "pt")
    for greedy in (True, False):
        whole = run(Axis(), folder, 2, 5, greedy)
        check(in_threads(count, run, folder, 2, 5, greedy, Eager), whole, CONFIGS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_two_processes(tmp_path: Path, two: Together, name: str) -> None:
    folder = write_model(tmp_path / "model", CONFIGS[name], "8")
    for greedy in (True, False):
        whole = run(Axis(), folder, 2, 5, greedy)
        check(two(by_gloo, folder, 2, 5, greedy), whole, CONFIGS[name])


def test_a_draw_that_differs_is_the_first_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where GPUs' sums round otherwise, every process goes on with the same token."""
    from worldline.families.autoregressive import step

    def draw(logits: Tensor, *_: object) -> Tensor:
        return logits.argmax(-1) + (threading.get_ident() % 7)

    folder = write_model(tmp_path / "model", BASE, "pt")
    monkeypatch.setattr(step, "draw", lambda *arguments: draw(*arguments) % BASE.vocabulary)
    drawn = [tokens for _, tokens, _ in in_threads(4, run, folder, 2, 4)]
    assert all(torch.equal(tokens, drawn[0]) for tokens in drawn)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Bytes that were read of tensors."""
    fill, counts = FileTensor.fill, [0]

    def counting(self: FileTensor, buffer: memoryview, start: int = 0) -> None:
        counts[0] += len(buffer)
        fill(self, buffer, start)

    monkeypatch.setattr(FileTensor, "fill", counting)
    return lambda: counts[0]


@pytest.mark.parametrize("form", ["pt", "safetensors", "dcp", "2", "8"])
def test_a_process_reads_its_part_alone(
    tmp_path: Path, form: str, counted: Callable[[], int]
) -> None:
    folder, count = write_model(tmp_path / "model", VIDEO2WORLD, form), 4
    for rank in range(count):
        before = counted()
        model = load(Axis(rank, count), folder)
        norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
        copies = int(form) if form.isdigit() else 1  # of which all are read, to be averaged
        numbers = sum(p.numel() for p in model.parameters()) + (copies - 1) * norms
        assert counted() - before == 2 * numbers
        assert all(p.is_contiguous() for p in model.parameters())


def test_weights_of_a_process_are_its_slices(tmp_path: Path) -> None:
    folder, count = write_model(tmp_path / "model", VIDEO2WORLD, "safetensors"), 8
    expected = shards(released(VIDEO2WORLD), count)
    for rank in range(count):
        for name, parameter in load(Axis(rank, count), folder).named_parameters():
            assert torch.equal(parameter.bfloat16(), expected[rank][KEYS.released(name)]), name


@pytest.mark.parametrize("scale", [(1,), (24,), (24, 1), (1, 2)])
@pytest.mark.parametrize("name", ["a.output.weight", "a.w2.weight", "a.feed_forward.w2.weight"])
def test_scaled_tensors_are_cut_with_their_scales(
    tmp_path: Path, scale: tuple[int, ...], name: str
) -> None:
    """Blocks of 128 that a part begins in the middle of, too."""
    torch.manual_seed(7)
    value = torch.randn(24, 144).to(torch.float8_e4m3fn)
    tensors = {name: value, f"{name.removesuffix('weight')}scale_weight": torch.rand(scale) + 0.5}
    save(tensors, tmp_path / "model.safetensors")
    whole = open_checkpoint(tmp_path / "model.safetensors")
    expected, dim = whole.read(name), {"output": 0, "feed_forward": 1}.get(name.split(".")[1])
    for rank in range(6):
        part = cut(whole, Axis(rank, 6)).read(name)
        assert torch.equal(part, expected if dim is None else expected.chunk(6, dim)[rank])


def test_replicas_that_drifted_are_averaged_by_each(tmp_path: Path) -> None:
    for rank, shard in enumerate(shards(released(BASE), 2)):
        shard[NORM] += rank / 16
        torch.save(shard, tmp_path / f"model_model_mp_{rank}.pt")
    (tmp_path / "config.json").write_text(json.dumps(settings_of(BASE)))
    mean = released(BASE)[NORM].float() + 1 / 32
    for rank in range(4):
        norm = load(Axis(rank, 4), tmp_path).norm.weight
        torch.testing.assert_close(norm, mean, atol=1e-2, rtol=0)
    shard[NORM] += 9
    torch.save(shard, tmp_path / "model_model_mp_1.pt")
    with pytest.raises(CheckpointError, match=rf"{NORM} is copied on every rank"):
        load(Axis(1, 2), tmp_path)


def test_numbers_that_are_not_finite_are_found_in_a_part(tmp_path: Path) -> None:
    tensors = released(BASE)
    tensors["model.layers.1.feed_forward.w2.weight"][3, 50] = torch.nan  # of the fifth of eight
    (tmp_path / "config.json").write_text(json.dumps(settings_of(BASE)))
    save(tensors, tmp_path / "model.safetensors")
    load(Axis(4, 8), tmp_path)
    with pytest.raises(CheckpointError, match=r"w2\.weight holds NaN"):
        load(Axis(5, 8), tmp_path)


@pytest.mark.parametrize("name", PRESETS)
def test_released_models(name: str) -> None:
    """2, 4 and 8 GPUs hold halves, quarters and eighths of all that is large."""
    config = PRESETS[name]
    assert config.divisor == 8
    with torch.device("meta"):
        whole = sum(p.numel() for p in ARTransformer(config).parameters())
        for count in (2, 4, 8):
            part = ARTransformer(config.part(count))
            assert whole / count <= sum(p.numel() for p in part.parameters()) < whole / count + 1e6
            shape = part.layers[0].attention.k.weight.shape
            assert shape == (8 // count * config.head_size, config.width)


def test_memory_of_a_part() -> None:
    from worldline.weights.networks import Network

    network = Network(ARTransformer, PRESETS["13B-Video2World"])
    one = Compute(CPU, torch.bfloat16, torch.bfloat16, False)
    four = replace(one, mesh=plan_mesh(Layout(tp=4)))  # which is planned, not made
    assert network.nbytes(one) == 2 * network.num_parameters
    assert network.nbytes(four) == pytest.approx(network.nbytes(one) / 4, rel=1e-3)


def videos(axis: Axis, root: Path, name: str, *requests: dict[str, Any]) -> list[Any]:
    """Frames of videos in step, as a program makes them in each process of a job."""
    options = {"disable_diffusion_decoder": name == MODEL, "batch_size": 3}
    world = worldline.load(
        name, checkpoint_dir=root, device="cpu", disable_guardrail=True, **options
    )
    held = sum(map(torch.numel, world.parts.transformer.module.parameters()))
    assert (held < world.parameters) == (axis.count > 1)  # the report counts those of all
    shared, *each = requests
    steps = world.stream_batch([moving()] * len(each), each, **shared)
    made = {number: step.video.frames for number, step in steps if step.video is not None}
    return axis.once(lambda: [made[number] for number in sorted(made)])


@pytest.mark.slow
@pytest.mark.parametrize("rollout", ["tokens", "pixels"])
@pytest.mark.parametrize("name", [MODEL, VIDEO2WORLD_NAME])
def test_videos(whole_world: Path, two: Together, name: str, rollout: str) -> None:
    """Batches with prompts, longer than the window, decoded by the tokenizer or by diffusion."""
    text = name == VIDEO2WORLD_NAME
    each = [{"seed": n} | ({"prompt": f"Ball {n}."} if text else {}) for n in range(2 + (not text))]
    shared = {"num_video_frames": 49, "rollout": rollout, "top_p": 0.95}
    alone = videos(Axis(), whole_world, name, shared, *each)
    for together in two(videos, whole_world, name, shared, *each):
        for one, other in zip(alone, together, strict=True):
            assert np.abs(one.astype(int) - other.astype(int)).max() <= 2


def share_memory(world: Axis, failing: str, devices: tuple[int, int]) -> tuple[bool, list[str]]:
    """Whether GPUs of two processes, of which one may fail, share memory; this one's calls."""
    calls: list[str] = []

    def peer(_: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.ones(sizes, dtype=dtype)

    def call(name: str, *at: Any, **_: Any) -> Any:
        calls.append(name)
        if failing == f"{name} {world.rank}":
            raise RuntimeError("no such driver")
        if name == "rendezvous":
            shift = 16 if failing == "offset" else 0
            return SimpleNamespace(buffer_ptrs=[at[0].data_ptr() + shift] * 2, get_buffer=peer)
        return torch.ones(*at)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: devices[world.rank])
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "can_device_access_peer", lambda *_: failing != "peer")
        for name in ("empty", "rendezvous"):
            patch.setattr(symmetric, name, partial(call, name))
        return tensor._places(world, (1, 3)) is not None, calls


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failing", "devices", "calls"),
    [
        ("", (0, 1), ["empty", "rendezvous"]),
        ("empty 1", (1, 0), ["empty"]),  # a rendezvous would wait for it
        ("rendezvous 0", (0, 1), ["empty", "rendezvous"]),
        ("offset", (0, 1), ["empty", "rendezvous"]),
        ("peer", (0, 1), []),
        ("", (0, 0), []),  # each sees its own GPU alone
    ],
)
def test_memory_that_processes_share_or_none(
    failing: str, devices: tuple[int, int], calls: list[str], two: Together
) -> None:
    shared = not failing and devices[0] != devices[1]
    assert two(share_memory, failing, devices) == [(shared, calls)] * 2


@pytest.mark.parametrize(
    ("changes", "count", "size", "possible"),
    [
        ({}, 3, r"num_heads \(16", [1, 2, 4, 8]),
        ({"num_heads": 16, "num_kv_heads": 4}, 8, r"num_kv_heads \(4", [1, 2, 4]),
        ({"hidden": 90}, 4, r"hidden \(90", [1, 2]),
        ({"vocabulary": 71}, 2, r"vocabulary \(71", [1]),
        ({"embedding_rows": 75}, 2, r"embedding_rows \(75", [1]),
    ],
)
def test_numbers_that_cannot_share_a_model(
    changes: dict[str, int], count: int, size: str, possible: list[int]
) -> None:
    opened: Any = SimpleNamespace(name="x", config=replace(BASE, **changes))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"{count} processes .* {size}") as caught:
        FAMILY.layout(opened, [], count)
    assert f" {', '.join(map(str, possible))}, or" in str(caught.value)
    for number in possible:
        assert FAMILY.layout(opened, [], number) == Layout(tp=number)
