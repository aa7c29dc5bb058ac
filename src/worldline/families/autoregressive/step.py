"""Decoding of clips by an autoregressive transformer, token by token, one clip or several in step.

`PlainDecoder` calls the model as it is, on any device. `CapturedDecoder` runs on a CUDA device: a
step (the model by the kernels of `worldline.nn.decode_kernels`, the filter, the draw) is captured
once in a CUDA graph and replayed.

A clip draws the same tokens alone and in a batch, bit for bit. A matrix product of several rows may
round otherwise than that of one, and so may sums over several rows: so the plain decoder calls the
model clip by clip, the kernels sum in an order that does not depend on the batch size, and prompts
are read and tokens drawn clip by clip in both. The reading of the weights is shared, and it is the
cost of a step of the kernels.

A clip may be longer than the model's window. When the window is full, its oldest latent frame
leaves the cache and the others stay as they are: positions are relative in the rotation, so that a
new token sees the frames before it as near as in training.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from worldline.families.autoregressive.model import (
    ARTransformer,
    ARTransformerConfig,
    EncodedContext,
    Layer,
    Positions,
    make_positions,
)
from worldline.nn.attention import KVCache
from worldline.nn.modulation import has_triton
from worldline.sampling.tokens import Sampling, draw

MAX_BATCH_SIZE = 16  # of the kernels


def make_decoder(
    model: ARTransformer,
    positions: Positions,
    sampling: Sampling,
    *,
    batch: int = 1,
    context: Tensor | None = None,
) -> PlainDecoder:
    """The fastest decoder that the device and the model allow.

    Args:
        model: on its device.
        positions: those of a whole clip, on the device and in the dtype of the weights; changed in
            place if the clip becomes longer than the window.
        sampling: how tokens are drawn.
        batch: B, clips decoded in step.
        context: text context (B, rows, width); Video2World only.
    """
    weight = model.head.weight
    fast = batch <= MAX_BATCH_SIZE and kernels_fit(model.config, weight.device, weight.dtype)
    kind = CapturedDecoder if fast else PlainDecoder
    return kind(model, positions, sampling, batch=batch, context=context)


def kernels_fit(config: ARTransformerConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can run this architecture here."""
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and config.head_size >= 32  # a tile of the attention kernel is a power of two wide
        and config.head_size & (config.head_size - 1) == 0
        and has_triton()
    )


class PlainDecoder:
    """Decoder that calls the modules; the reference for the fast one.

    Attributes:
        ids: (B, window), prompt and drawn tokens of the window.
        done: tokens of them that are known.
        forgotten: (B, tokens of a latent frame) each, of the frames that left the window.
    """

    name = "plain modules"

    def __init__(
        self,
        model: ARTransformer,
        positions: Positions,
        sampling: Sampling,
        *,
        batch: int = 1,
        context: Tensor | None = None,
    ) -> None:
        self.model, self.positions, self.sampling = model, positions, sampling
        self.cache = model.new_cache(batch)
        self.encoded: list[EncodedContext | None] = [None] * batch
        if context is not None:
            self.encoded = [model.encode_context(one) for one in context.split(1)]
        device = model.head.weight.device
        self.ids = torch.zeros(batch, self.cache.length, dtype=torch.int64, device=device)
        self.done = 0
        self.forgotten: list[Tensor] = []

    @property
    def tokens(self) -> Tensor:
        """Prompt and drawn tokens (B, so far)."""
        leading = self.model.config.leading_tokens
        seen = self.ids[:, : self.done]
        return torch.cat([seen[:, :leading], *self.forgotten, seen[:, leading:]], dim=1)

    @torch.inference_mode()
    def start(self, prompt: Tensor, noise: Tensor | None) -> None:
        """Read `prompt` (B, P) into an empty window and draw the token after it.

        Raises:
            ValueError: the prompt leaves no room in the clip.
        """
        count = prompt.shape[1]
        if not 0 < count < self.cache.length:
            raise ValueError(f"a prompt of {count} tokens; a clip has {self.cache.length}")
        if self.forgotten:
            self.forgotten = []
            self._move_window()
        self.ids[:, :count] = prompt
        self._read_and_draw(0, count, noise)

    @torch.inference_mode()
    def step(self, noise: Tensor | None) -> None:
        """Read the last token and draw the next; `noise` is (B, V), or None when greedy."""
        if self.done == self.cache.length:
            self._forget()
        self._read_and_draw(self.done - 1, self.done, noise)

    def _forget(self) -> None:
        """Drop the oldest latent frame of the window."""
        config = self.model.config
        start, count = config.leading_tokens, config.grid.tokens_per_frame
        self.forgotten.append(self.ids[:, start : start + count].clone())
        self.ids[:, start:-count] = self.ids[:, start + count :].clone()
        self.cache.forget(start, count)
        self.done -= count
        self._move_window()

    def _move_window(self) -> None:
        """Set positions to those of a window that begins behind the forgotten frames."""
        rotation, device = self.positions.rotation, self.ids.device
        now = make_positions(
            self.model.config, device, rotation.cos.dtype, first_frame=len(self.forgotten)
        ).rotation
        rotation.cos.copy_(now.cos)
        rotation.sin.copy_(now.sin)

    def _read_and_draw(self, start: int, end: int, noise: Tensor | None) -> None:
        """Read the tokens from `start` to `end` of every clip, and draw the one behind them."""
        for clip, (ids, encoded) in enumerate(zip(self.ids, self.encoded, strict=True)):
            logits = self.model(
                ids[None, start:end],
                self.positions,
                cache=self.cache.one(clip),
                start=start,
                context=encoded,
                last_only=True,
            )
            row = None if noise is None else noise[clip : clip + 1]
            ids[end : end + 1] = draw(logits[:, -1], self.sampling, row)
        self.done = end + 1


