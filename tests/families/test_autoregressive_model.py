"""Invariants of the autoregressive transformer that hold for any weights."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tiny.export import draw_weights
from worldline.errors import CheckpointError
from worldline.families.autoregressive import model as model_module
from worldline.families.autoregressive.model import (
    PRESETS,
    ARTransformer,
    ARTransformerConfig,
    make_positions,
)
from worldline.families.autoregressive.step import PlainDecoder, make_decoder
from worldline.families.autoregressive.weights import KEYS, open_network, read_config, settings_of
from worldline.nn.attention import KVCache
from worldline.nn.rope import Yarn
from worldline.sampling.solvers import finish
from worldline.sampling.tokens import Sampling, decode, draw_noise
from worldline.shapes import LatentShape
from worldline.weights.checkpoint import Checkpoint

from ..conftest import SMALL_TRANSFORMER
from ..tiny_decoder import video2world
from ..weights.memory import MemoryTensor

GRID = LatentShape(3, 2, 4)
BASE = replace(SMALL_TRANSFORMER, width=48, hidden=64, vocabulary=40, embedding_rows=40, grid=GRID)
VIDEO2WORLD = video2world(BASE, context_width=24, yarn=Yarn())


def build(config: ARTransformerConfig) -> ARTransformer:
    torch.manual_seed(0)
    model = ARTransformer(config)
    draw_weights(model)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.double().requires_grad_(False).eval()


def inputs(config: ARTransformerConfig, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocabulary, (batch, config.length), generator=generator)
    return {"tokens": tokens}


@pytest.fixture(params=[BASE, VIDEO2WORLD], ids=["base", "video2world"])
def config(request: pytest.FixtureRequest) -> ARTransformerConfig:
    given: ARTransformerConfig = request.param
    return given


def context_of(model: ARTransformer, batch: int) -> object:
    if model.config.context_width is None:
        return None
    generator = torch.Generator().manual_seed(2)
    context = torch.randn(batch, 5, model.config.context_width, generator=generator)
    return model.encode_context(context.double())


def test_a_token_changes_nothing_before_it(config: ARTransformerConfig) -> None:
    model = build(config)
    positions = make_positions(config, "cpu", torch.float64)
    tokens = inputs(config)["tokens"]
    context = context_of(model, 2)
    before = model(tokens, positions, context=context)
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % config.vocabulary
    after = model(changed, positions, context=context)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize("chunks", [[25], [8, 1, 1, 15], [1] * 25, [12, 13]])
def test_cached_decoding_equals_one_forward(config: ARTransformerConfig, chunks: list[int]) -> None:
    model = build(config)
    positions = make_positions(config, "cpu", torch.float64)
    tokens = inputs(config)["tokens"]
    context = context_of(model, 2)
    whole = model(tokens, positions, context=context)
    cache, start, parts = model.new_cache(2), 0, []
    for size in chunks:
        part = tokens[:, start : start + size]
        if part.shape[1] == 0:
            continue
        parts.append(model(part, positions, cache=cache, start=start, context=context))
        start += part.shape[1]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10)


def test_last_only_is_the_last_row(config: ARTransformerConfig) -> None:
    model = build(config)
    positions = make_positions(config, "cpu", torch.float64)
    tokens, context = inputs(config)["tokens"], context_of(model, 2)
    whole = model(tokens, positions, context=context)
    last = model(tokens, positions, context=context, last_only=True)
    assert torch.allclose(last, whole[:, -1:], atol=1e-12)


def test_a_long_prompt_is_fed_forward_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = build(BASE).layers[0].feed_forward.double()
    x = torch.randn(2, 5, BASE.width, dtype=torch.float64)
    whole = layer.down(torch.nn.functional.silu(layer.gate(x)) * layer.up(x))
    assert torch.equal(layer(x), whole)
    monkeypatch.setattr(model_module, "FEED_FORWARD_ROWS", 2)
    torch.testing.assert_close(layer(x), whole)


def run(model: ARTransformer, prompt: Tensor, seeds: list[int], sampling: Sampling) -> Tensor:
    config = model.config
    count = config.length - prompt.shape[1]
    decoder = make_decoder(model, sampling, [None] * len(seeds))
    assert isinstance(decoder, PlainDecoder)
    noise = draw_noise(seeds, config.vocabulary, count, torch.device("cpu"))
    return finish(decode(decoder, prompt, count, noise))


def test_clips_decoded_together_draw_what_each_draws_alone() -> None:
    model = build(BASE)
    prompts = inputs(BASE, batch=3)["tokens"][:, :8]
    together = run(model, prompts, [5, 6, 7], Sampling(top_p=0.9))
    for row, seed in enumerate([5, 6, 7]):
        alone = run(model, prompts[row : row + 1], [seed], Sampling(top_p=0.9))
        assert torch.equal(together[row], alone[0])
    assert not torch.equal(together[0, 8:], together[1, 8:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clips_in_step_are_the_same_bit_for_bit(
    config: ARTransformerConfig, dtype: torch.dtype
) -> None:
    """Where a product of several rows rounds otherwise than that of one."""
    model = build(config).to(dtype)
    prompts = inputs(config, batch=3)["tokens"][:, :8]
    contexts = torch.randn(3, 5, config.context_width or 0).split(1)

    def caches(rows: slice) -> tuple[Tensor, Tensor]:
        decoder = make_decoder(model, Sampling(top_p=0.9), contexts[rows])
        noise = draw_noise([5, 6, 7][rows], config.vocabulary, 30, torch.device("cpu"))
        finish(decode(decoder, prompts[rows], 30, noise))
        return decoder.tokens, decoder.cache.keys

    tokens, keys = caches(slice(None))
    for clip in range(3):
        alone, own_keys = caches(slice(clip, clip + 1))
        assert torch.equal(tokens[clip], alone[0])
        assert torch.equal(keys[:, clip], own_keys[:, 0])


class Band(KVCache):
    """All keys of a long clip, of which a token sees those in the window of the one it draws."""

    config = BASE

    def append(self, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super().append(layer, start, k, v)
        config, leading = self.config, self.config.leading_tokens
        size = config.grid.tokens_per_frame
        frame = (keys.shape[2] - leading) // size
        oldest = leading + max(0, frame - config.grid.frames + 1) * size
        return tuple(  # type: ignore[return-value]
            torch.cat([part[:, :, :leading], part[:, :, oldest:]], dim=2) for part in (keys, values)
        )


def test_a_clip_longer_than_the_window(config: ARTransformerConfig) -> None:
    """Forgetting the oldest latent frame is attending to the newest ones, at their own times."""
    model, frames = build(config), 7
    leading, size = config.leading_tokens, config.grid.tokens_per_frame
    prompt = inputs(config, batch=1)["tokens"][:, : leading + size]
    count = (frames - 1) * size
    context = None
    if config.context_width is not None:
        context = torch.randn(1, 5, config.context_width).double()
    decoder = make_decoder(model, Sampling(temperature=0), [context])
    finish(decode(decoder, prompt, count, None))
    long = replace(config, grid=replace(config.grid, frames=frames))
    positions = make_positions(long, "cpu", torch.float64)
    if positions.table is not None:
        # it goes by the place in the window, where a token is read to draw the next one
        of_window = make_positions(config, "cpu", torch.float64).table
        assert of_window is not None
        drawn = torch.arange(long.length) + 1
        late = (drawn - leading) // size - config.grid.frames + 1
        rows = torch.arange(long.length) - late.clamp(min=0) * size
        positions = positions._replace(table=of_window[rows])
    shape = (config.depth, 1, config.num_kv_heads, long.length, config.head_size)
    cache = Band(*torch.zeros(2, *shape).double())
    cache.config = config
    ids = prompt
    encoded = None if context is None else model.encode_context(context)
    logits = model(ids, positions, cache=cache, context=encoded, last_only=True)
    for at in range(ids.shape[1], long.length):
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        logits = model(ids[:, at:], positions, cache=cache, start=at, context=encoded)
    assert torch.equal(decoder.tokens, ids)


def test_a_seed_decides_the_draws() -> None:
    model = build(BASE)
    prompt = inputs(BASE, batch=1)["tokens"][:, :8]
    first = run(model, prompt, [1], Sampling())
    assert torch.equal(first, run(model, prompt, [1], Sampling()))
    assert not torch.equal(first, run(model, prompt, [2], Sampling()))
    assert torch.equal(first[:, :8], prompt)


def test_released_sizes() -> None:
    counts = {
        "4B": 4_014_088_192,
        "5B-Video2World": 4_584_845_312,
        "12B": 11_560_975_360,
        "13B-Video2World": 13_323_125_760,
    }
    for name, count in counts.items():
        with torch.device("meta"):
            model = ARTransformer(PRESETS[name])
        assert sum(parameter.numel() for parameter in model.parameters()) == count


def stored(config: ARTransformerConfig, path: Path) -> Checkpoint:
    with torch.device("meta"):
        model = ARTransformer(config)
    entries = {
        KEYS.released(name): MemoryTensor(parameter.detach())
        for name, parameter in model.named_parameters()
    }
    return Checkpoint(path, "pt", entries)


@pytest.mark.parametrize("given", [BASE, VIDEO2WORLD], ids=["base", "video2world"])
def test_settings_are_read_back(given: ARTransformerConfig) -> None:
    source = stored(given, Path("model.pt"))
    assert read_config(source, settings_of(given)) == given
    # embeddings may have more rows than there are ids to draw
    assert read_config(source, {**settings_of(given), "vocab_size": 40}).vocabulary == 40


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("n_kv_heads", 0), ("n_heads", "4"), ("n_layers", 2.5), ("n_layers", True), ("dim", -48)),
        *(("dim", 10**30), ("ffn_hidden_size", []), ("vocab_size", "40"), ("context_dim", 0)),
        *(("rope_theta", "big"), ("rope_theta", float("nan")), ("norm_eps", -1), ("yarn_scale", 0)),
        *(("apply_yarn", "yes"), ("apply_abs_pos_emb", 1), ("insert_cross_attn", "no")),
        *(("video_latent_shape", shape) for shape in ([5, 40], "5x40x64", [5, 0, 64], [1, 40, 64])),
        ("original_latent_shape", [3]),
        ("insert_cross_attn_every_k_layers", 0),
    ],
)
def test_wrong_settings(field: str, value: object, tmp_path: Path) -> None:
    source = stored(VIDEO2WORLD, tmp_path / "model.pt")
    settings = {**settings_of(VIDEO2WORLD), field: value}
    wanted = f"{tmp_path / 'config.json'}: {field} is {value!r}"
    with pytest.raises(CheckpointError, match=re.escape(wanted)):
        read_config(source, settings)


@pytest.mark.parametrize("changed", [{"n_kv_heads": 3}, {"head_dim": 15}, {"vocab_size": 39}])
def test_settings_that_contradict_the_tensors(changed: dict[str, int], tmp_path: Path) -> None:
    source = stored(VIDEO2WORLD, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"wrong shape: .*layers\.0|output\.weight is \["):
        open_network(source, {**settings_of(VIDEO2WORLD), **changed})


def test_shapes_that_decide_nothing(tmp_path: Path) -> None:
    name = "model.layers.0.attention.q_norm.weight"
    for shape in ((), (0,), (2, 2)):
        source = stored(BASE, tmp_path / "model.pt")
        entries = {**source.entries, name: MemoryTensor(torch.zeros(shape))}
        with pytest.raises(CheckpointError, match=r"q_norm\.weight is \["):
            open_network(replace(source, entries=entries), {})
