"""Memory plans: what stages hold, which flags help, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiny.export import draw_weights
from worldline import guards, memory
from worldline.catalog import ENTRIES
from worldline.errors import InputError, InsufficientMemoryError
from worldline.families.autoregressive.family import CARRIED, longest_prefix, window_shape
from worldline.families.diffusion.model import DiT
from worldline.family import Compute, Opened, load_family
from worldline.locate import Place
from worldline.memory import Memory, Plan, Stage, Weights, denoise_bytes
from worldline.opening import choose_compute, describe_plan, fit_released, plan
from worldline.parallel.mesh import Layout, plan_mesh
from worldline.sampling.cache import StepCache
from worldline.shapes import LatentShape, VideoShape, latent_frames_of
from worldline.world import load_world

from .conftest import MODEL
from .families.worlds import PLAIN, checked, open_named
from .tiny_decoder import VIDEO2WORLD as PROMPTED
from .tiny_diffusion import CONTEXT_WIDTH, DEFAULTS, VIDEO2WORLD, config
from .tiny_predict2_5 import POST

CUDA = torch.device("cuda")
GPU = Compute(CUDA, torch.bfloat16, torch.bfloat16, fused=True)
BENCHMARKS = Path(__file__).parents[1] / "benchmarks" / "results"
ENTRY = {entry.name: entry for entry in ENTRIES}
AR, DIFFUSION, FLOW = (
    "Cosmos-Predict1-4B",
    "Cosmos-Predict1-7B-Video2World",
    "Cosmos-Predict2.5-2B",
)


def released(name: str) -> Opened:
    """A released model, of files that are not there."""
    family = load_family(ENTRY[name].command.partition(" ")[0])
    parts = family.presets(ENTRY[name])
    return Opened(family, name, Place(Path(name), ()), family.options.parse({}), parts=parts)


def planned(name: str, compute: Compute = GPU, guardrail_bytes: int = 0, **options: Any) -> Plan:
    opened = released(name)
    return plan(opened, [opened.family.request.parse(options)], compute, guardrail_bytes)


def needs(found: Plan, *offloaded: str) -> dict[str, int]:
    """Bytes of each stage."""
    return {stage.name: found.need(stage, offloaded) for stage in found.stages}


def subsets(flags: Iterable[str]) -> Iterable[tuple[str, ...]]:
    every = tuple(flags)
    return chain.from_iterable(combinations(every, n) for n in range(len(every) + 1))


def test_what_a_stage_holds() -> None:
    """What is used, what stays, and its own; an offloaded part is away otherwise."""
    weights = {
        "text": Weights(100, "offload_text"),
        "transformer": Weights(1000, "offload_transformer", streamed=30),
    }
    stages = (Stage("text", "text", 1), Stage("denoise", "transformer", 2), Stage("guard", "", 5))
    found = Plan("x", weights, stages, ("offload_text", "offload_transformer"), workspace=10_000)
    assert needs(found) == {"text": 11_101, "denoise": 11_102, "guard": 11_105}
    assert needs(found, "offload_text") == {"text": 11_101, "denoise": 11_002, "guard": 11_005}
    away = needs(found, "offload_text", "offload_transformer")
    assert away == {"text": 10_101, "denoise": 10_032, "guard": 10_005}
    assert found.peak() == 11_105


@pytest.mark.parametrize("name", [AR, DIFFUSION, FLOW])
def test_processes_of_a_video_share_the_coding_of_frames(name: str) -> None:
    """By rows: 88 or 40 of latents in four parts; groups with other videos share nothing."""

    def coding(**layout: int) -> list[int]:
        stages = planned(name, replace(GPU, mesh=plan_mesh(Layout(**layout)))).stages
        return [stage.activations for stage in stages if stage.name in ("encode", "decode")]

    assert coding(dp=4) == coding()
    assert coding(dp=3, cfg=2, cp=2) == [-(-nbytes // 4) for nbytes in coding()]


@pytest.mark.parametrize(
    ("name", "most"),
    [
        (AR, 16e9),
        ("Cosmos-Predict1-5B-Video2World", 16e9),
        ("Cosmos-Predict1-12B", 27.4e9),
        (DIFFUSION, 10e9),
        ("Cosmos-Predict1-14B-Video2World", 16e9),
        (FLOW, 16e9),
        ("Cosmos-Predict2.5-14B", 16e9),
    ],
)
def test_offloading_is_never_worse_and_published_needs_are_met(name: str, most: float) -> None:
    found = planned(name)
    whole = needs(found)
    for flags in subsets(found.flags):
        less = needs(found, *flags)
        assert all(less[stage] <= whole[stage] for stage in whole)
    assert found.peak(found.flags) <= most
    for flag in found.flags:  # each lowers the stages that do not use its part
        parts = {part for part, weights in found.weights.items() if weights.flag == flag}
        freed = sum(found.weights[part].nbytes for part in parts)
        for stage in found.stages:
            if stage.uses not in parts:
                assert whole[stage.name] - needs(found, flag)[stage.name] == freed


def test_models_need_their_weights_and_more() -> None:
    for name, least, most in ((AR, 8e9, 32e9), ("Cosmos-Predict1-12B", 23e9, 48e9)):
        opened = released(name)
        parts = {part: opened.parts[part] for part in ("tokenizer", "transformer")}
        bare = replace(opened, parts=parts)
        without = plan(bare, [bare.family.request.parse({})], GPU)
        assert least < without.peak() < planned(name).peak() < most
    assert planned(FLOW).peak() < planned("Cosmos-Predict2.5-14B").peak()


@pytest.mark.parametrize(
    ("name", "stage", "blocks", "kept"),
    [
        (AR, "denoise", 28, 0.1),
        (DIFFUSION, "denoise", 28, 0.1),
        (DIFFUSION, "text", 24, 0.01),
        ("Cosmos-Predict1-13B-Video2World", "text", 24, 0.01),
        ("Cosmos-Predict1-14B-Video2World", "denoise", 36, 0.1),
        (FLOW, "denoise", 28, 0.2),
        (FLOW, "text", 28, 0.1),
        ("Cosmos-Predict2.5-14B", "denoise", 36, 0.1),
    ],
)
def test_two_blocks_are_there_at_a_time(name: str, stage: str, blocks: int, kept: float) -> None:
    """Beside the weights of no block, and those of the text, less than a share of all."""
    found = planned(name)
    [used] = {each.uses for each in found.stages if each.name == stage}
    weights = found.weights[used]
    away = needs(found)[stage] - needs(found, weights.flag)[stage]
    others = sum(w.nbytes for n, w in found.weights.items() if w.flag == weights.flag and n != used)
    share = (away - others) / weights.nbytes
    assert (1 - 2 / blocks) * (1 - kept) < share < 1 - 2 / blocks


def test_a_plan_names_what_it_streams() -> None:
    """Where there is a GPU, to which blocks can come."""
    found, options = planned(DIFFUSION), {"offload_diffusion_transformer": True}
    flags = ["offload_tokenizer", "offload_diffusion_transformer"]
    streamed = [part.split(" GB")[1] for part in found.describe(flags).split(", ")]
    assert streamed == ["", "", " (streamed)", ""]
    opened = released(DIFFUSION)
    opened = replace(opened, options=opened.family.options.parse(options))
    [line] = describe_plan(opened, PLAIN, lambda compute: planned(DIFFUSION, compute))
    assert found.describe(()) != found.describe(flags)
    assert planned(DIFFUSION, PLAIN).describe() in line


def test_only_what_is_called_block_by_block_is_streamed() -> None:
    """A step of the autoregressive transformer is captured, and shorter than its copy."""
    for name in (AR, DIFFUSION, FLOW):
        streamed = {part for part, w in planned(name).weights.items() if w.streamed is not None}
        assert streamed == ({"decoder"} if name == AR else {"text", "transformer"})
    gathered = planned(DIFFUSION, replace(GPU, sharded=True, mesh=plan_mesh(Layout(cfg=2))))
    assert gathered.weights["transformer"].streamed is None


@pytest.mark.parametrize("name", [AR, DIFFUSION, FLOW])
def test_an_offloaded_guardrail_comes_beside_what_stays(name: str) -> None:
    found = planned(name, guardrail_bytes=10**11)
    flag = found.flags[-1]  # of the transformer
    resident = sum(weights.nbytes for weights in found.weights.values()) + found.workspace
    assert found.peak() == needs(found)["guardrail"] == resident + 10**11
    away = found.weights["transformer"].nbytes
    assert needs(found, flag)["guardrail"] == resident - away + 10**11
    assert "guardrail" not in needs(planned(name))


@pytest.mark.parametrize("name", [DIFFUSION, FLOW])
def test_size_and_length(name: str) -> None:
    large, small = planned(name), planned(name, num_video_frames=57, height=480, width=640)
    assert small.peak() < large.peak()
    # tokenizers work in pieces
    longer = needs(planned(FLOW, num_video_frames=189))
    assert longer["decode"] == needs(planned(FLOW))["decode"]


def test_several_requests_need_as_much_as_the_largest() -> None:
    opened = released(FLOW)
    small, large = (
        opened.family.request.parse({"height": side, "width": side}) for side in (480, 960)
    )
    both = plan(opened, [small, large, small], GPU)
    assert both.peak() == plan(opened, [large], GPU).peak()


def test_batched_and_long_clips() -> None:
    """Each clip brings its cache; a clip beyond the window the past of its decoding alone."""
    opened = released(AR)
    opened = replace(opened, parts={n: opened.parts[n] for n in ("tokenizer", "transformer")})
    model = opened["transformer"].config

    def found(batch_size: int = 1, **options: Any) -> dict[str, int]:
        request = opened.family.request.parse(options)
        return needs(plan(opened, [request], replace(GPU, batch_size=batch_size)))

    one, eight, long = found(), found(8), found(num_video_frames=161)
    cache = 65_536 * model.length  # bytes a token and clip
    assert eight["tokens"] - one["tokens"] == pytest.approx(7 * cache, rel=0.05)
    assert eight["decode"] == one["decode"]
    assert long["tokens"] == one["tokens"]
    assert 0 < long["decode"] - one["decode"] < 1e9


@pytest.mark.parametrize("temporal", [4, 8, 16])
@pytest.mark.parametrize("frames", [2, 3, 5])
def test_the_longest_prefix(frames: int, temporal: int) -> None:
    """As many tokens as a request can give: of an input, or of the window before."""
    opened = released("Cosmos-Predict1-5B-Video2World")
    network, tokenizer = opened["transformer"], opened["tokenizer"]
    model = replace(network.config, grid=LatentShape(frames, 4, 6))
    parts = {
        **opened.parts,
        "transformer": replace(network, config=model),
        "tokenizer": replace(tokenizer, config=replace(tokenizer.config, temporal=temporal)),
    }
    opened = replace(opened, parts=parts)
    own, counts = window_shape(opened).frames, []
    for given, length, way in product((1, 9), (None, own + temporal), ("tokens", "pixels")):
        try:
            checked(
                opened, prompt="x", num_input_frames=given, num_video_frames=length, rollout=way
            )
        except InputError:
            continue
        counts.append(latent_frames_of(given, temporal))
        if length and way == "pixels":
            counts.append(min(CARRIED, frames - 1))
    most = model.leading_tokens + max(counts) * model.grid.tokens_per_frame
    assert longest_prefix(opened) == most


def test_a_prefix_is_planned_for() -> None:
    """Two latent frames of three are more than half a window; a window of six begins alike."""
    opened, found = released(AR), {}
    for frames in (3, 6):
        network = opened["transformer"]
        model = replace(network.config, grid=LatentShape(frames, 40, 64))
        parts = {**opened.parts, "transformer": replace(network, config=model)}
        [stage] = [
            stage
            for stage in plan(
                replace(opened, parts=parts), [opened.family.request.parse({})], GPU
            ).stages
            if stage.name == "tokens"
        ]
        cache = 2 * model.depth * model.length * model.num_kv_heads * model.head_size
        found[frames] = stage.activations - cache * GPU.dtype.itemsize
    assert found[3] == found[6]


@pytest.mark.parametrize("size", ["7B", "14B"])
def test_plans_are_what_was_measured(size: str) -> None:
    """On one H200, by `benchmarks/diffusion_end_to_end.py`, when the transformer moved whole."""
    path = BENCHMARKS / f"diffusion_end_to_end_{size.lower()}.json"
    stages = json.loads(path.read_text())["runs"]["offload_all"]["stages"]
    [measured] = [stage["peak_gb"] for stage in stages if stage["name"] == "denoise"]
    found = planned(f"Cosmos-Predict1-{size}-Video2World")
    assert found.flags[-1] == "offload_diffusion_transformer"
    assert measured <= needs(found, *found.flags[:-1])["denoise"] / 1e9 <= 1.05 * measured


class Live(TorchDispatchMode):
    """Counter of the bytes of living results.

    Attributes:
        peak: the most at one time.
    """

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: one for key, one in self._live.items() if not one[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._live.values()))
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("at_once", "cached"), [(1 << 20, 0), (1 << 30, 0), (1 << 30, 2)])
def test_denoising_without_kernels(
    dtype: torch.dtype, at_once: int, cached: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is done in place then; the feed-forward in parts, or at once."""
    monkeypatch.setattr("worldline.nn.dit.HIDDEN_BYTES", at_once)
    sizes: dict[str, Any] = {"width": 1024, "num_heads": 8, "head_size": 128, "hidden": 4096}
    large = replace(config(condition_mask=False), **sizes, max_grid=LatentShape(2, 16, 16))
    model = DiT(large).to(dtype).requires_grad_(False)
    draw_weights(model)
    grid = LatentShape(2, 32, 32)
    fused, plain = (
        denoise_bytes(large, grid, dtype, 8, fused=fused, cached=cached) for fused in (True, False)
    )
    cache = StepCache("steps:0-2", [2.0, 1.0, 0.5]) if cached else None
    with torch.inference_mode(), Live(model.parameters()) as live:
        context = model.encode_context(torch.randn(1, 8, CONTEXT_WIDTH))
        positions = model.make_positions(grid, 24.0)
        x = torch.randn(1, 16, 2, 32, 32)
        for branch in [True, False] * cached or [True]:
            if cache:
                cache.enter(x, branch)
            model(x, torch.ones(1), context, positions, cache=cache)
    assert fused < live.peak <= plain <= 1.3 * live.peak