class CapturedDecoder(PlainDecoder):
    """Decoder that replays one CUDA graph for a token of every clip."""

    name = "CUDA graph, Triton kernels"

    def __init__(self, model: ARTransformer, *arguments: Any, **options: Any) -> None:
        super().__init__(model, *arguments, **options)
        device = self.ids.device
        self.fused = FusedStep(model, self.positions, self.encoded)
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.noise = torch.ones(len(self.ids), model.config.vocabulary, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def start(self, prompt: Tensor, noise: Tensor | None) -> None:
        super().start(prompt, noise)
        self.position.fill_(self.done - 1)  # index of the token that the next step reads

    @torch.inference_mode()
    def step(self, noise: Tensor | None) -> None:
        if self.done == self.cache.length:
            self._forget()
            self.position.fill_(self.done - 1)
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        if noise is not None:
            self.noise.copy_(noise)
        self.graph.replay()
        self.done += 1

    def _run(self) -> None:
        last = self.ids.index_select(1, self.position.view(1)).view(-1)
        logits = self.fused(last, self.position, self.cache)
        self.position += 1
        # sums of one row and of several take different kernels, which round differently
        for ids, row, noise in zip(self.ids, logits.split(1), self.noise.split(1), strict=True):
            ids.scatter_(0, self.position.view(1), draw(row, self.sampling, noise))

    def _capture(self) -> None:
        # Rehearsals compile the kernels. They write one token and one row of the cache, which the
        # first replay writes again with the same values, and move the position, which is put back.
        position = self.position.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run()
                self.position.copy_(position)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run()
        self.position.copy_(position)


class FusedStep:
    """The transformer for one token of each clip: five kernels a layer, with a prompt nine."""

    def __init__(
        self,
        model: ARTransformer,
        positions: Positions,
        contexts: Sequence[EncodedContext | None] = (None,),
    ) -> None:
        """Allocate the buffers.

        Args:
            model: bf16, on its device.
            positions: those of a whole clip, bf16, on the same device.
            contexts: from `encode_context`, for each clip.
        """
        from worldline.nn import decode_kernels

        self.kernels = decode_kernels
        self.model = model
        self.rotation, self.table = positions
        config = model.config
        device = model.head.weight.device
        batch = len(contexts)
        # keys and values (B, M, rows, K) of the text of all clips, for each layer that reads one
        self.contexts: list[tuple[Tensor, Tensor] | None] = []
        for layer in model.stack:
            pairs = [pair for one in contexts if one is not None and (pair := one[layer.number])]
            keys_and_values = [torch.cat(part).contiguous() for part in zip(*pairs, strict=True)]
            self.contexts.append((keys_and_values[0], keys_and_values[1]) if pairs else None)

        def buffer(size: int) -> Tensor:
            return torch.empty(batch, size, dtype=torch.bfloat16, device=device)

        heads = config.num_heads * config.head_size
        self.stream = buffer(config.width)
        self.qkv = buffer(heads + 2 * config.num_kv_heads * config.head_size)
        self.mixed = buffer(heads)
        self.hidden = buffer(config.hidden)
        self.logits = buffer(config.vocabulary)
        self.query = buffer(heads)
        self.attend = decode_kernels.Attend(
            batch=batch,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            device=device,
        )

    def __call__(self, tokens: Tensor, position: Tensor, cache: KVCache) -> Tensor:
        """Logits (B, V), bf16.

        Args:
            tokens: (B,) ids on the device.
            position: () their index in the clip, the same for all.
            cache: one row a layer and clip is written.
        """
        matvec, x = self.kernels.matvec, self.stream
        torch.index_select(self.model.embedding.weight, 0, tokens, out=x)
        here = None if self.table is None else self.table.index_select(0, position.view(1))
        for number, layer in enumerate(self.model.stack):
            attention, feed_forward = layer.attention, layer.feed_forward
            if here is not None:
                x += here
            matvec(
                x,
                (attention.q.weight, attention.k.weight, attention.v.weight),
                self.qkv,
                gamma=layer.attention_norm.weight,
                eps=layer.attention_norm.eps,
            )
            self.attend(
                self.qkv,
                (attention.q_norm.weight, attention.k_norm.weight),
                attention.q_norm.eps,
                cache.keys[number],
                cache.values[number],
                self.mixed,
                rotation=self.rotation,
                position=position,
            )
            matvec(self.mixed, (attention.out.weight,), x, residual=x)
            self._attend_to_context(layer, self.contexts[number])
            self.kernels.gate_up(
                x,
                layer.feed_forward_norm.weight,
                layer.feed_forward_norm.eps,
                feed_forward.gate.weight,
                feed_forward.up.weight,
                self.hidden,
            )
            matvec(self.hidden, (feed_forward.down.weight,), x, residual=x)
        norm = self.model.norm
        matvec(x, (self.model.head.weight,), self.logits, gamma=norm.weight, eps=norm.eps)
        return self.logits

    def _attend_to_context(self, layer: Layer, context: tuple[Tensor, Tensor] | None) -> None:
        """Add cross-attention to the stream, in layers that have it."""
        attention, norm = layer.cross_attention, layer.cross_attention_norm
        if attention is None or norm is None:
            return
        assert context is not None, "a Video2World model needs its text context"
        matvec, x, q_norm = self.kernels.matvec, self.stream, attention.q_norm
        matvec(x, (attention.q.weight,), self.query, gamma=norm.weight, eps=norm.eps)
        self.attend(self.query, (q_norm.weight, q_norm.weight), q_norm.eps, *context, self.mixed)
        matvec(self.mixed, (attention.out.weight,), x, residual=x)


def compile_ahead(
    config: ARTransformerConfig, device: torch.device, dtype: torch.dtype, batch: int = 1
) -> threading.Thread | None:
    """Thread that compiles the kernels of this architecture while weights load; None if unused."""
    if batch > MAX_BATCH_SIZE or not kernels_fit(config, device, dtype):
        return None

    @torch.inference_mode()
    def run() -> None:
        # kernels are compiled for columns of matrices, whatever their rows and number
        small = replace(config, depth=1, vocabulary=16, embedding_rows=32)
        with torch.device("meta"):
            model = ARTransformer(small).to(dtype)
        with torch.cuda.stream(torch.cuda.Stream(device)):
            model = model.to_empty(device=device)
            context: EncodedContext | None = None
            if config.context_width is not None:
                rows = torch.zeros(1, 16, config.context_width, device=device)
                context = model.encode_context(rows)
            step = FusedStep(model, make_positions(small, device, dtype), [context] * batch)
            first = torch.zeros(batch, dtype=torch.int64, device=device)
            step(first, first[0], model.new_cache(batch))

    thread = threading.Thread(target=run, name="compile", daemon=True)
    thread.start()
    return thread
