"""Which files a diffusion world's name leads to, what is refused, and how much memory it needs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worldline.choices import DIFFUSION_OFFLOAD_FLAGS, NEGATIVE_PROMPT
from worldline.loading import AutoregressiveFiles, DiffusionFiles, DiffusionParts, DiffusionPlan
from worldline.loading.memory import workspace
from worldline.machine import Memory

import worldline.world
from tiny.export import cosmos_settings, draw_weights, stored_tensors
from worldline import loading, places
from worldline.catalog import ENTRIES
from worldline.errors import CheckpointError, InputError, InsufficientMemoryError
from worldline.families.diffusion.model import PRESETS, RELEASED_RATIOS, DiT
from worldline.report import Recorder
from worldline.shapes import LatentShape, VideoShape
from worldline.tokenizers.cosmos.model import PRESETS as TOKENIZERS
from worldline.tokenizers.cosmos.weights import key_map
from worldline.weights.read import open_checkpoint
from worldline.weights.write import save

from .conftest import MODEL as AUTOREGRESSIVE
from .conftest import TOKENIZER as DISCRETE
from .diffusers_layout import diffusers_config, diffusers_tensors
from .tiny_diffusion import (
    CONTEXT_LENGTH,
    CONTEXT_WIDTH,
    CONTINUOUS,
    TEXT2WORLD,
    TEXT_ENCODER,
    VIDEO2WORLD,
    config,
    write_tokenizer,
)

OLD = "Cosmos-1.0-Diffusion-7B-Text2World"
OLD_CONTINUOUS = "Cosmos-1.0-Tokenizer-CV8x8x8"
CPU = torch.device("cpu")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks" / "results"


def find(name: str | Path, folder: str | Path, **options: Any) -> DiffusionFiles:
    return loading.find_diffusion(name, folder, **options)


def change(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_by_name_by_path_and_by_file(tiny_diffusion: Path) -> None:
    for name in (TEXT2WORLD, tiny_diffusion / TEXT2WORLD, tiny_diffusion / TEXT2WORLD / "model.pt"):
        files = find(name, tiny_diffusion)
        assert files.folder == tiny_diffusion / TEXT2WORLD
        assert files.config == config(condition_mask=False)
        assert files.generation == "Predict1"
        assert files.tokenizer_config.levels is None
        assert files.statistics.frames == 16
        assert files.text is not None
        assert files.context_length == CONTEXT_LENGTH
        assert files.defaults.text2world
        assert not files.bundled
    # the parts are found beside the model, wherever --checkpoint_dir points
    assert find(tiny_diffusion / VIDEO2WORLD, "nowhere").folder.name == VIDEO2WORLD


def test_either_family_by_what_the_folder_holds(small_world: Path, tiny_diffusion: Path) -> None:
    assert isinstance(loading.find_world(AUTOREGRESSIVE, small_world), AutoregressiveFiles)
    assert isinstance(loading.find_world(VIDEO2WORLD, tiny_diffusion), DiffusionFiles)
    with pytest.raises(CheckpointError, match="is a diffusion world, not an autoregressive one"):
        loading.find_autoregressive(TEXT2WORLD, tiny_diffusion)
    with pytest.raises(CheckpointError, match="is no diffusion transformer"):
        find(AUTOREGRESSIVE, small_world)
    with pytest.raises(InputError, match="an autoregressive world, which has no tokenizer_dir"):
        loading.find_world(AUTOREGRESSIVE, small_world, tokenizer_dir="x")


def test_the_generation(own_diffusion: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As asked; else by the name of the model's own folder, which a hub cache has above it."""
    shutil.copytree(own_diffusion / TEXT2WORLD, own_diffusion / OLD)
    shutil.copytree(own_diffusion / TEXT2WORLD, own_diffusion / "mine")
    shutil.copytree(own_diffusion / TEXT2WORLD, own_diffusion / f"{TEXT2WORLD}_post-trained-lora")
    cache = Path(f"models--nvidia--{OLD}") / "snapshots" / "0a1b"
    inside = Path("Cosmos-1.0-Diffusion-runs") / "mine"
    for name in (cache, inside):
        shutil.copytree(own_diffusion / TEXT2WORLD, own_diffusion / name)
    for part in (CONTINUOUS, TEXT_ENCODER):
        for name in (cache, inside):
            shutil.copytree(own_diffusion / part, own_diffusion / name.parent / part)
    for name, asked, found in (
        (OLD, None, "1.0"),
        (OLD, "Predict1", "Predict1"),
        (cache, None, "1.0"),
        (cache, "Predict1", "Predict1"),
        (inside, None, "Predict1"),
        (TEXT2WORLD, "1.0", "1.0"),
        (f"{TEXT2WORLD}_post-trained-lora", None, "Predict1"),
        ("mine", None, "Predict1"),
        ("mine", "1.0", "1.0"),
    ):
        assert find(name, own_diffusion, generation=asked).generation == found
    with caplog.at_level("INFO", logger="worldline"):
        find(OLD, own_diffusion, generation="Predict1")
    assert f"generation Predict1 as asked, though {OLD} is named as one of 1.0" in caplog.text
    with pytest.raises(InputError, match="generation is '2'; it must be"):
        find("mine", own_diffusion, generation="2")


