"""Decoding of clips by an autoregressive transformer, token by token, one clip or several in step.

`PlainDecoder` calls the model as it is, on any device. `CapturedDecoder` runs on a CUDA device: a
step (the model by the kernels of `worldline.nn.decode_kernels`, the filter, the draw) is captured
once in a CUDA graph and replayed.

A clip draws the same tokens alone and in a batch, bit for bit. A matrix product of several rows may
round otherwise than that of one, and so may sums over several rows: so the plain decoder calls the
model clip by clip, the kernels sum in an order that does not depend on the batch size, and prompts
are read and tokens drawn clip by clip in both. The reading of the weights is shared, and it is the
cost of a step of the kernels.

Several GPUs may each hold a part of the model. Then every one draws every token from the logits of
all and the same noise, and goes on with the first's.

A clip may be longer than the model's window. When the window is full, its oldest latent frame
leaves the cache and the others stay as they are: positions are relative in the rotation, so that a
new token sees the frames before it as near as in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from worldline.families.autoregressive.model import (
    ARTransformer,
    ARTransformerConfig,
    Attention,
    RMSNorm,
    make_positions,
)
from worldline.family import Compute, Opened
from worldline.finite import total
from worldline.nn.modulation import has_triton
from worldline.parallel.mesh import ALONE, Axis
from worldline.parallel.tensor import Rehearsal, SmallSum, own_rows
from worldline.sampling.tokens import Sampling, draw

MAX_BATCH_SIZE = 16  # of the kernels


def make_decoder(
    model: ARTransformer,
    sampling: Sampling,
    contexts: Sequence[Tensor | None],
    axis: Axis = ALONE.tp,
) -> PlainDecoder:
    """The fastest decoder that the device and the model allow; arguments are those of each."""
    fast = len(contexts) <= kernel_batch(model.config, model.head.weight)
    return (CapturedDecoder if fast else PlainDecoder)(model, sampling, contexts, axis)


def kernel_batch(config: ARTransformerConfig, compute: Compute | Tensor) -> int:
    """Clips that the kernels take in step; 0 where they cannot run this architecture.

    Device and dtype are those of `compute`, or of a weight.
    """
    # a tile of the attention kernel is as wide as a head
    tiles = config.head_size >= 32 and config.head_size.bit_count() == 1
    cuda = compute.device.type == "cuda" and has_triton()
    return MAX_BATCH_SIZE if cuda and tiles and compute.dtype == torch.bfloat16 else 0


class PlainDecoder:
    """Decoder of one clip or a batch that calls the modules; the reference for the fast one.

    Attributes:
        positions: those of the window, in the dtype of the weights.
        ids: (B, window), prompt and drawn tokens of the window.
        done: tokens of them that are known.
        totals: (B,) float32, sums of all logits so far: not finite if one was not.
        forgotten: (B, tokens of a latent frame) each, of the frames that left the window.
    """

    name = "plain modules"
    attention = "torch SDPA (prompt), matrix products (decoding)"  # a prompt has many queries

    def __init__(
        self,
        model: ARTransformer,
        sampling: Sampling,
        contexts: Sequence[Tensor | None],
        axis: Axis = ALONE.tp,
    ) -> None:
        """Start with an empty window.

        Args:
            model: on its device.
            sampling: how tokens are drawn.
            contexts: text context (1, rows, width) of each clip; None for a base model.
            axis: processes that hold parts of the model, of which this is one.
        """
        self.model, self.sampling, self.cache = model, sampling, model.new_cache(len(contexts))
        self.axis = axis
        keys, self.done = self.cache.keys, 0
        self.positions = make_positions(model.config, keys.device, keys.dtype)
        self.ids = keys.new_zeros(len(contexts), self.cache.length, dtype=torch.int64)
        self.totals, self.dtype = keys.new_zeros(len(contexts), dtype=torch.float32), keys.dtype
        self.forgotten: list[Tensor] = []
        self.encoded = [model.encode_context(context) for context in contexts]

    @property
    def tokens(self) -> Tensor:
        """Prompt and drawn tokens (B, so far)."""
        leading, seen = self.model.config.leading_tokens, self.ids[:, : self.done]
        return torch.cat([seen[:, :leading], *self.forgotten, seen[:, leading:]], dim=1)

    @property
    def frames(self) -> Tensor:
        """Ids (B, t, h, w) of the latent frames that are whole."""
        grid, cells = self.model.config.grid, self.tokens[:, self.model.config.leading_tokens :]
        whole = cells.shape[1] // grid.tokens_per_frame
        return cells[:, : whole * grid.tokens_per_frame].unflatten(
            1, (whole, grid.height, grid.width)
        )

    @torch.inference_mode()
    def start(self, prompt: Tensor, noise: Tensor | None) -> None:
        """Read `prompt` (B, P), shorter than the window, and draw the token after it."""
        self.ids[:, : prompt.shape[1]] = prompt
        self._read_and_draw(0, prompt.shape[1], noise)

    @torch.inference_mode()
    def step(self, noise: Tensor | None) -> None:
        """Read the last token and draw the next; `noise` is (B, V), or None when greedy."""
        if self.done == self.cache.length:
            self._forget()
        self._read_and_draw(self.done - 1, self.done, noise)

    def _forget(self) -> None:
        """Drop the oldest latent frame of the window, which begins with the next one then."""
        config, rotation = self.model.config, self.positions.rotation
        start, count = config.leading_tokens, config.grid.tokens_per_frame
        self.forgotten.append(self.ids[:, start : start + count].clone())
        self.ids[:, start:-count] = self.ids[:, start + count :].clone()
        self.cache.forget(start, count)
        self.done -= count
        first, dtype = len(self.forgotten), rotation.cos.dtype
        moved = make_positions(config, self.ids.device, dtype, first_frame=first).rotation
        for table, values in zip(rotation, moved, strict=True):
            table.copy_(values)  # in place: a captured graph reads it

    def _read_and_draw(self, start: int, end: int, noise: Tensor | None) -> None:
        """Read the tokens from `start` to `end` of every clip, and draw the one behind them."""
        for clip, (ids, encoded) in enumerate(zip(self.ids, self.encoded, strict=True)):
            tokens, cache = ids[None, start:end], self.cache.one(clip)
            logits = self.model(
                tokens, self.positions, cache=cache, start=start, context=encoded, last_only=True
            )
            row = None if noise is None else noise[clip : clip + 1]
            self.totals[clip] += total(logits[:, -1])
            # a GPU's sums may differ from run to run, and the next token must be one for all
            ids[end : end + 1] = self.axis.share(draw(logits[:, -1], self.sampling, row))
        self.done = end + 1


class CapturedDecoder(PlainDecoder):
    """Decoder that replays one CUDA graph for a token of every clip.

    It has five kernels a layer, with a prompt nine; on several GPUs also a sum behind each product
    that adds to the stream. Weights are bf16.

    Attributes:
        position: () index in the window of the token that the next step reads.
        logits: (B, V) of the token drawn last.
    """

    name = "CUDA graph, Triton kernels"
    attention = "torch SDPA (prompt), Triton, split keys (decoding)"
    graph: torch.cuda.CUDAGraph | None = None

    def __init__(self, model: ARTransformer, *arguments: Any) -> None:
        super().__init__(model, *arguments)
        from worldline.nn import decode_kernels

        config, batch, device = model.config, len(self.ids), self.ids.device
        parts = self.axis.count
        self.matvec, self.gate_up = decode_kernels.matvec, decode_kernels.gate_up
        self.position = self.ids.new_zeros(())
        self.noise = torch.ones(batch, parts * config.vocabulary, device=device)
        self.sum = SmallSum(self.axis, (batch, config.width), device) if parts > 1 else None
        # keys and values (B, M, rows, K) of the text of all clips, for each layer that reads one
        self.contexts: list[Any] = [
            pairs[0] and [torch.cat(part).contiguous() for part in zip(*pairs, strict=True)]
            for pairs in zip(*self.encoded, strict=True)
        ]
        self.attend = decode_kernels.Attend(
            batch=batch,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            device=device,
            parts=parts,
        )

    @torch.inference_mode()
    def step(self, noise: Tensor | None) -> None:
        if self.done == self.cache.length:
            self._forget()
        self.position.fill_(self.done - 1)
        self.graph = self.graph or self._capture()
        if noise is not None:
            self.noise.copy_(noise)
        self.graph.replay()
        self.done += 1

    def run(self) -> None:
        """Read the token at `position` of every clip and draw the next."""
        here = self.position.view(1)
        self.logits = self._read(self.ids.index_select(1, here).view(-1))
        self.totals += total(self.logits, -1)
        # sums of one row and of several take different kernels, which round differently
        rows = zip(self.logits.split(1), self.noise.split(1), strict=True)
        drawn = torch.stack([draw(row, self.sampling, noise) for row, noise in rows])
        self.ids.scatter_(1, (here + 1).expand_as(drawn), self.axis.share(drawn))

    def _read(self, tokens: Tensor) -> Tensor:
        """Logits of the tokens behind `tokens` (B,); one row a layer and clip is cached."""
        model, rotation = self.model, self.positions.rotation
        new = partial(model.embedding.weight.new_empty, len(tokens))
        mixed = new(model.config.num_heads * model.config.head_size)
        hidden = new(model.config.hidden)
        stream = Stream(self, tokens)

        def project() -> Tensor:
            return self.matvec(stream.x, stream.weights, new(stream.rows), **stream.norm)

        def attend(layer: Attention, k: Tensor, v: Tensor, **at: Any) -> None:
            query, gammas = project(), (layer.q_norm.weight, layer.k_norm.weight)
            self.attend(query, gammas, layer.q_norm.eps, k, v, mixed, **at)
            stream.add(layer.out, mixed)

        layers = zip(model.layers, self.contexts, *self.cache, strict=True)
        for layer, context, keys, values in layers:
            attend(layer.attention, keys, values, rotation=rotation, position=self.position)
            if layer.cross_attention is not None:
                attend(layer.cross_attention, *context)
            self.gate_up(stream.x, stream.weights, hidden, **stream.norm)
            stream.add(layer.feed_forward.down, hidden)
        return self.axis.all_gather(project(), 1)

    def _capture(self) -> torch.cuda.CUDAGraph:
        # Rehearsals compile the kernels. They write one token and one row of the cache, which the
        # first replay writes again with the same values.
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        # other threads draw noise, and watch collectives: their calls are no part of the graph
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.run()
        return graph


class Stream:
    """Residual stream (B, width) of one token a clip, and the layers that read it in turn.

    On one GPU it is bf16, and products compute its norm. Where several share the model it is
    float32, since parts are summed before they are rounded, and the sum makes its norm.

    Attributes:
        x: what the products of the layers in turn read: the stream, or its norm.
        norm: keywords of these products, which make it its norm.
        weights: of these layers.
    """

    x: Tensor
    norm: Mapping[str, Any]
    weights: tuple[Tensor, ...]

    def __init__(self, decoder: CapturedDecoder, tokens: Tensor) -> None:
        """Begin with the embeddings of tokens (B,)."""
        self.decoder, self.sum, model = decoder, decoder.sum, decoder.model
        table = decoder.positions.table
        here = None if table is None else table.index_select(0, decoder.position.view(1))
        self.readers = _readers(model, here)
        self.total: Tensor | None = None
        if self.sum is None:
            self.x = model.embedding(tokens)
        else:
            self.sum.begin()
            self.sum.write(own_rows(model.embedding.weight, decoder.axis, tokens))
        self._turn()

    @property
    def rows(self) -> int:
        return sum(map(len, self.weights))

    def add(self, layer: nn.Linear, y: Tensor) -> None:
        """Add a layer's product with `y`; it is the next layers' turn."""
        if self.sum is None:
            self.decoder.matvec(y, (layer.weight,), self.x, residual=self.x)
        else:
            self.decoder.matvec(y, (layer.weight,), self.sum.addend, others=self.sum.others)
        self._turn()

    def _turn(self) -> None:
        norm, layers, added = next(self.readers)
        self.weights = tuple(layer.weight for layer in layers)
        if self.sum is None:
            if added is not None:
                self.x += added
            self.norm = {"gamma": norm.weight, "eps": norm.eps}
        else:
            self.total, self.x = self.sum(self.total, norm.weight, norm.eps, added=added)
            self.norm = {}


def _readers(
    model: ARTransformer, here: Tensor | None
) -> Iterator[tuple[RMSNorm, list[nn.Linear], Tensor | None]]:
    """Norms of the stream in turn, the layers behind each, and what is added before it."""
    for layer in model.layers:
        attention, text, dense = layer.attention, layer.cross_attention, layer.feed_forward
        yield layer.attention_norm, [attention.q, attention.k, attention.v], here
        if text is not None:
            yield layer.cross_attention_norm, [text.q], None
        yield layer.feed_forward_norm, [dense.gate, dense.up], None
    yield model.norm, [model.head], None


@contextmanager
def compile_kernels(opened: Opened, compute: Compute) -> Iterator[None]:
    """Compile the kernels of a model in a thread, beside the reading of its weights."""
    config, device = opened["transformer"].part(compute).config, compute.device
    if compute.batch_size > kernel_batch(config, compute):
        yield
        return

    @torch.inference_mode()
    def compile_all() -> None:
        # kernels are compiled for columns of matrices, whatever their rows and number
        small = replace(config, depth=1, vocabulary=16, embedding_rows=32)
        with torch.device("meta"):
            model = ARTransformer(small).to(compute.dtype)
        with torch.cuda.stream(torch.cuda.Stream(device)):
            model = model.to_empty(device=device)
            context = torch.zeros(1, 16, config.context_width or 0, device=device)
            axis = Rehearsal.of(compute.mesh.tp)
            contexts = [context] * compute.batch_size
            CapturedDecoder(model, Sampling(temperature=0), contexts, axis).run()

    # it launches kernels, so it ends before whatever follows, a failure too
    with ThreadPoolExecutor(1, "compile") as thread:
        thread.submit(compile_all)
        yield
