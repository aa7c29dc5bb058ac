"""Causal video tokenizers: a clip of any length piece by piece, and a rough look at latents.

Every layer that looks back keeps what it needs of earlier frames in a `CausalCache`, and none looks
ahead: the pieces together are exactly the whole, without a seam, and nothing is computed twice.
Axes: B batch, C channels, T/H/W frames, rows, columns; t/h/w those of latents.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.shapes import VideoShape

_SIDE = 16  # of a picture that colours are fitted to, in latent cells
_PICTURES = 6
_DAMPING = 1e-3  # against channels that hold no colour


class Rows:
    """All rows of a picture, in one process; `parallel.halo` shares them with others.

    Attributes:
        split: whether this process computes a part of them.
    """

    split: ClassVar[bool] = False

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This process's rows along axis `dim`, at any resolution."""
        return x

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """All rows, joined along axis `dim`, of this process's."""
        return x

    def pool(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance over all rows, of those over this process's."""
        return mean, variance

    def convolve(self, layer: Callable[[Tensor], Tensor], cells: Tensor, stride: int = 1) -> Tensor:
        """A convolution, 3 x 3 in space, of this process's rows of cells (B, T, H, W, C).

        `layer` pads with zeros: all sides, or with a stride of 2 the right and the bottom alone.
        """
        return layer(cells)


ALL_ROWS = Rows()


class CausalCache:
    """State of a network between two pieces of a clip; a new one for each clip.

    Attributes:
        started: a piece has passed; until then layers start a clip.
        state: last input frames of a layer, or keys and values of all frames.
        rows: which this process computes.
    """

    def __init__(self, rows: Rows = ALL_ROWS, *, keep: bool = True) -> None:
        """Without `keep` nothing is stored: for a clip that passes as a whole."""
        self.rows = rows
        self.keep = keep
        self.started = False
        self.state: dict[object, Tensor] = {}

    def get(self, layer: nn.Module) -> Tensor | None:
        """Frames stored by the piece before; None at the start of a clip."""
        return self.state.get(layer) if self.keep else None

    def put(self, layer: nn.Module, frames: Tensor) -> None:
        """Store frames for the next piece; a copy, since a view would keep all of its piece."""
        if self.keep:
            self.state[layer] = frames.clone(memory_format=torch.contiguous_format)

    def extend(self, key: object, frames: Tensor) -> Tensor:
        """All frames stored under `key` so far and these behind them, along axis 1; stored."""
        if not self.keep:
            return frames
        if key in self.state:
            frames = torch.cat([self.state[key], frames], dim=1)
        self.state[key] = frames
        return frames


class CausalTokenizer(nn.Module):
    """Base of the video tokenizers.

    Attributes:
        chunk: latent frames at once where a clip passes in pieces.
        config: architecture; has `temporal` and `spatial`, the frames and pixels of a latent cell.
    """

    chunk: int
    config: Any

    def encode(self, video: Tensor, cache: CausalCache | None = None) -> Tensor:
        """Latents (B, C, t, h, w) of a video (B, 3, T, H, W) in [-1, 1], in the weights' dtype.

        The cache holds the pieces of this clip encoded before; updated.

        Raises:
            ValueError: T is not 1 + temporal*k (after the first piece: temporal*k), or H or W is no
                multiple of the compression.
        """
        cache = cache or CausalCache(keep=False)
        frames, height, width = video.shape[2:]
        frames += cache.started  # as if after frame 0 alone
        VideoShape(frames, height, width).latent(self.config.temporal, self.config.spatial)
        latents = cache.rows.gather(self.encode_piece(cache.rows.part(video, 3), cache), 3)
        cache.started = cache.keep
        return latents

    def decode(self, latents: Tensor, cache: CausalCache | None = None) -> Tensor:
        """Video (B, 3, T, H, W), about [-1, 1] and not clamped, of latents (B, C, t, h, w).

        Those of a discrete tokenizer are codes; all are in the dtype of the weights. Where
        processes share the rows, each gives the latents of all, and has the video of its own.
        """
        cache = cache or CausalCache(keep=False)
        video = self.decode_piece(cache.rows.part(latents, 3), cache)
        cache.started = cache.keep
        return video

    def reconstruct(self, video: Tensor) -> Tensor:
        """decode(encode(video))."""
        return self.decode(self.encode(video))

    def encode_piece(self, video: Tensor, cache: CausalCache) -> Tensor:
        raise NotImplementedError

    def decode_piece(self, latents: Tensor, cache: CausalCache) -> Tensor:
        raise NotImplementedError


def each_frame(layer: Callable[..., Tensor], cells: Tensor, *arguments: object) -> Tensor:
    """Cells (B, T, H', W', C') that a layer makes of frames (B T, C, H, W)."""
    frames = layer(cells.permute(0, 1, 4, 2, 3).flatten(0, 1), *arguments)
    return frames.permute(0, 2, 3, 1).unflatten(0, cells.shape[:2])


class SpatialConv(nn.Module):
    """A convolution over each frame of cells (B, T, H, W, C), to as many rows and columns.

    A stride of 2 halves them, and pads the right and the bottom alone. The weight has its released
    shape, (C', C, 1, k, k) or with two `axes` (C', C, k, k).
    """

    def __init__(
        self, inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, axes: int = 3
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *(1, kernel, kernel)[-axes:]))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.stride = stride

    def forward(self, cells: Tensor, rows: Rows = ALL_ROWS) -> Tensor:
        return rows.convolve(self._convolve, cells, self.stride)

    def _convolve(self, cells: Tensor) -> Tensor:
        weight = self.weight[:, :, 0] if self.weight.ndim == 5 else self.weight
        padding = weight.shape[-1] // 2
        if self.stride == 2:
            padding = 0
            cells = F.pad(cells.permute(0, 4, 1, 2, 3), (0, 1, 0, 1)).permute(0, 2, 3, 4, 1)
        return each_frame(F.conv2d, cells, weight, self.bias, self.stride, padding)