def test_tokenizers_of_both_generations(own_diffusion: Path) -> None:
    shutil.copytree(own_diffusion / TEXT2WORLD, own_diffusion / OLD)
    shutil.copytree(own_diffusion / CONTINUOUS, own_diffusion / OLD_CONTINUOUS)
    assert find(TEXT2WORLD, own_diffusion).tokenizer.source.path.name == CONTINUOUS
    assert find(OLD, own_diffusion).tokenizer.source.path.name == OLD_CONTINUOUS
    shutil.rmtree(own_diffusion / CONTINUOUS)
    assert find(TEXT2WORLD, own_diffusion).tokenizer.source.path.name == OLD_CONTINUOUS
    shutil.rmtree(own_diffusion / OLD_CONTINUOUS)
    with pytest.raises(CheckpointError, match="no continuous tokenizer: neither Cosmos-Tok"):
        find(TEXT2WORLD, own_diffusion)


def test_another_tokenizer(own_diffusion: Path, small_world: Path, tmp_path: Path) -> None:
    write_tokenizer(own_diffusion / "other", channels=8)
    write_tokenizer(tmp_path / "elsewhere", channels=8)
    for named in ("other", tmp_path / "elsewhere", str(tmp_path / "elsewhere")):
        assert find(TEXT2WORLD, own_diffusion, tokenizer_dir=named).tokenizer_config.channels == 8
    with pytest.raises(CheckpointError, match=r"no folder absent \(--tokenizer_dir\), nor is it"):
        find(TEXT2WORLD, own_diffusion, tokenizer_dir="absent")
    with pytest.raises(CheckpointError, match="is a discrete tokenizer; a diffusion world needs"):
        find(TEXT2WORLD, own_diffusion, tokenizer_dir=small_world / DISCRETE)
    write_tokenizer(own_diffusion / "narrow", latent_channels=8)
    with pytest.raises(CheckpointError, match=r"latents of 8 channels.*do not belong together"):
        find(TEXT2WORLD, own_diffusion, tokenizer_dir="narrow")


def test_missing_statistics(own_diffusion: Path) -> None:
    (own_diffusion / CONTINUOUS / "mean_std.pt").rename(own_diffusion / CONTINUOUS / "x.part")
    with pytest.raises(CheckpointError, match=r"no mean_std\.pt, .*not finished \(x\.part\)"):
        find(TEXT2WORLD, own_diffusion)


