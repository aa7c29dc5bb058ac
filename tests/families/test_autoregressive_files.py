"""Files of autoregressive worlds: shards, tokenizers, diffusion decoder, text encoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from worldline.errors import CheckpointError, InputError
from worldline.weights.checkpoint import SHARDED_AXES, open_checkpoint, save

from ..conftest import MODEL, SMALL_TRANSFORMER, TOKENIZER
from ..tiny_decoder import (
    CONTEXT_WIDTH,
    DECODER,
    OLD_DECODER,
    TEXT_ENCODER,
    VIDEO2WORLD,
    write_aux,
    write_decoder,
)
from ..tiny_diffusion import CONTINUOUS, TEXT2WORLD, write_transformer
from .worlds import load_named, open_named

OLD_MODEL = "Cosmos-1.0-Autoregressive-4B"
OLD_TOKENIZER = "Cosmos-1.0-Tokenizer-DV8x16x16"
OLD_CONTINUOUS = "Cosmos-1.0-Tokenizer-CV8x8x8"
BY_TOKENIZER = {"disable_diffusion_decoder": True}


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


def test_a_named_shard_opens_its_set(own_world: Path) -> None:
    folder = own_world / MODEL
    for stem in ("model", "iter_000000002"):
        cut(folder / "model.pt", 2, stem)
    (folder / "model.pt").unlink()
    # what a trainer writes wins over its copy of what it began with
    for place, stem in (
        ("", "iter_000000002"),
        ("iter_000000002_model_mp_1.pt", "iter_000000002"),
        ("model_model_mp_1.pt", "model"),
    ):
        opened = open_named(folder / place, own_world, **BY_TOKENIZER)
        names = [path.name for path in opened["transformer"].source.files]
        assert names == [f"{stem}_model_mp_{rank}.pt" for rank in range(2)]


@pytest.mark.parametrize("settings", [True, False])
def test_a_missing_last_shard(own_world: Path, settings: bool) -> None:
    folder = own_world / MODEL
    cut(folder / "model.pt", 4, "model")
    (folder / "model.pt").unlink()
    for rank in (2, 3):
        (folder / f"model_model_mp_{rank}.pt").unlink()
    if not settings:
        (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"64 ids are read|has 64 vocabulary"):
        open_named(MODEL, own_world, **BY_TOKENIZER)


def test_settings_must_fit_the_tensors(own_world: Path) -> None:
    path = own_world / MODEL / "config.json"
    settings = json.loads(path.read_text())
    for field in ("dim", "n_layers", "n_heads", "head_dim", "ffn_hidden_size"):
        path.write_text(json.dumps({**settings, field: 2 * settings[field]}))
        with pytest.raises(CheckpointError, match="does not fit the model"):
            open_named(MODEL, own_world)


def test_a_name_is_only_a_hint_and_the_grid_is_stored(own_world: Path) -> None:
    renamed = own_world / "my_post-trained_12B"
    (own_world / MODEL).rename(renamed)
    (renamed / "model.pt").rename(renamed / "iter_000000100.pt")
    assert open_named(renamed.name, own_world, **BY_TOKENIZER)["transformer"].config == (
        SMALL_TRANSFORMER
    )
    path = renamed / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "video_latent_shape": [5, 4, 2]}))
    grid = open_named(renamed, own_world, **BY_TOKENIZER)["transformer"].config.grid
    assert (grid.frames, grid.height, grid.width) == (5, 4, 2)


def test_both_generations(own_whole_world: Path) -> None:
    """Parts of the model's own generation are preferred; one that is there is better than none."""
    root = own_whole_world
    for name, old in (
        (TOKENIZER, OLD_TOKENIZER),
        (DECODER, OLD_DECODER),
        (CONTINUOUS, OLD_CONTINUOUS),
        (MODEL, OLD_MODEL),
    ):
        shutil.copytree(root / name, root / old)
    for model, generation, names in (
        (MODEL, "Predict1", (TOKENIZER, DECODER, CONTINUOUS)),
        (OLD_MODEL, "1.0", (OLD_TOKENIZER, OLD_DECODER, OLD_CONTINUOUS)),
    ):
        opened = open_named(model, root)
        assert opened["decoder"].generation == generation
        files = [opened[part].files[0] for part in ("tokenizer", "decoder", "decoder_tokenizer")]
        assert tuple(file.parent.name for file in files) == names
    for old in (OLD_TOKENIZER, OLD_DECODER):
        shutil.rmtree(root / old)
    opened = open_named(OLD_MODEL, root)
    assert opened["decoder"].generation == "Predict1"
    assert opened["tokenizer"].files[0].parent.name == TOKENIZER


def test_parts_of_base_and_video2world_models(whole_world: Path) -> None:
    opened = open_named(MODEL, whole_world)
    names = {part: [path.name for path in found.files] for part, found in opened.parts.items()}
    assert names.keys() == {"tokenizer", "decoder", "decoder_tokenizer", "transformer"}
    assert names["decoder"] == ["model.pt", "aux_vars.pt"]
    assert "mean_std.pt" in names["decoder_tokenizer"]
    prompted = open_named(VIDEO2WORLD, whole_world)
    assert prompted.parts.keys() == {*names, "text"}
    assert prompted["decoder"].context is None  # the prompt takes its place
    without = open_named(MODEL, whole_world, **BY_TOKENIZER)
    assert without.parts.keys() == {"tokenizer", "transformer"}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16, None])
