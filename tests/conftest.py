"""A world small enough to run in a second, in the official layout, and clips for it."""

from __future__ import annotations

import json
import secrets
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tiny.export import cosmos_tensors
from worldline.families.autoregressive.model import ARTransformer, ARTransformerConfig
from worldline.families.autoregressive.weights import KEYS, settings_of
from worldline.shapes import LatentShape
from worldline.tokenizers.cosmos.model import CosmosTokenizer, CosmosTokenizerConfig
from worldline.video.write import write_video
from worldline.weights.checkpoint import save

from .ranks import Together, ranks
from .tiny_decoder import add_parts
from .tiny_diffusion import make_tiny_diffusion
from .tiny_predict2_5 import make_tiny_predict2_5

MODEL = "Cosmos-Predict1-4B"
TOKENIZER = "Cosmos-Tokenize1-DV8x16x16-720p"

# a shell's background job ignores Ctrl-C, and so would the processes that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs devices that are not here; mark what computes in several processes."""
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        for marker, needed in (("gpu", 1), ("multigpu", 2)):
            if item.get_closest_marker(marker) and devices < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s)"))
        several = item.path.parent.name == "parallel" or {"two", "three"} & {*_fixtures(item)}
        if several and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.ranks)


def _fixtures(item: pytest.Item) -> list[str]:
    names: list[str] = getattr(item, "fixturenames", [])
    return names


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def two() -> Iterator[Together]:
    """Two processes that compute together."""
    with ranks(2) as together:
        yield together


@pytest.fixture(scope="session")
def three() -> Iterator[Together]:
    """Three processes that compute together."""
    with ranks(3) as together:
        yield together


@pytest.fixture(scope="module")
def gpus() -> Iterator[Together]:
    """Two processes, each with a GPU."""
    with ranks(2, "cuda") as together:
        yield together


# 33 frames of 32 x 48 pixels, 30 tokens
SMALL_TRANSFORMER = ARTransformerConfig(
    depth=2,
    width=64,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    hidden=96,
    vocabulary=64,
    embedding_rows=64,
    grid=LatentShape(5, 2, 3),
)
SMALL_TOKENIZER = CosmosTokenizerConfig(
    channels=4,
    level_channels=(8, 8, 8),
    num_blocks=1,
    spatial=16,
    z_channels=4,
    latent_channels=4,
    levels=(4, 4, 2, 2),
)


def _fill(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.1, generator=generator)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with random weights; copy it before changing it."""
    return make_small_world(tmp_path_factory.mktemp("checkpoints"), SMALL_TRANSFORMER)


def make_small_world(root: Path, config: ARTransformerConfig) -> Path:
    """Write an autoregressive base model and its tokenizer below `root`."""
    transformer = ARTransformer(config)
    _fill(transformer)
    folder = root / MODEL
    folder.mkdir()
    tensors = {KEYS.released(n): p.detach().bfloat16() for n, p in transformer.named_parameters()}
    save(tensors, folder / "model.pt")
    (folder / "config.json").write_text(json.dumps(settings_of(config)))
    tokenizer = CosmosTokenizer(SMALL_TOKENIZER)
    _fill(tokenizer)
    folder = root / TOKENIZER
    folder.mkdir()
    for half, tensors in cosmos_tensors(tokenizer).items():
        save(tensors, folder / f"{half}.safetensors")
    return root


@pytest.fixture
def own_world(small_world: Path, tmp_path: Path) -> Path:
    """A copy of `small_world` that a test may break."""
    return Path(shutil.copytree(small_world, tmp_path / "checkpoints"))


@pytest.fixture(scope="session")
def whole_world(small_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small world, its diffusion decoder, and a Video2World model; copy it to change it."""
    root = tmp_path_factory.mktemp("whole") / "checkpoints"
    shutil.copytree(small_world, root)
    add_parts(root, SMALL_TRANSFORMER)
    return root


@pytest.fixture
def own_whole_world(whole_world: Path, tmp_path: Path) -> Path:
    """A copy of `whole_world` that a test may break."""
    return Path(shutil.copytree(whole_world, tmp_path / "whole"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the embeddings of tests out of the user's, and those of one test out of another's."""
    folder = tmp_path_factory.getbasetemp() / "embeddings"
    monkeypatch.setenv("WORLDLINE_CACHE", str(folder / secrets.token_hex(8)))


@pytest.fixture(scope="session")
def tiny_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of diffusion worlds with random weights; copy it before changing it."""
    return make_tiny_diffusion(tmp_path_factory.mktemp("diffusion"))


@pytest.fixture
def own_diffusion(tiny_diffusion: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_diffusion` that a test may break."""
    return Path(shutil.copytree(tiny_diffusion, tmp_path / "diffusion"))


@pytest.fixture(scope="session")
def tiny_predict2_5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of worlds of Predict2.5, random weights; copy it before changing it."""
    return make_tiny_predict2_5(tmp_path_factory.mktemp("predict2_5"))


@pytest.fixture
def own_predict2_5(tiny_predict2_5: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_predict2_5` that a test may break."""
    return Path(shutil.copytree(tiny_predict2_5, tmp_path / "predict2_5"))


def moving(frames: int = 12, height: int = 40, width: int = 64) -> NDArray[np.uint8]:
    """Smooth colours that drift."""
    t, y, x = np.meshgrid(*map(np.arange, (frames, height, width)), indexing="ij")
    channels = (40 + 2 * x + 3 * t, 200 - 2 * y, 90 + y + x // 2)
    return np.stack(channels, axis=-1).clip(0, 255).astype(np.uint8)


def frames_of(video: Path) -> str:
    """SHA-256 of the frames that a video was made of, from the report beside it."""
    digest: str = json.loads(video.with_suffix(".json").read_text())["frames_sha256"]
    return digest


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 12 frames."""
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    write_video(moving(), path, 25)
    return path


@pytest.fixture(scope="session")
def short_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of 5 frames."""
    path = tmp_path_factory.mktemp("media") / "short.mp4"
    write_video(moving(5), path, 25)
    return path


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    path = tmp_path_factory.mktemp("media") / "picture.png"
    Image.fromarray(moving(1)[0]).save(path)
    return path
