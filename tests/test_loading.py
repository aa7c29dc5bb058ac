"""Which files a name leads to, and how much memory they will need."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import worldline
from worldline import loading, locate, machine
from worldline.choices import CARRIED
from worldline.errors import CheckpointError, InputError, InsufficientMemoryError
from worldline.loading import MemoryPlan
from worldline.machine import Memory
from worldline.families.autoregressive.model import PRESETS
from worldline.pipelines.autoregressive import check_room
from worldline.pipelines.requests import AutoregressiveRequest
from worldline.report import Recorder
from worldline.shapes import LatentShape, latent_frames_of
from worldline.tokenizers.cosmos.model import PRESETS as TOKENIZERS
from worldline.weights.read import SHARDED_AXES, open_checkpoint
from worldline.weights.write import save

from .conftest import MODEL, SMALL_TOKENIZER, SMALL_TRANSFORMER, TOKENIZER
from .offloading import stand_for_a_gpu

OLD_MODEL = "Cosmos-1.0-Autoregressive-4B"
OLD_TOKENIZER = "Cosmos-1.0-Tokenizer-DV8x16x16"


def test_by_name_by_path_and_by_file(small_world: Path) -> None:
    for name in (MODEL, small_world / MODEL, small_world / MODEL / "model.pt"):
        files = loading.find_autoregressive(name, small_world)
        assert files.folder == small_world / MODEL
        assert files.config == SMALL_TRANSFORMER
        assert files.tokenizer_config.vocabulary == SMALL_TOKENIZER.vocabulary
        assert not files.bundled
    # the tokenizer is found beside the model, wherever --checkpoint_dir points
    assert loading.find_autoregressive(small_world / MODEL, "nowhere").folder.name == MODEL


def save_changed(path: Path, target: Path) -> None:
    """Save the model of `path` with another norm."""
    source = open_checkpoint(path)
    tensors = {name: source.read(name).clone() for name in source.tensors}
    tensors["model.norm.weight"] += 1
    save(tensors, target)


def cut(path: Path, ranks: int, stem: str) -> None:
    """Save the model of `path` as tensor-parallel shards beside it."""
    source = open_checkpoint(path)
    for rank in range(ranks):
        shard = {}
        for name in source.tensors:
            axis = next(axis for pattern, axis in SHARDED_AXES.items() if fnmatch(name, pattern))
            whole = source.read(name)
            shard[name] = whole if axis is None else whole.chunk(ranks, axis)[rank].clone()
        torch.save(shard, path.with_name(f"{stem}_model_mp_{rank}.pt"))


def test_the_named_file_is_opened(own_world: Path) -> None:
    folder = own_world / MODEL
    save_changed(folder / "model.pt", folder / "model.safetensors")
    save_changed(folder / "model.pt", folder / "mine.pt")
    for name in ("model.pt", "model.safetensors", "mine.pt"):
        files = loading.find_autoregressive(folder / name, own_world)
        assert files.transformer.path == folder / name
        assert files.config == SMALL_TRANSFORMER  # config.json of the folder counts
        assert files.identity()["transformer"][0]["path"] == str(folder / name)
    files = loading.find_autoregressive(f"{MODEL}/mine.pt", own_world)
    assert files.transformer.path == folder / "mine.pt"


def test_a_named_shard_opens_its_set(own_world: Path) -> None:
    folder = own_world / MODEL
    for stem in ("model", "iter_000000002"):
        cut(folder / "model.pt", 2, stem)
    (folder / "model.pt").unlink()
    with pytest.raises(CheckpointError, match=r"several sets.* such as .*_model_mp_0\.pt"):
        loading.find_autoregressive(folder, own_world)
    named = folder / "iter_000000002_model_mp_1.pt"
    files = loading.find_autoregressive(named, own_world)
    names = [path.name for path in files.transformer.files]
    assert names == [f"iter_000000002_model_mp_{rank}.pt" for rank in range(2)]


@pytest.mark.parametrize("settings", [True, False])
def test_a_missing_last_shard(own_world: Path, settings: bool) -> None:
    folder = own_world / MODEL
    cut(folder / "model.pt", 4, "model")
    (folder / "model.pt").unlink()
    for rank in (2, 3):
        (folder / f"model_model_mp_{rank}.pt").unlink()
    if not settings:
        (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"\(is a shard missing\?\)$"):
        loading.find_autoregressive(MODEL, own_world)


def test_without_settings_the_grid_is_told(
    own_world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (own_world / MODEL / "config.json").unlink()
    with caplog.at_level("INFO", logger="worldline"):
        assert loading.find_autoregressive(MODEL, own_world).config.grid.frames == 5
    assert f"no config.json in {own_world / MODEL}: released grid 5 x 40 x 64 assumed" in (
        caplog.text
    )


def test_what_the_settings_expect_is_told(own_world: Path) -> None:
    path = own_world / MODEL / "config.json"
    settings = json.loads(path.read_text())
    for field in ("dim", "n_layers", "n_heads", "head_dim", "ffn_hidden_size"):
        path.write_text(json.dumps({**settings, field: 2 * settings[field]}))
        with pytest.raises(CheckpointError, match="does not fit the model"):
            loading.find_autoregressive(MODEL, own_world)


def test_every_searched_folder_is_named(own_world: Path, tmp_path: Path) -> None:
    (own_world / TOKENIZER).rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"is in {tmp_path} or {own_world}$"):
        loading.find_autoregressive(own_world / MODEL, tmp_path)


def test_a_tokenizer_that_was_not_downloaded(own_world: Path) -> None:
    for half in ("encoder", "decoder"):
        path = own_world / TOKENIZER / f"{half}.safetensors"
        path.rename(path.with_name(f"{half}.jit.part"))
    with pytest.raises(CheckpointError, match=r"not finished \(decoder\.jit\.part, encoder"):
        loading.find_autoregressive(MODEL, own_world)


def test_both_generations(own_world: Path) -> None:
    (own_world / MODEL).rename(own_world / OLD_MODEL)
    files = loading.find_autoregressive(OLD_MODEL, own_world)
    assert files.tokenizer.source.path.name == TOKENIZER
    shutil.copytree(own_world / TOKENIZER, own_world / OLD_TOKENIZER)
    files = loading.find_autoregressive(OLD_MODEL, own_world)
    assert files.tokenizer.source.path.name == OLD_TOKENIZER


def test_a_folder_s_name_is_only_a_hint(own_world: Path) -> None:
    renamed = own_world / "my_post-trained_12B"
    (own_world / MODEL).rename(renamed)
    (renamed / "model.pt").rename(renamed / "iter_000000100.pt")
    files = loading.find_autoregressive(renamed.name, own_world)
    assert files.config == SMALL_TRANSFORMER


def test_the_stored_latent_shape_is_used(own_world: Path) -> None:
    path = own_world / MODEL / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "video_latent_shape": [5, 4, 2]}))
    files = loading.find_autoregressive(MODEL, own_world)
    grid = files.config.grid
    assert (grid.frames, grid.height, grid.width) == (5, 4, 2)


def test_bundled(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "BUNDLED", small_world)
    assert locate.bundled_names() == [f"tiny-{MODEL}"]
    assert loading.find_autoregressive(f"tiny-{MODEL}", "nowhere").bundled
    with pytest.raises(CheckpointError, match=rf"no bundled model tiny-x; there are: tiny-{MODEL}"):
        loading.find_autoregressive("tiny-x", "nowhere")
    monkeypatch.setattr(locate, "BUNDLED", small_world / "nowhere")
    assert locate.bundled_names() == []


def test_what_ships_is_small() -> None:
    """At most 8 MB a model and 32 MB for all, so that the whole tree stays small."""
    sizes = {
        folder.name: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        for folder in locate.BUNDLED.iterdir()
    }
    assert locate.bundled_names()
    assert max(sizes.values()) <= 8e6
    assert sum(sizes.values()) <= 32e6


def test_what_is_there_is_listed(small_world: Path) -> None:
    with pytest.raises(CheckpointError, match=f"holds: {MODEL}, {TOKENIZER}"):
        loading.find_autoregressive("Cosmos-Predict1-12B", small_world)


def test_plans() -> None:
    """Offloading lowers the need, and a larger model needs more."""
    plan = loading.plan_autoregressive
    tokenizer = TOKENIZERS["DV8x16x16"]
    need = {
        size: plan(PRESETS[size], tokenizer, dtype=torch.bfloat16).peak for size in ("4B", "12B")
    }
    assert 8e9 < need["4B"] <= 13e9
    assert 23e9 < need["12B"] <= 29e9
    for size in need:
        whole = plan(PRESETS[size], tokenizer, dtype=torch.bfloat16)
        for flag in ("offload_tokenizer", "offload_ar_model"):
            less = plan(PRESETS[size], tokenizer, dtype=torch.bfloat16, **{flag: True})
            assert less.peak <= whole.peak
        less = plan(PRESETS[size], tokenizer, dtype=torch.bfloat16, offload_ar_model=True)
        assert less.decode < whole.decode


def test_a_visitor_comes_beside_what_stays() -> None:
    """What is offloaded is away then; a visitor of nothing is none."""
    config, tokenizer = PRESETS["4B"], TOKENIZERS["DV8x16x16"]

    def plan(**options: int) -> MemoryPlan:
        return loading.plan_autoregressive(config, tokenizer, dtype=torch.bfloat16, **options)  # type: ignore[arg-type]

    assert plan().visit == 0
    stays, waits = plan(visitor_bytes=1), plan(visitor_bytes=1, offload_ar_model=True)
    assert 8e9 < stays.visit - waits.visit < stays.visit
    large = plan(visitor_bytes=10**11)
    assert large.visit - stays.visit == 10**11 - 1
    assert large.peak == large.visit
    assert stays.peak == plan().peak


@pytest.mark.parametrize("temporal", [4, 8, 16])
@pytest.mark.parametrize("frames", [2, 3, 5])
def test_most_given(frames: int, temporal: int) -> None:
    """As many tokens as a request can give: of an input, or of the window before."""
    config = replace(PRESETS["5B-Video2World"], grid=LatentShape(frames, 4, 6))
    tokenizer = replace(TOKENIZERS["DV8x16x16"], temporal=temporal)
    own = loading.video_shape(config, tokenizer).frames
    counts = []
    for given, length, way in product((1, 9), (None, own + temporal), ("tokens", "pixels")):
        request = AutoregressiveRequest(
            num_input_frames=given, num_video_frames=length, rollout=way
        )
        try:
            check_room(config, tokenizer, request)
        except InputError:
            continue
        counts.append(latent_frames_of(given, temporal))
        if length and way == "pixels":
            counts.append(CARRIED)
    most = config.leading_tokens + max(counts) * config.grid.tokens_per_frame
    assert loading.autoregressive.most_given(config, tokenizer) == most


def test_the_plan_knows_how_much_is_given() -> None:
    """Two latent frames of three are more than half a window; a window of six begins alike."""
    tokenizer, dtype = TOKENIZERS["DV8x16x16"], torch.bfloat16
    need = {}
    for frames in (3, 6):
        config = replace(PRESETS["4B"], grid=LatentShape(frames, 40, 64))
        plan = loading.plan_autoregressive(config, tokenizer, dtype=dtype)
        cache = 2 * config.depth * config.length * config.num_kv_heads * config.head_size
        need[frames] = plan.tokens - cache * dtype.itemsize
    assert need[3] == need[6]


def test_too_little_memory(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1, 8_000_000_000))
    files = loading.find_autoregressive(MODEL, small_world)
    device = torch.device("cuda")
    with pytest.raises(InsufficientMemoryError, match=r"needs about .* 0\.0 of 8\.0 GB are free"):
        loading.load_autoregressive(files, device, torch.bfloat16, Recorder(torch.device("cpu")))


def test_memory_advice_is_enough(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags that are named let the world fit, with what is given already."""
    files = loading.find_autoregressive(MODEL, small_world)
    needs = {(False, False): 10, (True, False): 8, (False, True): 9, (True, True): 3}

    def plan(*_: object, **flags: object) -> MemoryPlan:
        need = needs[tuple(bool(flags.get(name)) for name in files.offload_flags)]
        return MemoryPlan(need, 0, 0)

    def advice(free: int, *given: str) -> str:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80))
        try:
            loading._check_memory(files, torch.device("cuda"), torch.bfloat16, given)
        except InsufficientMemoryError as error:
            return str(error).partition("; ")[2]
        return "fits"

    monkeypatch.setattr(loading, "plan_autoregressive", plan)
    assert advice(10) == "fits"
    assert advice(8).startswith("with --offload_tokenizer it needs")
    assert advice(3).startswith("with --offload_tokenizer --offload_ar_model it needs")
    assert advice(3, "offload_tokenizer").startswith("with --offload_ar_model it needs")
    assert advice(3, "offload_ar_model").startswith("with --offload_tokenizer it needs")
    assert advice(3, *files.offload_flags) == "fits"
    assert advice(9, "offload_ar_model") == "fits"
    for given in ((), files.offload_flags):
        assert advice(2, *given).startswith("no offload flag is enough (at least")