class TemporalConv(nn.Module):
    """A convolution over three frames of cells (B, T, H, W, C), without padding.

    The weight has its released 5-D shape; the rows of a frame are one axis of the convolution.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 1, 1))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.stride = stride

    def forward(self, cells: Tensor) -> Tensor:
        rows = cells.flatten(2, 3).permute(0, 3, 1, 2)  # (B, C, T, H W)
        rows = F.conv2d(rows, self.weight[..., 0], self.bias, (self.stride, 1))
        return rows.permute(0, 2, 3, 1).unflatten(2, cells.shape[2:4])


def enlarge(cells: Tensor) -> Tensor:
    """Cells (B, T, H, W, C), each repeated in a square of two: (B, T, 2 H, 2 W, C).

    A copy is several times as fast as `interpolate` with channels last on a GPU.
    """
    squares = cells[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2, -1)
    return squares.flatten(2, 3).flatten(3, 4)


@torch.no_grad()
def encode_stream(
    model: CausalTokenizer, frames: Iterable[Tensor], rows: Rows = ALL_ROWS
) -> Iterator[Tensor]:
    """Latents (B, C, t, h, w), piece by piece, of a clip that arrives piece by piece.

    Args:
        model: on its device.
        frames: pieces (B, 3, T, H, W) in [-1, 1], on the device and in the dtype of the weights, of
            any lengths; 1 + temporal*k frames in all.
        rows: which this process computes; it is given all, and has the latents of all.

    Raises:
        ValueError: the frames do not add up to 1 + temporal*k, or a side is no multiple of the
            compression.
    """
    temporal, cache = model.config.temporal, CausalCache(rows)
    wanted = 1 + temporal * (model.chunk - 1)  # the first latent frame is of one frame
    waiting: Tensor | None = None
    for piece in frames:
        waiting = piece if waiting is None else torch.cat([waiting, piece], dim=2)
        while waiting.shape[2] >= wanted:
            yield model.encode(waiting[:, :, :wanted], cache)
            waiting, wanted = waiting[:, :, wanted:], temporal * model.chunk
    if waiting is not None and waiting.shape[2]:
        yield model.encode(waiting, cache)


@torch.no_grad()
def decode_stream(
    model: CausalTokenizer, latents: Tensor, rows: Rows = ALL_ROWS
) -> Iterator[Tensor]:
    """Video (B, 3, T, H, W), about [-1, 1] and not clamped, piece by piece.

    Args:
        model: on its device.
        latents: (B, C, t, h, w), or codes of a discrete tokenizer; any device and float dtype.
        rows: which this process computes, and has in the end.
    """
    weight, cache = next(model.parameters()), CausalCache(rows)
    for piece in latents.split(model.chunk, dim=2):
        yield model.decode(piece.to(weight.device, weight.dtype), cache)


def fit_colours(tokenizer: CausalTokenizer) -> Tensor:
    """Linear maps from latents to colours, for previews, by least squares.

    They are fitted to smooth still pictures, the same every time. The first latent frame holds one
    frame of video and the others several, so there is a map for each.

    Returns:
        (2, C + 1, 3), float32, on the CPU; the last row is added.
    """
    config, weight = tokenizer.config, next(tokenizer.parameters())
    noise = np.random.RandomState(0).uniform(-1, 1, (_PICTURES, 3, 4, 4)).astype(np.float32)
    side = _SIDE * config.spatial
    pictures = F.interpolate(torch.from_numpy(noise), size=(side, side), mode="bicubic").clamp(
        -1, 1
    )
    colours = F.avg_pool2d(pictures, config.spatial).permute(0, 2, 3, 1).reshape(-1, 3).double()
    still = pictures[:, :, None].expand(-1, -1, 1 + config.temporal, -1, -1)
    latents = tokenizer.encode(still.to(weight)).double().cpu()
    known = F.pad(
        latents.permute(2, 0, 3, 4, 1).flatten(1, 3), (0, 1), value=1
    )  # (2, cells, C + 1)
    damping = _DAMPING * known.shape[1] * torch.eye(known.shape[2], dtype=known.dtype)
    return torch.linalg.solve(known.mT @ known + damping, known.mT @ colours).float()