def test_a_mask_of_any_kind(own_whole_world: Path, dtype: torch.dtype | None) -> None:
    mask = None if dtype is None else torch.ones(1, 12).to(dtype)
    write_aux(own_whole_world / DECODER, mask)
    assert load_named(MODEL, own_whole_world).opened["decoder"].context.shape == (
        *(1, 12),
        CONTEXT_WIDTH,
    )


def change(path: Path, name: str, tensor: torch.Tensor | None) -> None:
    source = open_checkpoint(path)
    tensors = {key: source.read(key).clone() for key in source.tensors if key != name}
    path.unlink()
    save(tensors if tensor is None else {**tensors, name: tensor}, path)


def write_aux_of(**tensors: torch.Tensor) -> Callable[[Path], None]:
    return lambda root: torch.save(tensors, root / DECODER / "aux_vars.pt")


def rewrite_decoder(root: Path, write: Callable[[Path], None]) -> None:
    shutil.rmtree(root / DECODER)
    write(root / DECODER)


def learn_positions(root: Path) -> None:
    """Unknown tensors, which gave coloured noise once, loaded or not."""
    for axis, size in (("t", 128), ("h", 120), ("w", 120)):
        name = f"net.extra_pos_embedder.pos_emb_{axis}"
        change(root / DECODER / "model.pt", name, torch.zeros(size, 48))


CONTEXT = torch.ones(1, 12, CONTEXT_WIDTH)
QUERY = "net.blocks.block1.blocks.0.block.attn.to_q.0.weight"
MEAN = torch.zeros(16 * 4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root / DECODER), f"neither {DECODER} nor {OLD_DECODER} is in"),
        (lambda root: (root / DECODER / "aux_vars.pt").unlink(), "aux_vars.pt cannot be read"),
        (
            write_aux_of(context_mask=torch.ones(1, 12)),
            "aux_vars.pt has context_mask, context [0]; ",
        ),
        (
            write_aux_of(context=CONTEXT, context_mask=CONTEXT, more=CONTEXT),
            "aux_vars.pt has context, context_mask, more",
        ),
        (
            write_aux_of(context=torch.ones(1, 12, 7)),
            "context [1, 12, 7]; a finite context [1, rows, 24]",
        ),
        (write_aux_of(context=CONTEXT / 0), "tensor context holds "),
        (lambda root: change(root / DECODER / "model.pt", QUERY, None), "1 missing"),
        (learn_positions, "3 unknown"),
        (
            lambda root: (root / DECODER / "config.json").write_text(
                '{"rotary_precision": "float8"}'
            ),
            "rotary_precision is 'float8'",
        ),
        (
            lambda root: (root / DECODER / "model.pt").rename(
                root / DECODER / "model.pt.incomplete"
            ),
            "model.pt.incomplete",
        ),
        (
            lambda root: rewrite_decoder(
                root, lambda folder: write_transformer(folder, condition_mask=False)
            ),
            "has 0 vocabulary, ",
        ),
        (
            lambda root: rewrite_decoder(root, lambda folder: write_decoder(folder, 32)),
            "has 32 vocabulary, ",
        ),
        (lambda root: shutil.rmtree(root / CONTINUOUS), f"neither {CONTINUOUS} nor "),
        (lambda root: (root / CONTINUOUS / "mean_std.pt").unlink(), "no mean_std.pt"),
        (
            lambda root: torch.save((MEAN, MEAN + 1), root / CONTINUOUS / "mean_std.pt"),
            "statistics are of 4 latent frames, the diffusion decoder needs 8",
        ),
    ],
)
def test_a_wrong_decoder(
    own_whole_world: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(own_whole_world)
    with pytest.raises(CheckpointError) as error:
        open_named(MODEL, own_whole_world)
    assert message in str(error.value)
    assert "disable_diffusion_decoder=True runs without" in str(error.value)
    open_named(MODEL, own_whole_world, **BY_TOKENIZER)


def test_a_decoder_is_no_model(own_whole_world: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{DECODER} is the diffusion decoder"):
        open_named(DECODER, own_whole_world)
    # and a diffusion model beside it is not taken for one
    write_transformer(own_whole_world / TEXT2WORLD, condition_mask=False)
    opened = open_named(TEXT2WORLD, own_whole_world)
    assert opened["transformer"].config.vocabulary == 0


def test_text_encoders(own_whole_world: Path) -> None:
    root = own_whole_world
    with pytest.raises(InputError, match=f"text_encoder_dir: {MODEL} is a base model"):
        open_named(MODEL, root, text_encoder_dir=TEXT_ENCODER)
    with pytest.raises(CheckpointError, match="text_encoder_dir"):
        open_named(VIDEO2WORLD, root, text_encoder_dir="nowhere")
    (root / TEXT_ENCODER).rename(root / "mine")
    assert TEXT_ENCODER in open_named(VIDEO2WORLD, root).missing["text"]
    opened = open_named(VIDEO2WORLD, root, text_encoder_dir="mine")
    assert opened["text"].files