def test_statistics_of_other_latents(own_diffusion: Path) -> None:
    path = own_diffusion / CONTINUOUS / "mean_std.pt"
    for shape, frames in (((16 * 5,), 5), ((16, 3), 3), ((1, 16), 1)):
        torch.save((torch.zeros(shape), torch.ones(shape)), path)
        assert find(TEXT2WORLD, own_diffusion).statistics.frames == frames
    for shape in ((8, 16), (17 * 16 + 1,)):
        torch.save((torch.zeros(shape), torch.ones(shape)), path)
        with pytest.raises(CheckpointError, match=r"mean_std\.pt has .* of 16 channels"):
            find(TEXT2WORLD, own_diffusion)
    path.unlink()
    save({"mean": torch.zeros(8, 4), "std": torch.ones(8, 4)}, path.with_suffix(".safetensors"))
    with pytest.raises(CheckpointError, match=r"of 8 channels, .* of 16"):
        find(TEXT2WORLD, own_diffusion)


def test_missing_and_other_text_encoders(own_diffusion: Path) -> None:
    elsewhere = own_diffusion / "mine"
    (own_diffusion / TEXT_ENCODER).rename(elsewhere)
    files = find(TEXT2WORLD, own_diffusion)
    assert files.text is None
    assert files.why_no_text == (
        f"there is no text encoder: no folder google-t5/t5-11b in {own_diffusion}"
    )
    for named in ("mine", elsewhere):
        files = find(TEXT2WORLD, own_diffusion, text_encoder_dir=named)
        assert files.text is not None
    with pytest.raises(CheckpointError, match=r"no folder absent \(--text_encoder_dir\)"):
        find(TEXT2WORLD, own_diffusion, text_encoder_dir="absent")
    # as the hub keeps it
    shutil.copytree(elsewhere, own_diffusion / "models--google-t5--t5-11b" / "snapshots" / "0a1b")
    assert find(TEXT2WORLD, own_diffusion).text is not None


def test_a_text_encoder_that_is_not_whole(own_diffusion: Path) -> None:
    weights = own_diffusion / TEXT_ENCODER / "model.safetensors"
    weights.write_bytes(b"x")  # seen at the first prompt
    files = find(TEXT2WORLD, own_diffusion).text
    assert files is not None
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        files.load("cpu", torch.float32)
    weights.unlink()
    assert find(TEXT2WORLD, own_diffusion).text is None
    assert "holds no weights" in find(TEXT2WORLD, own_diffusion).why_no_text
    with pytest.raises(CheckpointError):
        find(TEXT2WORLD, own_diffusion, text_encoder_dir=TEXT_ENCODER)


def test_a_text_encoder_of_another_width(own_diffusion: Path) -> None:
    from tiny.encoders import export_t5, new_t5

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    export_t5(new_t5(sizes), own_diffusion / TEXT_ENCODER)
    files = find(TEXT2WORLD, own_diffusion)
    assert files.text is None
    assert re.search("width 16, .* 24", files.why_no_text)
    with pytest.raises(CheckpointError, match=r"width 16, .* 24"):
        find(TEXT2WORLD, own_diffusion, text_encoder_dir=TEXT_ENCODER)


def write_diffusers(own: Path, parts: DiffusionParts) -> Path:
    """Write a transformer as diffusers does; return its file."""
    (own / "transformer").mkdir(parents=True)
    weights = own / "transformer" / "diffusion_pytorch_model.safetensors"
    save(diffusers_tensors(parts.transformer.module), weights)
    settings = diffusers_config(parts.config)
    (own / "transformer" / "config.json").write_text(json.dumps(settings))
    return weights


def write_vae(own: Path, parts: DiffusionParts) -> None:
    (own / "vae").mkdir()
    coder, statistics = parts.tokenizer.module, parts.files.statistics
    tensors = stored_tensors(coder, key_map(coder.config, True))
    save(tensors, own / "vae" / "diffusion_pytorch_model.safetensors")
    (own / "vae" / "config.json").write_text(json.dumps(cosmos_settings(coder.config, statistics)))