def test_kernels_are_planned_for_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    options, found = released(DIFFUSION).options, []
    monkeypatch.setattr("worldline.opening.choose_device", lambda device: CUDA)
    for triton in (True, False):
        monkeypatch.setattr("worldline.nn.modulation.has_triton", lambda found=triton: found)
        compute = choose_compute(options)
        found.append(planned(DIFFUSION, compute))
    flags = found[0].flags
    assert found[1].peak(flags) > found[0].peak(flags) + 2e9


def test_embeddings_need_no_room_for_the_text_encoder(
    tiny_diffusion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"prompt_embeddings": torch.ones(3, CONTEXT_WIDTH), "guidance": 0}
    opened = open_named(
        VIDEO2WORLD, tiny_diffusion, disable_guardrail=True, disable_prompt_upsampler=True
    )
    sizes = {**DEFAULTS, "num_input_frames": 1}
    prompted, embedded = (
        checked(opened, **{**sizes, **words}) for words in ({"prompt": "x"}, words)
    )
    found = [plan(opened, [request], PLAIN).peak() for request in (prompted, embedded)]
    assert found[0] - found[1] >= opened["text"].num_parameters * 4
    free = sum(found) // 2
    monkeypatch.setattr(memory, "device_memory", lambda _: Memory(free, free))
    assert load_world(opened, [embedded], PLAIN)
    with pytest.raises(InsufficientMemoryError, match=r"host memory"):
        load_world(opened, [prompted], PLAIN)


