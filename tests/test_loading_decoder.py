"""The diffusion decoder's files, Video2World's text encoder, and their memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from worldline import loading
from worldline.choices import AUTOREGRESSIVE_OFFLOAD_FLAGS
from worldline.errors import CheckpointError, InputError, InsufficientMemoryError
from worldline.families.autoregressive.model import PRESETS
from worldline.families.diffusion.model import PRESETS as DIFFUSION
from worldline.report import Recorder
from worldline.shapes import LatentShape
from worldline.tokenizers.cosmos.model import PRESETS as TOKENIZERS
from worldline.weights.read import open_checkpoint
from worldline.weights.write import save

from .conftest import MODEL
from .tiny_decoder import (
    CONTEXT_WIDTH,
    DECODER,
    OLD_DECODER,
    TEXT_ENCODER,
    VIDEO2WORLD,
    write_aux,
    write_decoder,
)
from .tiny_diffusion import CONTINUOUS, TEXT2WORLD, write_transformer

CPU = torch.device("cpu")
OLD_CONTINUOUS = "Cosmos-1.0-Tokenizer-CV8x8x8"


def find(root: Path, name: str = MODEL) -> loading.AutoregressiveFiles:
    return loading.find_autoregressive(name, root, diffusion_decoder=True)


def test_found_and_told_apart(whole_world: Path) -> None:
    files = find(whole_world)
    assert files.decoder is not None
    assert files.decoder.folder == whole_world / DECODER
    assert files.decoder.generation == "Predict1"
    assert files.text is None
    assert files.offload_flags == (
        "offload_tokenizer",
        "offload_diffusion_decoder",
        "offload_ar_model",
    )
    identity = files.identity()
    names = [Path(file["path"]).name for file in identity["diffusion_decoder"]]
    assert names == ["model.pt", "aux_vars.pt"]
    names = [Path(file["path"]).name for file in identity["diffusion_decoder_tokenizer"]]
    assert "mean_std.pt" in names
    prompted = find(whole_world, VIDEO2WORLD)
    assert prompted.text is not None
    assert prompted.decoder is not None
    assert prompted.decoder.aux is None  # the prompt takes its place
    assert prompted.offload_flags == AUTOREGRESSIVE_OFFLOAD_FLAGS
    without = loading.find_autoregressive(MODEL, whole_world)
    assert without.decoder is None
    assert "diffusion_decoder" not in without.identity()


def test_both_generations(own_whole_world: Path) -> None:
    root = own_whole_world
    shutil.copytree(root / DECODER, root / OLD_DECODER)
    shutil.copytree(root / CONTINUOUS, root / OLD_CONTINUOUS)
    files = find(root)
    assert files.decoder is not None
    assert files.decoder.folder.name == DECODER
    assert files.decoder.tokenizer.source.path.name == CONTINUOUS
    old = "Cosmos-1.0-Autoregressive-4B"
    (root / MODEL).rename(root / old)
    files = find(root, old)
    assert files.decoder is not None
    assert files.decoder.folder.name == OLD_DECODER
    assert files.decoder.generation == "1.0"
    assert files.decoder.tokenizer.source.path.name == OLD_CONTINUOUS
    # one that is there is better than none
    shutil.rmtree(root / OLD_DECODER)
    files = find(root, old)
    assert files.decoder is not None
    assert files.decoder.generation == "Predict1"


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16, None])
def test_a_mask_of_any_kind(own_whole_world: Path, dtype: torch.dtype | None) -> None:
    mask = None if dtype is None else torch.ones(1, 12).to(dtype)
    write_aux(own_whole_world / DECODER, mask)
    files = find(own_whole_world)
    parts = loading.load_autoregressive(files, CPU, torch.float32, Recorder(CPU))
    assert parts.decoder is not None
    assert parts.decoder.context is not None
    assert parts.decoder.context.shape == (1, 12, CONTEXT_WIDTH)


def change(path: Path, name: str, tensor: torch.Tensor | None) -> None:
    source = open_checkpoint(path)
    tensors = {key: source.read(key).clone() for key in source.tensors}
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    path.unlink()
    save(tensors, path)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no decoder", f"neither {DECODER} nor {OLD_DECODER} is in"),
        ("no aux", "aux_vars.pt does not exist"),
        ("no context", "expected context and perhaps context_mask"),
        ("strange aux", "holds context, context_mask, more"),
        ("narrow aux", "context is [1, 12, 7]; expected [1, rows, 24]"),
        ("whole aux", "context is torch.int64"),
        ("missing", "1 missing"),
        ("learned positions", "3 unknown"),  # which gave coloured noise once, loaded or not
        ("precision", "rotary_precision is 'float8'"),
        ("part", "a download was not finished"),
        ("world", "is a diffusion world, not a diffusion decoder"),
        ("other ids", "reads 32 token ids, but the world draws 64"),
        ("no tokenizer", "no continuous tokenizer for the diffusion decoder"),
        ("no statistics", "holds no mean_std.pt"),
        ("few statistics", "its statistics are of 4 latent frames"),
    ],
)
def test_wrong_decoder(own_whole_world: Path, what: str, message: str) -> None:
    root = own_whole_world
    folder, tokenizer = root / DECODER, root / CONTINUOUS
    if what == "no decoder":
        shutil.rmtree(folder)
    elif what == "no aux":
        (folder / "aux_vars.pt").unlink()
    elif what == "no context":
        torch.save({"context_mask": torch.ones(1, 12)}, folder / "aux_vars.pt")
    elif what == "strange aux":
        aux = dict.fromkeys(("context", "context_mask", "more"), torch.ones(1, 12, CONTEXT_WIDTH))
        torch.save(aux, folder / "aux_vars.pt")
    elif what == "narrow aux":
        torch.save({"context": torch.ones(1, 12, 7)}, folder / "aux_vars.pt")
    elif what == "whole aux":
        context = torch.ones(1, 12, CONTEXT_WIDTH, dtype=torch.int64)
        torch.save({"context": context}, folder / "aux_vars.pt")
    elif what == "missing":
        change(folder / "model.pt", "net.blocks.block1.blocks.0.block.attn.to_q.0.weight", None)
    elif what == "learned positions":
        for axis, size in (("t", 128), ("h", 120), ("w", 120)):
            name = f"net.extra_pos_embedder.pos_emb_{axis}"
            change(folder / "model.pt", name, torch.zeros(size, 48))
    elif what == "precision":
        (folder / "config.json").write_text('{"rotary_precision": "float8"}')
    elif what == "part":
        (folder / "model.pt").rename(folder / "model.pt.incomplete")
    elif what == "world":
        shutil.rmtree(folder)
        write_transformer(folder, condition_mask=False)
    elif what == "other ids":
        shutil.rmtree(folder)
        write_decoder(folder, 32)
    elif what == "no tokenizer":
        shutil.rmtree(tokenizer)
    elif what == "no statistics":
        (tokenizer / "mean_std.pt").unlink()
    else:
        mean = torch.zeros(16 * 4)
        torch.save((mean, mean + 1), tokenizer / "mean_std.pt")
    with pytest.raises(CheckpointError) as told:
        find(root)
    assert message in str(told.value)
    if what == "few statistics":
        return
    assert "--disable_diffusion_decoder does without" in str(told.value)
    loading.find_autoregressive(MODEL, root)  # does without


def test_a_decoder_is_no_world(whole_world: Path) -> None:
    with pytest.raises(CheckpointError, match="diffusion decoder"):
        loading.find_world(DECODER, whole_world)


def test_text_encoders(own_whole_world: Path) -> None:
    root = own_whole_world
    with pytest.raises(
        InputError, match=f"{MODEL} is an autoregressive base world, which has no text_encoder_dir"
    ):
        loading.find_autoregressive(MODEL, root, text_encoder_dir=TEXT_ENCODER)
    with pytest.raises(CheckpointError, match="--text_encoder_dir"):
        loading.find_autoregressive(VIDEO2WORLD, root, text_encoder_dir="nowhere")
    (root / TEXT_ENCODER).rename(root / "mine")
    files = loading.find_autoregressive(VIDEO2WORLD, root)
    assert files.text is None
    assert "there is no text encoder" in files.why_no_text
    files = loading.find_autoregressive(VIDEO2WORLD, root, text_encoder_dir="mine")
    assert files.text is not None
    assert files.identity()["text_encoder"]


def test_plans() -> None:
    """Offloading everything stays below the published needs; each flag lowers other stages."""
    dtype = torch.bfloat16
    discrete, continuous = TOKENIZERS["DV8x16x16"], TOKENIZERS["CV8x8x8"]
    grid = loading.window_grid(PRESETS["4B"], discrete, continuous)
    assert grid == LatentShape(8, 80, 128)
    decoder = loading.plan_decoder(DIFFUSION["7B-Decoder"], continuous, grid, dtype=dtype)
    text = 4_864_791_552 * dtype.itemsize
    for size, most in (("4B", 16), ("5B-Video2World", 16), ("12B", 27.4)):
        config = PRESETS[size]
        of_text = text if config.context_width else 0

        def plan(
            *flags: str, config: object = config, of_text: int = of_text
        ) -> loading.MemoryPlan:
            return loading.plan_autoregressive(
                config,  # type: ignore[arg-type]
                discrete,
                dtype=dtype,
                text_bytes=of_text,
                decoder=decoder,
                **dict.fromkeys(flags, True),  # type: ignore[arg-type]
            )

        assert plan(*AUTOREGRESSIVE_OFFLOAD_FLAGS).peak <= most * 1e9
        bare = plan()
        assert plan("offload_diffusion_decoder").tokens < bare.tokens - 14e9
        # two blocks of 28 at a time, and what every block keeps
        assert plan("offload_diffusion_decoder").denoise < bare.denoise - 12e9
        assert plan("offload_ar_model").denoise < bare.denoise - 8e9
        assert (plan("offload_text_encoder_model").denoise < bare.denoise) == bool(of_text)


def test_clips_in_step_and_long_clips() -> None:
    """Each clip brings its cache; a clip beyond the window the past of its decoding alone."""
    config, tokenizer = PRESETS["4B"], TOKENIZERS["DV8x16x16"]

    def plan(**options: int) -> loading.MemoryPlan:
        return loading.plan_autoregressive(config, tokenizer, dtype=torch.bfloat16, **options)  # type: ignore[arg-type]

    one, eight, long = plan(), plan(batch=8), plan(num_video_frames=161)
    cache = 65_536 * config.length  # bytes a token and clip
    assert eight.tokens - one.tokens == pytest.approx(7 * cache, rel=0.05)
    assert (eight.encode, eight.decode) == (one.encode, one.decode)
    assert long.tokens == one.tokens
    assert 0 < long.decode - one.decode < 1e9


@pytest.mark.parametrize(("free", "expected"), [(10**6, 1), (10, 1), (14, 3), (15, 4), (1000, 5)])
def test_as_many_clips_as_fit(
    whole_world: Path, monkeypatch: pytest.MonkeyPatch, free: int, expected: int
) -> None:
    """None in step where no kernels run: there it would save nothing."""
    files = find(whole_world)
    monkeypatch.setattr(loading, "_need_of", lambda *_, batch, **__: lambda _: 11 + batch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    if free < 10**6:
        monkeypatch.setattr(loading, "kernels_fit", lambda *_: True)
    device = torch.device("cuda" if free < 10**6 else "cpu")
    assert loading.clips_at_once(files, device, torch.bfloat16, (), most=5) == expected


def test_too_little_memory_names_the_decoder_flag(
    whole_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = find(whole_world)
    needs = {(): 10, ("offload_diffusion_decoder",): 5}
    need = lambda flags: needs.get(tuple(flags), 9)  # noqa: E731
    monkeypatch.setattr(loading, "_need_of", lambda *_, **__: need)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (6, 80))
    cuda, recorder = torch.device("cuda"), Recorder(CPU)
    with pytest.raises(InsufficientMemoryError, match="with --offload_diffusion_decoder it needs"):
        loading.load_autoregressive(files, cuda, torch.bfloat16, recorder)
    with pytest.raises(
        InsufficientMemoryError, match=r"^3 clips at once: .*; a smaller --batch_size needs less$"
    ):
        loading.load_autoregressive(files, cuda, torch.bfloat16, recorder, batch_size=3)


def test_the_decoder_beside_a_diffusion_world(own_whole_world: Path) -> None:
    """It is not taken for one."""
    write_transformer(own_whole_world / TEXT2WORLD, condition_mask=False)
    assert loading.find_diffusion(TEXT2WORLD, own_whole_world).config.vocabulary == 0