def write_text_encoder(own: Path, source: Path) -> None:
    shutil.copytree(source / TEXT_ENCODER, own / "text_encoder")
    (own / "tokenizer").mkdir()
    (own / "text_encoder" / "tokenizer_config.json").rename(
        own / "tokenizer" / "tokenizer_config.json"
    )


def test_a_folder_of_both_layouts(own_diffusion: Path) -> None:
    """As the repositories of 1.0 are: everything follows the file that is opened."""
    own = own_diffusion / VIDEO2WORLD
    found = find(VIDEO2WORLD, own_diffusion)
    parts = loading.load_diffusion(found, CPU, torch.float32, Recorder(CPU))
    write_diffusers(own, parts)
    write_vae(own, parts)
    write_text_encoder(own, own_diffusion)
    change(own / "config.json", fps=12)
    for name in (own, own / "model.pt"):
        files = find(name, own_diffusion)
        assert (files.folder, files.dit.layout, files.defaults.fps) == (own, "nvidia", 12)
        assert files.tokenizer.source.path == own_diffusion / CONTINUOUS
        assert files.text is not None
        assert files.text.folder == own_diffusion / TEXT_ENCODER
    files = find(own / "transformer", own_diffusion)
    assert (files.folder, files.dit.layout, files.defaults.fps) == (own, "diffusers", 24)
    assert {path.parent for path in files.tokenizer.files} == {own / "vae"}
    assert files.text is not None
    assert files.text.folder == own / "text_encoder"
    # what is nowhere else is taken from there all the same
    (own_diffusion / CONTINUOUS).rename(own_diffusion / "tokenizer")
    (own_diffusion / TEXT_ENCODER).rename(own_diffusion / "encoder")
    files = find(VIDEO2WORLD, own_diffusion)
    assert files.dit.layout == "nvidia"
    assert {path.parent for path in files.tokenizer.files} == {own / "vae"}
    assert files.text is not None
    assert files.text.folder == own / "text_encoder"


