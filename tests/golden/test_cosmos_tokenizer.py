"""The Cosmos video tokenizers against the reference: every tensor of every case."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from cases import Case, cases, watched

from tiny.export import stored_tensors
from worldline.nn import transforms
from worldline.nn.transforms import EXACT_TAP, patch, unpatch
from worldline.tokenizers.cosmos.clips import pad, reconstruct_windows
from worldline.tokenizers.cosmos.model import CosmosTokenizer
from worldline.tokenizers.cosmos.weights import (
    is_diffusers,
    key_map,
    network_view,
    open_tokenizer,
    read_config,
)
from worldline.tokenizers.layouts import cosmos_settings
from worldline.weights.checkpoint import open_checkpoint, save
from worldline.weights.stream import load_into

CONTINUOUS = cases("tok_cv_tiny")
CASES = cases("tok_dv_tiny") + CONTINUOUS
DIFFUSERS = cases("tok_cv_diffusers_layout")


def folder_of(case: Case) -> Path:
    return case.path / case.spec["folder"]


def stated_levels(case: Case) -> tuple[int, ...] | None:
    levels = case.spec["config"].get("levels")
    return None if levels is None else tuple(levels)


def averaged(name: str) -> str | None:
    """Name of an averaged weight as that of the weight; None for others."""
    plain = name.removeprefix("ema.network-").replace("-", ".")
    return f"network.{plain}" if name.startswith("ema.") else None


@cache
def loaded(case: Case, weights: str = "jit", tap: str = "stored") -> CosmosTokenizer:
    """Weights "jit" of the exported files, "reg" or "ema" of the training checkpoint."""
    folder = folder_of(case)
    if weights == "jit":
        opened = open_tokenizer(folder)
        source, config = opened.source, opened.config
    else:
        source = open_checkpoint(folder / "model.pt")
        if weights == "ema":
            entries = {averaged(name): entry for name, entry in source.entries.items()}
            source = replace(source, entries={n: e for n, e in entries.items() if n is not None})
        source = network_view(source)
        config = replace(read_config(source), levels=stated_levels(case))
    if tap == "exact":
        config = replace(config, tap=EXACT_TAP)
    with torch.device("meta"):
        model = CosmosTokenizer(config)
    keys = key_map(config, is_diffusers(source))
    load_into(model, source, keys, device="cpu", dtype=torch.float32)
    return model.requires_grad_(False).eval()


def our_module(model: CosmosTokenizer, released: str) -> str:
    """Translate a module's released name: the common start of its parameters' names."""
    keys = key_map(model.config)
    parameters = dict(model.named_parameters())
    ours = [
        name.split(".") for name in parameters if keys.released(name).startswith(f"{released}.")
    ]
    assert ours, f"no parameter below {released}"
    depth = 0
    while len({tuple(parts[: depth + 1]) for parts in ours}) == 1 and depth < len(ours[0]) - 1:
        depth += 1
    return ".".join(ours[0][:depth])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_configuration_is_read_from_the_files(case: Case) -> None:
    config, stated = loaded(case).config, case.spec["config"]
    channels = stated["channels"]
    assert config.channels == channels
    assert config.level_channels == tuple(channels * m for m in stated["channels_mult"])
    assert config.num_blocks == stated["num_res_blocks"]
    assert config.patch == stated["patch_size"]
    assert config.spatial == stated["spatial_compression"]
    assert config.temporal == stated["temporal_compression"]
    assert config.z_channels == stated["z_channels"]
    assert config.levels == stated_levels(case)
    channels = stated.get("latent_channels", stated.get("embedding_dim"))
    assert config.latent_channels == channels


@pytest.mark.parametrize("case", CASES, ids=str)
def test_clips(case: Case) -> None:
    for name in case.names("t*.video"):
        clip = name.removesuffix(".video")
        video = case.tensor(name)
        model = loaded(case)
        run = watched(model, lambda m=model, v=video: m.encode(v))
        if f"{clip}.indices" in case:
            indices = model.encode_tokens(video)
            case.compare(f"{clip}.indices", indices)
            codes = transforms.indices_to_codes(indices, model.config.levels or ())
            case.compare(f"{clip}.codes", codes.movedim(-1, 1))
            stored = case.tensor(f"{clip}.indices")
            run |= watched(model, lambda m=model, s=stored: m.decode(m.to_codes(s)))
            case.compare(f"{clip}.recon", run[""])
        elif f"{clip}.latent" in case:
            case.compare(f"{clip}.latent", run[""])
            stored = case.tensor(f"{clip}.latent")
            run |= watched(model, lambda m=model, s=stored: m.decode(s))
            case.compare(f"{clip}.recon", run[""])
        for output in case.names(f"{clip}.*"):
            what = output.removeprefix(f"{clip}.")
            if what in ("video", "indices", "codes", "latent", "recon") or what.split(".")[0] in (
                "reg",
                "ema",
            ):
                continue
            case.compare(output, run[our_module(model, what)].movedim(-1, 1))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_of_the_training_checkpoint(case: Case) -> None:
    for name in case.names("*.reg.*") + case.names("*.ema.*"):
        clip, weights, what = name.split(".")
        model = loaded(case, weights, "exact")
        video = case.tensor(f"{clip}.video")
        ours = {
            "indices": lambda m=model, v=video: m.encode_tokens(v),
            "latent": lambda m=model, v=video: m.encode(v),
            "quant_conv": lambda m=model, v=video: m.encode(v),
            "codes": lambda m=model, v=video: transforms.quantize(
                m.encode(v).movedim(1, -1), m.config.levels or ()
            ).movedim(-1, 1),
            "recon": lambda m=model, v=video: m.reconstruct(v),
        }
        case.compare(name, ours[what]())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_chunks_of_the_autoregressive_pipeline(case: Case) -> None:
    """Each chunk is a clip of its own; there the reference encodes with exact taps."""
    for name in case.names("ar*.video"):
        chunk = name.removesuffix(".video")
        count = case.spec["chunks"][chunk]["chunks"]
        video, indices = case.tensor(name), case.tensor(f"{chunk}.indices")
        encoder, decoder = loaded(case, "jit", "exact"), loaded(case)
        tokens = [encoder.encode_tokens(part) for part in video.chunk(count, dim=2)]
        case.compare(f"{chunk}.indices", torch.cat(tokens, dim=1))
        decoded = [decoder.decode(decoder.to_codes(part)) for part in indices.chunk(count, dim=1)]
        case.compare(f"{chunk}.recon", torch.cat(decoded, dim=2))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_normalised_chunks(case: Case) -> None:
    """Each chunk is a clip of its own, and has the statistics of a clip's first latent frames."""
    names = case.names("norm*.video")
    if not names:
        return
    model, statistics = loaded(case), open_tokenizer(folder_of(case)).statistics
    assert statistics is not None
    for name in names:
        chunk = name.removesuffix(".video")
        count = case.spec["chunks"][chunk]["chunks"]
        parts = [model.encode(part) for part in case.tensor(name).chunk(count, dim=2)]
        latents = torch.cat([statistics.normalise(part, image=False) for part in parts], dim=2)
        case.compare(f"{chunk}.latent", latents)
        stored = case.tensor(f"{chunk}.latent").chunk(count, dim=2)
        frames = [model.decode(statistics.denormalise(part, image=False)) for part in stored]
        case.compare(f"{chunk}.recon", torch.cat(frames, dim=2))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_images_have_statistics_of_their_own(case: Case) -> None:
    for name in case.names("image*.video"):
        image = name.removesuffix(".video")
        model, statistics = loaded(case), open_tokenizer(folder_of(case)).statistics
        assert statistics is not None
        case.compare(f"{image}.latent", statistics.normalise(model.encode(case.tensor(name))))
        stored = case.tensor(f"{image}.latent")
        case.compare(f"{image}.recon", model.decode(statistics.denormalise(stored)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_padded_windows(case: Case) -> None:
    if not case.names("np.*"):
        return
    frames = case.tensor("np.video").to(torch.uint8)
    window = case.spec["temporal_window"]
    case.compare("np.out", reconstruct_windows(loaded(case), frames, window).float())
    for name in case.names("np.window*_padded"):
        number = int(re.search(r"window(\d+)", name)[1])  # type: ignore[index]
        padded, place = pad(frames[:, number * window : (number + 1) * window])
        case.compare(name, padded.float())
        case.compare(name.replace("_padded", "_crop"), torch.tensor(place))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_wavelets(case: Case) -> None:
    for name in case.names("wav.*.x"):
        stem = name.removesuffix(".x")
        found = re.fullmatch(r"wav\.p(\d+)(bf16taps)?", stem)
        assert found is not None
        size = int(found[1])
        tap = torch.tensor(EXACT_TAP).bfloat16().item() if found[2] else EXACT_TAP
        case.compare(
            f"{stem}.patched", patch(case.tensor(name).movedim(1, -1), size, tap).movedim(-1, 1)
        )
        case.compare(
            f"{stem}.unpatched",
            unpatch(case.tensor(f"{stem}.coef").movedim(1, -1), size, tap).movedim(-1, 1),
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_quantiser(case: Case) -> None:
    if not case.names("fsq.*"):
        return
    levels = [int(level) for level in case.tensor("fsq.levels")]
    z = case.tensor("fsq.z")
    case.compare("fsq.bound", transforms.bound(z, levels))
    codes = transforms.quantize(z, levels)
    case.compare("fsq.codes", codes)
    case.compare("fsq.indices", transforms.codes_to_indices(codes, levels))
    sample = transforms.indices_to_codes(case.tensor("fsq.sample_indices"), levels)
    case.compare("fsq.sample_codes", sample)
    grid = transforms.indices_to_codes(case.tensor("fsq.grid_indices"), levels)
    case.compare("fsq.grid_codes", grid.movedim(-1, 1))


@pytest.mark.parametrize("case", DIFFUSERS, ids=str)
def test_weights_that_diffusers_saved(case: Case) -> None:
    folder = folder_of(case)
    model, statistics = loaded(case), open_tokenizer(folder).statistics
    for name in case.names("*.video"):
        clip = name.removesuffix(".video")
        latents = model.encode(case.tensor(name))
        case.compare(f"{clip}.latent", latents)
        case.compare(f"{clip}.recon", model.decode(case.tensor(f"{clip}.latent")))
        if f"{clip}.latent_norm" in case:
            assert statistics is not None
            # there the latents are of unit deviation times sigma_data; an image is a short clip
            case.compare(f"{clip}.latent_norm", statistics.normalise(latents, image=False) / 2)


@pytest.mark.parametrize("case", CONTINUOUS + DIFFUSERS, ids=str)
def test_diffusers_computes_the_same_from_what_we_export(case: Case, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model, statistics = loaded(case, "jit", "exact"), open_tokenizer(folder_of(case)).statistics
    tensors = stored_tensors(model, key_map(model.config, True))
    save(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    settings = cosmos_settings(model.config, statistics)
    (tmp_path / "config.json").write_text(json.dumps(settings))

    theirs = diffusers.AutoencoderKLCosmos.from_pretrained(tmp_path)
    assert sorted(theirs.state_dict()) == sorted(tensors)
    for name in case.names("t*.video"):
        video = case.tensor(name)
        latents = theirs.encode(video).latent_dist.mode()
        assert torch.allclose(model.encode(video), latents, atol=2e-5, rtol=0)
        decoded = theirs.decode(latents).sample
        assert torch.allclose(model.decode(latents), decoded, atol=2e-5, rtol=0)

    opened = open_tokenizer(tmp_path)
    assert opened.config == model.config
    read = opened.statistics
    if statistics is None:  # a tokenizer that no diffusion model uses may have none
        assert read is None
    else:
        assert read is not None
        assert torch.equal(read.mean, statistics.mean)
        assert torch.equal(read.std, statistics.std)


@pytest.mark.parametrize("case", CASES + DIFFUSERS, ids=str)
def test_every_tensor_is_used(case: Case) -> None:
    assert case.unused() == []
    assert json.loads((case.path / "case.json").read_text())["case"]