def test_too_little_host_memory(small_world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = loading.find_autoregressive(MODEL, small_world)
    device = torch.device("cpu")
    monkeypatch.setattr(machine, "host_memory", lambda: Memory(1, 8_000_000_000))
    with pytest.raises(InsufficientMemoryError, match=r"of host memory, 0\.0 of 8\.0 GB are free$"):
        loading.load_autoregressive(files, device, torch.float32, Recorder(device))
    monkeypatch.setattr(machine, "host_memory", lambda: None)
    loading.load_autoregressive(files, device, torch.float32, Recorder(device))


def test_devices() -> None:
    assert loading.choose_device("cpu") == torch.device("cpu")
    for wrong in ("abacus", "cuda:99", 1.5):
        with pytest.raises(InputError, match=f"no device {wrong} here"):
            loading.choose_device(wrong)  # type: ignore[arg-type]
    assert loading.compute_dtype(torch.device("cpu")) == torch.float32
    assert loading.compute_dtype(torch.device("cuda")) == torch.bfloat16


def test_offloading_changes_no_video(
    small_world: Path, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = []
    for offload in (False, True):
        visits = stand_for_a_gpu(monkeypatch) if offload else []
        world = worldline.load(
            MODEL,
            small_world,
            disable_guardrail=True,
            disable_diffusion_decoder=True,
            offload_ar_model=offload,
            offload_tokenizer=offload,
        )
        videos.append(world.generate(clip).frames)
    assert visits == ["CosmosTokenizer", "ARTransformer", "CosmosTokenizer"]
    assert np.array_equal(videos[0], videos[1])