# need by offload flags: "a" is the cheaper one
NEEDS = {frozenset(): 10, frozenset("a"): 8, frozenset("b"): 9, frozenset("ab"): 3}


class Fixed(Plan):
    """A plan of given needs."""

    def peak(self, offloaded: Iterable[str] = ()) -> int:
        return NEEDS[frozenset(offloaded)]


@pytest.mark.parametrize(
    ("free", "given", "advice"),
    [
        (10, "", ""),
        (9, "b", ""),
        (3, "ab", ""),
        (8, "", "; add a=True, which needs"),
        (3, "", "; add a=True, b=True, which needs"),
        (3, "a", "; add b=True, which needs"),
        (3, "b", "; add a=True, which needs"),
        (2, "", "; all offload options together need"),
        (2, "ab", "; all offload options together need"),
    ],
)
def test_advice_is_enough(
    free: int, given: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flags that are named let the plan fit, with those that are set already."""
    found = Fixed("x", {}, (), ("a", "b"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80))
    if not advice:
        found.refuse_unless_fits(CUDA, tuple(given))
        return
    with pytest.raises(InsufficientMemoryError, match=f"^x needs .*GPU memory.*{advice}.*; more$"):
        found.refuse_unless_fits(CUDA, tuple(given), "; more")


@pytest.mark.parametrize("name", [AR, DIFFUSION, FLOW])
def test_host_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where offloading moves nothing, and would need more."""
    found, cpu = planned(name, PLAIN), torch.device("cpu")
    monkeypatch.setattr(memory, "host_memory", lambda: Memory(1, 8_000_000_000))
    message = rf"^{name} needs about [\d.]+ GB of host memory, 0\.0 of 8\.0 GB are free$"
    with pytest.raises(InsufficientMemoryError, match=message):
        found.refuse_unless_fits(cpu, found.flags)


@pytest.mark.parametrize("name", [entry.name for entry in ENTRIES])
def test_how_released_models_fit(name: str) -> None:
    fit: Any = partial(fit_released, ENTRY[name], GPU)
    whole = fit(Memory(10**12, 10**12))
    if whole is None:
        assert ENTRY[name].command in ("", "tokenize")
        return
    assert whole == fit(Memory(whole.need, whole.need))
    assert (whole.fits, whole.flags, str(whole)) == (True, (), "yes")
    # a device a little smaller needs a flag, and the plan names the cheapest that is enough
    less = fit(Memory(whole.need - 1, whole.need))
    assert less.fits
    assert len(less.flags) == 1
    assert less.need < whole.need
    tiny = fit(Memory(10, 10))
    assert (tiny.fits, str(tiny)) == (False, "no, too little memory")


def test_a_part_is_left_out_where_a_model_fits_only_so() -> None:
    """As on a CPU, where there is nothing to offload to."""
    whole = fit_released(ENTRY[AR], PLAIN, Memory(10**12, 10**12))
    assert whole is not None
    without = fit_released(ENTRY[AR], PLAIN, Memory(whole.need - 1, whole.need))
    assert without is not None
    assert (without.fits, without.flags) == (True, ("disable_diffusion_decoder",))
    assert without.need < whole.need


@pytest.mark.parametrize(
    ("free", "guarded", "clips", "beside", "fits"),
    [
        (30_000_000, False, 1, 0, True),
        (29_999_999, False, 1, 0, False),
        (59_999_999, True, 1, 0, False),
        (60_000_000, True, 1, 0, True),
        (89_999_999, False, 3, 0, False),
        (30_000_010, False, 1, 10, True),
        (30_000_010, False, 1, 11, False),
    ],
)
def test_frames_without_room(
    free: int, guarded: bool, clips: int, beside: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All frames are held at last, beside what the networks need."""
    family: Any = SimpleNamespace(
        video=lambda *_: VideoShape(1000, 100, 100), holds_batch=lambda *_: True
    )
    opened: Any = SimpleNamespace(family=family)
    monkeypatch.setattr(guards, "release_of", lambda _: "all" if guarded else None)
    monkeypatch.setattr(memory, "host_memory", partial(Memory, free, 10**10))
    message = r"^num_video_frames is 1000: .* 100 x 100"
    with nullcontext() if fits else pytest.raises(InsufficientMemoryError, match=message):
        guards.check_frames(opened, None, clips, beside)


def test_an_automatic_batch_shrinks_until_it_fits(
    small_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the device as well as for the frames, which clips in step hold together."""
    opened = open_named(MODEL, small_world, disable_guardrail=True, disable_diffusion_decoder=True)
    opened = replace(opened, family=replace(opened.family, max_batch_size=lambda *_: 4))
    request = checked(opened, num_video_frames=160_001, rollout="pixels")
    peaks = [plan(opened, [request], replace(PLAIN, batch_size=n)).peak() for n in (1, 2, 3)]
    held = 160_001 * 32 * 48 * 3
    for free, size in (
        (peaks[0] + held, 1),
        (peaks[1] + 2 * held, 2),
        (peaks[2] + 3 * held - 1, 2),
        (peaks[2] + 3 * held, 3),
        (10**12, 4),
    ):
        monkeypatch.setattr(memory, "host_memory", partial(Memory, free, free))
        assert load_world(opened, [request] * 5, PLAIN).parts.compute.batch_size == size
    monkeypatch.setattr(memory, "host_memory", partial(Memory, peaks[0] + held - 1, 10**12))
    with pytest.raises(InsufficientMemoryError, match="num_video_frames is 160001"):
        load_world(opened, [request] * 5, PLAIN)


def test_tiny_worlds_have_a_plan(
    whole_world: Path, tiny_diffusion: Path, tiny_predict2_5: Path
) -> None:
    for name, root, flags in (
        (MODEL, whole_world, 3),
        (PROMPTED, whole_world, 4),
        (VIDEO2WORLD, tiny_diffusion, 3),
        (POST.name, tiny_predict2_5, 3),
    ):
        opened = open_named(name, root)
        found = plan(opened, [opened.family.request.parse(opened.defaults)], PLAIN)
        assert len(found.flags) == flags
        assert found.peak() > sum(weights.nbytes for weights in found.weights.values())


def test_a_process_takes_its_share_of_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for count in (1, 4):
        monkeypatch.setattr(memory.job, "neighbours", lambda count=count: count)
        found[count] = memory.host_memory()
    assert found[4].free == pytest.approx(found[1].free / 4, rel=0.2)  # others take and free some
    assert found[4].total == found[1].total
    assert str(found[1]).endswith("GB are free")
    assert str(found[4]).endswith("GB are free for each process")


def test_processes_of_one_machine_offload_into_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planned(FLOW)
    flags = [found.weights["text"].flag, found.weights["transformer"].flag]
    waiting = sum(each.nbytes for each in found.weights.values() if each.flag in flags)
    monkeypatch.setattr(memory, "device_memory", lambda _: Memory(10**12, 10**12))
    monkeypatch.setattr(memory, "host_memory", lambda: Memory(waiting - 1, 10**12))
    found.refuse_unless_fits(CUDA, flags)
    monkeypatch.setattr(memory.job, "neighbours", lambda: 4)
    found.refuse_unless_fits(CUDA, flags[:1])
    with pytest.raises(InsufficientMemoryError, match=f"{waiting / 1e9:.1f} GB .* 4 .*fsdp='on'"):
        found.refuse_unless_fits(CUDA, flags)
