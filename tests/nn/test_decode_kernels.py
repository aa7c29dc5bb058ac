"""The decoding kernels against the plain modules, on a GPU."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from worldline.errors import NonFiniteError
from worldline.families.autoregressive.model import (
    ARTransformer,
    ARTransformerConfig,
    make_positions,
)
from worldline.families.autoregressive.step import CapturedDecoder
from worldline.nn.rope import Yarn
from worldline.sampling.solvers import finish
from worldline.sampling.tokens import CHUNK, Sampling, decode, draw, draw_noise
from worldline.shapes import LatentShape

pytestmark = pytest.mark.gpu

CONFIG = ARTransformerConfig(
    depth=3,
    width=320,
    num_heads=8,
    num_kv_heads=2,
    head_size=64,
    hidden=720,
    vocabulary=1000,
    embedding_rows=1000,
    grid=LatentShape(5, 8, 12),
)
VARIANTS = [
    CONFIG,
    replace(CONFIG, num_heads=6, num_kv_heads=2, head_size=32, width=160, hidden=448),
    replace(CONFIG, num_heads=4, num_kv_heads=4, head_size=128),
    replace(
        CONFIG,
        embedding_rows=1024,
        context_width=96,
        absolute_positions=True,
        yarn=Yarn(),
    ),
]


def build(config: ARTransformerConfig) -> ARTransformer:
    torch.manual_seed(0)
    model = ARTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.05)
    return model.to("cuda", torch.bfloat16).requires_grad_(False).eval()


def text(config: ARTransformerConfig) -> Tensor | None:
    if config.context_width is None:
        return None
    return torch.randn(1, 70, config.context_width, device="cuda")


@pytest.mark.parametrize("config", VARIANTS)
def test_every_step_agrees_with_the_plain_modules(config: ARTransformerConfig) -> None:
    """As close to a float32 run as the plain bf16 path is, at every position of the clip."""
    model = build(config)
    positions = make_positions(config, "cuda", torch.bfloat16)
    exact_model = build(config).float()
    exact_positions = make_positions(config, "cuda", torch.float32)
    tokens = torch.randint(config.vocabulary, (1, config.length), device="cuda")
    context = text(config)
    exact_text = None if context is None else exact_model.encode_context(context)
    plain_text = None if context is None else model.encode_context(context)
    exact = exact_model(tokens, exact_positions, context=exact_text)[0]
    decoder = CapturedDecoder(model, Sampling(temperature=0), [context])
    plain_cache = model.new_cache(1)
    prompt = 96
    decoder.start(tokens[:, :prompt], None)
    model(tokens[:, :prompt], positions, cache=plain_cache, context=plain_text)
    for at in range(prompt, config.length - 1):
        decoder.ids[0, at] = tokens[0, at]
        decoder.step(None)
        last = tokens[:, at : at + 1]
        plain = model(last, positions, cache=plain_cache, start=at, context=plain_text)[0, 0]
        fast = decoder.logits[0]
        scale = exact[at].norm()
        plain_error = float((plain - exact[at]).norm() / scale)
        fast_error = float((fast - exact[at]).norm() / scale)
        assert fast_error <= 1.5 * plain_error + 2e-3, at


@pytest.mark.parametrize("config", VARIANTS)
def test_the_captured_draw_is_the_plain_draw_of_the_same_logits(
    config: ARTransformerConfig,
) -> None:
    model = build(config)
    prompt = torch.randint(config.vocabulary, (1, 96), device="cuda")
    rule = Sampling(top_p=0.8, temperature=0.7)
    decoder = CapturedDecoder(model, rule, [text(config)])
    noise = list(draw_noise([0], config.vocabulary, 40, prompt.device))
    decoder.start(prompt, noise[0])
    for index, step_noise in enumerate(noise[1:], start=97):
        decoder.step(step_noise)
        expected = draw(decoder.logits, rule, step_noise)
        assert decoder.ids[0, index] == expected[0]
    assert decoder.tokens.shape == (1, 136)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_logits_that_are_not_finite_are_found_without_waiting() -> None:
    model = build(CONFIG)
    model.embedding.weight[7], model.head.weight[7] = torch.nan, 0  # which is not drawn
    prompt = torch.randint(8, CONFIG.vocabulary, (2, 96), device="cuda")
    prompt[1, 50] = 7
    decoder = CapturedDecoder(model, Sampling(temperature=0), [None, None])
    steps = decode(decoder, prompt, 3 * CHUNK, None)
    assert [next(steps), next(steps)] == [1, CHUNK]  # the graph is captured
    try:
        torch.cuda.set_sync_debug_mode("error")
        with pytest.raises(NonFiniteError, match="token 32 of 96: logits") as caught:
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert caught.value.index == 1
    assert decoder.totals.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("config", VARIANTS)
@pytest.mark.parametrize("batch", [2, 8, 12])
def test_in_step_as_alone_bit_for_bit(config: ARTransformerConfig, batch: int) -> None:
    """Logits, cache and tokens; the clips go on beyond the window."""
    model = build(config)
    prompts = torch.randint(config.vocabulary, (batch, 96), device="cuda")
    contexts = [text(config) for _ in range(batch)]
    count = config.length - 96 + 2 * config.grid.tokens_per_frame

    def run(rows: slice) -> CapturedDecoder:
        decoder = CapturedDecoder(model, Sampling(top_p=0.9), contexts[rows])
        noise = draw_noise(range(batch)[rows], config.vocabulary, count, prompts.device)
        finish(decode(decoder, prompts[rows], count, noise))
        return decoder

    together = run(slice(None))
    assert together.tokens.shape == (batch, 96 + count)
    for clip in range(batch):
        alone = run(slice(clip, clip + 1))
        assert torch.equal(together.logits[clip], alone.logits[0])
        assert torch.equal(together.cache.keys[:, clip], alone.cache.keys[:, 0])
        assert torch.equal(together.cache.values[:, clip], alone.cache.values[:, 0])
        assert torch.equal(together.tokens[clip], alone.tokens[0])


def test_a_second_clip_is_not_touched_by_the_first() -> None:
    model = build(CONFIG)
    results = []
    for prompt_seed in (0, 1, 0):
        generator = torch.Generator().manual_seed(prompt_seed)
        prompt = torch.randint(CONFIG.vocabulary, (1, 96), generator=generator).cuda()
        decoder = CapturedDecoder(model, Sampling(), [None])
        noise = draw_noise([7], CONFIG.vocabulary, 100, prompt.device)
        results.append(finish(decode(decoder, prompt, 100, noise)))
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])