def test_a_vae_without_weights_hides_no_tokenizer(own_diffusion: Path) -> None:
    own = own_diffusion / "mine"
    found = find(VIDEO2WORLD, own_diffusion)
    parts = loading.load_diffusion(found, CPU, torch.float32, Recorder(CPU))
    write_diffusers(own, parts)
    for folder in (own, own_diffusion / CONTINUOUS):
        write_vae(folder, parts)
        (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    assert find(own, own_diffusion).tokenizer.source.path == own_diffusion / CONTINUOUS
    shutil.rmtree(own_diffusion / CONTINUOUS)
    with pytest.raises(CheckpointError, match=r"vae holds no .*diffusion_pytorch_model\.saf"):
        find(own, own_diffusion)


def test_what_training_saves(own_diffusion: Path) -> None:
    folder = own_diffusion / TEXT2WORLD
    for number in (8, 10, 9):
        shutil.copy(folder / "model.pt", folder / f"iter_{number:09}.pt")
    assert find(TEXT2WORLD, own_diffusion).dit.source.path == folder / "model.pt"
    (folder / "model.pt").unlink()
    for files in (find(TEXT2WORLD, own_diffusion), loading.find_world(TEXT2WORLD, own_diffusion)):
        assert isinstance(files, DiffusionFiles)
        assert files.dit.source.path == folder / "iter_000000010.pt"


def test_a_strange_config_beside_a_released_model(
    own_diffusion: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The released pipelines do not read it: it matters where nothing else tells, or if ours."""
    path = own_diffusion / TEXT2WORLD / "config.json"
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"needs its rotary.*config\.json"):
        find(TEXT2WORLD, own_diffusion)
    monkeypatch.setitem(RELEASED_RATIOS, 48, (2.0, 1.0, 1.0))
    for text, said in (
        ("{", "cannot be read"),
        ("[]", "holds no settings"),
        ('{"height": "tall", "fps": [], "architectures": []}', "has no effect"),
    ):
        path.write_text(text)
        with caplog.at_level("INFO", logger="worldline"):
            assert find(TEXT2WORLD, own_diffusion).defaults.height == 704
        assert said in caplog.text
    for wrong in ({"rope_ratio": [1, 2]}, {"base_fps": [24]}, {"base_fps": 24, "height": "tall"}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=f"{[*wrong][-1]} is "):
            find(TEXT2WORLD, own_diffusion)


def test_a_folder_of_diffusers(tiny_diffusion: Path, tmp_path: Path) -> None:
    """All parts below one folder; without `vae`, the tokenizer of videos is the released one."""
    own = tmp_path / "Cosmos-1.0-Diffusion-7B-Video2World"
    recorder = Recorder(CPU)
    parts = loading.load_diffusion(find(VIDEO2WORLD, tiny_diffusion), CPU, torch.float32, recorder)
    weights = write_diffusers(own, parts)
    write_text_encoder(own, tiny_diffusion)
    for name in (own, own / "transformer", weights):
        files = loading.find_world(name, tiny_diffusion)
        assert isinstance(files, DiffusionFiles)
        assert files.folder == own
        assert files.generation == "1.0"
        assert files.dit.layout == "diffusers"
        assert files.text is not None
        assert files.text.folder == own / "text_encoder"
    write_vae(own, parts)
    statistics = parts.files.statistics
    files = find(own, "nowhere")
    assert torch.equal(files.statistics.std, statistics.std)
    assert {path.parent for path in files.tokenizer.files} == {own / "vae"}
    assert any("vae/config.json" in one["path"] for one in files.identity()["tokenizer"])
    same = loading.load_diffusion(files, CPU, torch.float32, recorder)
    for ours, theirs in ((parts.transformer, same.transformer), (parts.tokenizer, same.tokenizer)):
        both = zip(ours.module.parameters(), theirs.module.parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in both)


def test_wrong_transformers(own_diffusion: Path) -> None:
    path = own_diffusion / TEXT2WORLD / "model.pt"
    source = open_checkpoint(path)
    tensors = {name: source.read(name).clone() for name in source.tensors}
    name = "net.blocks.block1.blocks.2.block.layer1.weight"
    save({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        find(TEXT2WORLD, own_diffusion)
    path.unlink()
    path.with_name("model.pt.part").touch()
    with pytest.raises(CheckpointError, match=r"holds no model\.pt .*not finished"):
        find(TEXT2WORLD, own_diffusion)


def test_what_a_world_says_of_requests(own_diffusion: Path) -> None:
    path = own_diffusion / VIDEO2WORLD / "config.json"
    defaults = find(VIDEO2WORLD, own_diffusion).defaults
    assert not defaults.text2world
    assert defaults.negative_prompt == NEGATIVE_PROMPT
    assert defaults.rotary_precision == "bfloat16"
    change(path, text2world=True, negative_prompt="", fps=12.5, rotary_precision="float32")
    defaults = find(VIDEO2WORLD, own_diffusion).defaults
    assert defaults.text2world
    assert (defaults.negative_prompt, defaults.fps) == ("", 12.5)
    for wrong in (
        {"text2world": 1},
        {"height": "32"},
        {"num_steps": True},
        {"fps": -1},
        {"rotary_precision": "half"},
    ):
        good = path.read_text()
        change(path, **wrong)
        with pytest.raises(CheckpointError, match=f"{next(iter(wrong))} is "):
            find(VIDEO2WORLD, own_diffusion)
        path.write_text(good)


def test_released_files_say_nothing(own_diffusion: Path) -> None:
    path = own_diffusion / TEXT2WORLD / "config.json"
    path.write_text(json.dumps({"rope_ratio": [2, 1, 1]}))
    defaults = find(TEXT2WORLD, own_diffusion).defaults
    assert (defaults.num_video_frames, defaults.height, defaults.width) == (121, 704, 1280)
    assert (defaults.fps, defaults.guidance, defaults.num_steps) == (24, 7, 35)


def test_identity_names_what_decides(own_diffusion: Path) -> None:
    found = find(TEXT2WORLD, own_diffusion).identity()
    names = {part: {Path(one["path"]).name for one in files} for part, files in found.items()}
    assert names["transformer"] == {"model.pt", "config.json"}
    assert names["tokenizer"] == {"encoder.safetensors", "decoder.safetensors", "mean_std.pt"}
    assert {"model.safetensors", "config.json"} <= names["text_encoder"]
    (own_diffusion / TEXT2WORLD / "model.pt").touch()
    assert find(TEXT2WORLD, own_diffusion).identity() != found


def test_bundled_worlds(tiny_diffusion: Path, tmp_path: Path, monkeypatch: Any) -> None:
    bundled = shutil.copytree(tiny_diffusion, tmp_path / "bundled")
    monkeypatch.setattr(locate, "BUNDLED", bundled)
    (bundled / CONTINUOUS / "config.json").write_text("{}")
    names = locate.bundled_names()
    assert names == [f"tiny-{TEXT2WORLD}", f"tiny-{VIDEO2WORLD}"]
    files = loading.find_world(names[0], "nowhere")
    assert isinstance(files, DiffusionFiles)
    assert files.bundled
    assert files.text is not None
    with pytest.raises(CheckpointError, match=f"there are: {names[0]}, {names[1]}"):
        loading.find_world("tiny-x", "nowhere")


# --- memory


def plan(
    size: str, *flags: str, video: VideoShape | None = None, visitor_bytes: int = 0
) -> DiffusionPlan:
    return loading.plan_diffusion(
        PRESETS[size],
        TOKENIZERS["CV8x8x8"],
        video=video or VideoShape(121, 704, 1280),
        dtype=torch.bfloat16,
        text_bytes=9_729_583_104,
        visitor_bytes=visitor_bytes,
        **dict.fromkeys(flags, True),
    )


def test_a_visitor_comes_beside_what_stays() -> None:
    flag = "offload_text_encoder_model"
    stays = plan("7B-Text2World", visitor_bytes=10**11)
    waits = plan("7B-Text2World", flag, visitor_bytes=10**11)
    assert plan("7B-Text2World").visit == 0
    assert stays.peak == stays.visit > 10**11
    assert stays.visit - waits.visit == 9_729_583_104


def test_plans() -> None:
    """Each flag lowers the need or leaves it, and the published needs are met."""
    flags = DIFFUSION_OFFLOAD_FLAGS
    for size, most in (("7B-Video2World", 24e9), ("14B-Video2World", 36e9)):
        whole = plan(size)
        for count in range(1, 4):
            for chosen in combinations(flags, count):
                assert plan(size, *chosen).peak <= whole.peak
        assert plan(size, *flags).peak <= most
        assert plan(size, "offload_diffusion_transformer").text < whole.text
        assert plan(size, video=VideoShape(57, 480, 640)).peak < whole.peak


@pytest.mark.parametrize("size", ["7B", "14B"])
def test_plans_are_what_was_measured(size: str) -> None:
    """On one H200, with everything offloaded, by `benchmarks/diffusion_end_to_end.py`."""
    path = BENCHMARKS / f"diffusion_end_to_end_{size.lower()}.json"
    stages = json.loads(path.read_text())["runs"]["offload_all"]["stages"]
    [measured] = [stage["peak_gb"] for stage in stages if stage["name"] == "denoise"]
    planned = plan(f"{size}-Video2World", *DIFFUSION_OFFLOAD_FLAGS).denoise / 1e9
    assert measured <= planned <= 1.05 * measured


class Live(TorchDispatchMode):
    """Counts the bytes of what operations give, for as long as it lives.

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
@pytest.mark.parametrize("at_once", [1 << 20, 1 << 30])
def test_the_plan_without_kernels(
    dtype: torch.dtype, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is done in place then; the feed-forward in parts, or at once."""
    for module in ("worldline.nn.dit", "worldline.loading.memory"):
        monkeypatch.setattr(f"{module}.HIDDEN_BYTES", at_once)
    sizes: dict[str, Any] = {"width": 1024, "num_heads": 8, "head_size": 128, "hidden": 4096}
    large = replace(config(condition_mask=False), **sizes, max_grid=LatentShape(2, 16, 16))
    model = DiT(large).to(dtype).requires_grad_(False)
    draw_weights(model)
    weights = list(model.parameters())
    video = VideoShape(9, 256, 256)
    planned = [
        loading.plan_diffusion(
            large,
            TOKENIZERS["CV8x8x8"],
            video=video,
            dtype=dtype,
            context_length=8,
            fused=fused,
            **dict.fromkeys(DIFFUSION_OFFLOAD_FLAGS, True),
        ).denoise
        - workspace(dtype)
        - sum(weight.nbytes for weight in weights)
        for fused in (True, False)
    ]
    with torch.inference_mode(), Live(weights) as live:
        context = model.encode_context(torch.randn(1, 8, CONTEXT_WIDTH))
        positions = model.make_positions(LatentShape(2, 32, 32), 24.0)
        model(torch.randn(1, 16, 2, 32, 32), torch.ones(1), context, positions)
    assert planned[0] < live.peak <= planned[1] <= 1.3 * live.peak


def test_kernels_are_planned_for_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = PRESETS["7B-Video2World"], TOKENIZERS["CV8x8x8"]
    needs = []
    for kernels in (object(), None):
        monkeypatch.setattr("worldline.nn.modulation._load_kernels", lambda found=kernels: found)
        need = loading._need(*sizes, torch.device("cuda"), torch.bfloat16)
        needs.append(need(DIFFUSION_OFFLOAD_FLAGS))
    assert needs[1] > needs[0] + 2e9


def test_embeddings_need_no_room_for_the_text_encoder(
    tiny_diffusion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = find(VIDEO2WORLD, tiny_diffusion)
    assert files.text is not None
    with_text, without = (
        loading._need_of(files, CPU, torch.float32, text=text)(()) for text in (True, False)
    )
    assert with_text - without >= files.text.num_parameters * 4
    free = (with_text + without) // 2
    monkeypatch.setattr("worldline.loading.memory.device_memory", lambda _: Memory(free, free))
    assert worldline.world.load_files(files, device="cpu", text=False)
    with pytest.raises(InsufficientMemoryError):
        worldline.world.load_files(files, device="cpu")


def test_too_little_memory(tiny_diffusion: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = find(VIDEO2WORLD, tiny_diffusion)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1, 8_000_000_000))
    cuda, recorder = torch.device("cuda"), Recorder(CPU)
    with pytest.raises(InsufficientMemoryError, match=r"needs about .* no offload flag is enough"):
        loading.load_diffusion(files, cuda, torch.bfloat16, recorder)


def test_the_memory_of_a_larger_video(tiny_diffusion: Path) -> None:
    files = find(VIDEO2WORLD, tiny_diffusion)
    large = VideoShape(41, 96, 128)
    needs = [loading._need_of(files, CPU, torch.float32, video=video) for video in (large, None)]
    assert needs[0](()) > needs[1](())


def test_fewest_flags(tiny_diffusion: Path) -> None:
    cuda = torch.device("cuda")
    files = find(VIDEO2WORLD, tiny_diffusion)
    tight = loading.fit_files(files, cuda, Memory(10, 10))
    roomy = loading.fit_files(files, cuda, Memory(1 << 40, 1 << 40))
    assert roomy.fits
    assert roomy.flags == ()
    assert tight.fits is False
    for entry in ENTRIES:
        found = loading.fit_entry(entry, cuda, Memory(int(25e9), int(25e9)))
        assert (found is None) == (not entry.command)
        if entry.name == "Cosmos-Predict1-7B-Video2World":
            assert found is not None
            assert found.fits
            assert "offload_text_encoder_model" in found.flags
