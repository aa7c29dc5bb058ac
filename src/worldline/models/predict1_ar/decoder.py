"""One clip after another through an autoregressive transformer, token by token.

`PlainDecoder` calls the model as it is, on any device. `CapturedDecoder` runs one clip on a CUDA
device: a step (the model by the kernels of `worldline.nn.decode_kernels`, the filter, the draw) is
captured once in a CUDA graph and replayed.
"""

from __future__ import annotations

import importlib.util
import threading

import torch
from torch import Tensor

from worldline.models.predict1_ar.model import ARTransformer, ARTransformerConfig, Positions
from worldline.sampling.logits import Sampling, draw


def make_decoder(
    model: ARTransformer,
    positions: Positions,
    sampling: Sampling,
    *,
    batch: int = 1,
    context: Tensor | None = None,
) -> PlainDecoder:
    """Return the fastest decoder that the device and the model allow.

    Args:
        model: on its device.
        positions: of a whole clip, on the same device in the dtype of the weights.
        sampling: how tokens are drawn.
        batch: B, clips decoded in step.
        context: text context (B, rows, width); Video2World only.
    """
    kind = CapturedDecoder if can_capture(model, batch) else PlainDecoder
    return kind(model, positions, sampling, batch=batch, context=context)


def can_capture(model: ARTransformer, batch: int) -> bool:
    weight = model.head.weight
    return (
        weight.dtype == torch.bfloat16 and batch == 1 and kernels_fit(model.config, weight.device)
    )


def kernels_fit(config: ARTransformerConfig, device: torch.device) -> bool:
    """Tell whether the kernels can run this architecture here."""
    return (
        device.type == "cuda"
        and config.context_width is None
        and not config.absolute_positions
        and config.head_size >= 32  # a tile of the attention kernel is a power of two wide
        and config.head_size & (config.head_size - 1) == 0
        and has_triton()
    )


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class PlainDecoder:
    """Calls the modules; the reference for the fast one."""

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
        self.encoded = None if context is None else model.encode_context(context)
        device = model.head.weight.device
        self.ids = torch.zeros(batch, self.cache.length, dtype=torch.int64, device=device)
        self.done = 0
        self._prepare()

    def _prepare(self) -> None:
        """Make what a faster decoder needs besides."""

    @property
    def tokens(self) -> Tensor:
        """Prompt and drawn tokens (B, so far)."""
        return self.ids[:, : self.done]

    @torch.inference_mode()
    def start(self, prompt: Tensor, noise: Tensor | None) -> None:
        """Read `prompt` (B, P) at once and draw the token after it.

        Raises:
            ValueError: the prompt leaves no room in the clip.
        """
        count = prompt.shape[1]
        if not 0 < count < self.cache.length:
            raise ValueError(f"a prompt of {count} tokens; a clip has {self.cache.length}")
        self.ids[:, :count] = prompt
        logits = self.model(
            prompt,
            self.positions,
            cache=self.cache,
            context=self.encoded,
            last_only=True,
        )
        self.ids[:, count] = draw(logits[:, -1], self.sampling, noise)
        self.done = count + 1

    @torch.inference_mode()
    def step(self, noise: Tensor | None) -> None:
        """Read the last token and draw the next; `noise` is (B, V), or None when greedy."""
        last = self.ids[:, self.done - 1 : self.done]
        logits = self.model(
            last,
            self.positions,
            cache=self.cache,
            start=self.done - 1,
            context=self.encoded,
        )
        self.ids[:, self.done] = draw(logits[:, -1], self.sampling, noise)
        self.done += 1


class CapturedDecoder(PlainDecoder):
    """One clip, one CUDA graph a token."""

    name = "CUDA graph, Triton kernels"

    def _prepare(self) -> None:
        self.fused = FusedStep(self.model, self.positions)
        device = self.ids.device
        self.position = torch.zeros((), dtype=torch.int64, device=device)
        self.noise = torch.ones(1, self.model.config.vocabulary, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def start(self, prompt: Tensor, noise: Tensor | None) -> None:
        super().start(prompt, noise)
        self.position.fill_(self.done - 1)  # of the token that the next step reads

    @torch.inference_mode()
    def step(self, noise: Tensor | None) -> None:
        if self.graph is None:
            self._capture()
        assert self.graph is not None
        if noise is not None:
            self.noise.copy_(noise)
        self.graph.replay()
        self.done += 1

    def _run(self) -> None:
        last = self.ids[0].gather(0, self.position.view(1))
        logits = self.fused(last, self.position, self.cache.keys, self.cache.values)
        self.position += 1
        token = draw(logits, self.sampling, self.noise)
        self.ids[0].scatter_(0, self.position.view(1), token)

    def _capture(self) -> None:
        # Rehearsals compile the kernels. They write one token and one row of the cache, which the
        # first replay writes again with the same values, and move the position, which is put back.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        position = self.position.clone()
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
    """The transformer for one token of one clip, by five kernels a layer."""

    def __init__(self, model: ARTransformer, positions: Positions) -> None:
        from worldline.nn import decode_kernels

        self.kernels = decode_kernels
        self.model = model
        self.rotation = positions.rotation
        config = model.config
        device = model.head.weight.device

        def buffer(size: int) -> Tensor:
            return torch.empty(size, dtype=torch.bfloat16, device=device)

        heads = config.num_heads * config.head_size
        self.stream = buffer(config.width)
        self.qkv = buffer(heads + 2 * config.num_kv_heads * config.head_size)
        self.mixed = buffer(heads)
        self.hidden = buffer(config.hidden)
        self.logits = buffer(config.vocabulary)
        self.attend = decode_kernels.Attend(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_size=config.head_size,
            device=device,
        )

    def __call__(self, token: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return logits (1, V), bf16.

        Args:
            token: (1,) id on the device.
            position: () its index in the clip.
            keys: (layers, 1, M, length, K) cache, one row a layer is written.
            values: as `keys`.
        """
        matvec, x = self.kernels.matvec, self.stream
        torch.index_select(self.model.embedding.weight, 0, token, out=x.view(1, -1))
        for number, layer in enumerate(self.model.stack):
            attention, feed_forward = layer.attention, layer.feed_forward
            matvec(
                x,
                (attention.q.weight, attention.k.weight, attention.v.weight),
                self.qkv,
                gamma=layer.attention_norm.weight,
                eps=layer.attention_norm.eps,
            )
            self.attend(
                self.qkv,
                attention.q_norm.weight,
                attention.k_norm.weight,
                attention.q_norm.eps,
                self.rotation.cos,
                self.rotation.sin,
                keys[number, 0],
                values[number, 0],
                position,
                self.mixed,
            )
            matvec(self.mixed, (attention.out.weight,), x, residual=x)
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
        return self.logits.view(1, -1)


def compile_ahead(config: ARTransformerConfig, device: torch.device) -> threading.Thread | None:
    """Compile the kernels of a decoder of this architecture in a thread, while weights load.

    Returns None where there is nothing to compile.
    """
    if not kernels_fit(config, device):
        return None

    def run() -> None:
        from worldline.nn import decode_kernels

        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            decode_kernels.compile_for(
                width=config.width,
                hidden=config.hidden,
                num_heads=config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_size=config.head_size,
                device=device,
            )

    thread = threading.Thread(target=run, name="compile", daemon=True)
    thread.start()
    return thread
