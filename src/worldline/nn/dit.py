"""Blocks that the diffusion transformers of Predict1 and Predict2.5 share.

Source: nvidia-cosmos/cosmos-predict1 `diffusion/module/{blocks,attention}.py`; nvidia-cosmos/
cosmos-predict2.5 `_src/predict2/networks/minimal_v4_dit.py`, whose blocks are the same. A block has
three sub-blocks, each with its own modulation: self-attention, cross-attention to the text, and
feed-forward.
Axes: B batch, C channels, T/H/W latent grid, L tokens, D width, N heads, K head size, S rows of
the text, G noise levels of a clip.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldline.nn.attention import attend
from worldline.nn.modulation import Residual, add_and_modulate, norm_heads
from worldline.nn.rope import Rotation, stretched_angles_3d
from worldline.shapes import LatentShape

# keys and values (B, N, S, K) of the text, block by block
Context = list[tuple[Tensor, Tensor]]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # `attend` of q, k, v

PATCH = (1, 2, 2)  # latent cells a token covers in time, rows and columns, in all models
PATCH_CELLS = 4
LARGEST_GRID = LatentShape(128, 120, 120)  # tokens, of all released models
# ends of names of a block's weights that encode a text, before the blocks are called
TEXT_WEIGHTS = ("cross_attention.body.k.weight", "cross_attention.body.v.weight", "body.k_norm")
NOISE_LAYERS = ("noise.first", "noise.second")  # of a `NoiseEmbedding`
# hidden activations of the feed-forward that exist at once; 56,320 tokens of 14B would need 2.3 GB
HIDDEN_BYTES = 512 << 20


def released_sizes(depth: int, width: int) -> dict[str, Any]:
    """Sizes of the released models, which differ in depth and width alone."""
    return {
        "depth": depth,
        "width": width,
        "num_heads": width // 128,
        "head_size": 128,
        "hidden": 4 * width,
        "context_width": 1024,
        "lora_rank": 256,
        "max_grid": LARGEST_GRID,
    }


@dataclass(frozen=True, kw_only=True)
class DiTSizes:
    """Sizes of the blocks, and of the grids of tokens.

    Attributes:
        depth: number of blocks.
        width: D.
        num_heads: N.
        head_size: K.
        hidden: channels inside the feed-forward.
        context_width: channels of the text that the blocks attend to.
        lora_rank: rank of the modulation's low-rank matrices.
        max_grid: tokens of the largest grid.
        rope_ratio: stretching of the rotary positions in time, rows and columns.
        latent_channels: C, without the masks.
    """

    depth: int
    width: int
    num_heads: int
    head_size: int
    hidden: int
    context_width: int
    lora_rank: int
    max_grid: LatentShape
    rope_ratio: tuple[float, float, float]
    latent_channels: int = 16

    @property
    def text_width(self) -> int:
        """Channels of a text embedding."""
        return self.context_width

    @property
    def stream_numbers(self) -> int:
        """Numbers of a token between two blocks that are computed again."""
        return self.width

    def saved_numbers(self, trained: Set[str], wide: int, compiled: bool) -> int:
        """Numbers of a token that a block keeps while gradients are wanted, in its plain form.

        torch.compile computes norms and products of gates again.

        Args:
            trained: layers and norms of a block whose weights are trained, or have an adapter, such
                as "attention.body.q".
            wide: numbers in the computation's precision that one in float32 takes.
            compiled: by torch.compile.
        """
        inner = self.num_heads * self.head_size
        # of heads: in float32; what its weight multiplies
        norm = 1 if compiled else wide + ("attention.body.q_norm" in trained)

        def modulated(block: str, *layers: str) -> int:
            """The stream; update and norm, for gate and scale; what the layers read."""
            vectors = 1 if compiled else 2
            gates = {f"{block}.modulation.first", f"{block}.modulation.second", *NOISE_LAYERS}
            read = {f"{block}.body.{layer}" for layer in layers}
            return (1 + vectors * bool(trained & gates) + bool(trained & read)) * self.width

        # queries, keys, values and the result
        attention = modulated("attention", "q", "k", "v") + (2 * (norm + 1) + 2) * inner
        text = modulated("cross_attention", "q") + (norm + 1 + 1) * inner
        hidden = (1 + ("feed_forward.body.down" in trained)) * self.hidden  # before, behind GELU
        return attention + text + modulated("feed_forward", "up") + hidden

    def gradient_numbers(self, trained: Set[str]) -> int:
        """Numbers of a token of the gradients that a block holds beside what it keeps.

        They are widest in the feed-forward; where norms are trained, too, the first of the two
        takes the room of what was kept.
        """
        return 2 * self.width + (2 - ("attention.body.q_norm" in trained)) * self.hidden

    def text_numbers(self, trained: Set[str], wide: int) -> int:
        """Numbers of a row of the text that all blocks keep: keys, with their norm, and values."""
        norm = wide + ("cross_attention.body.k_norm" in trained)
        return self.depth * (norm + 1 + 1) * self.num_heads * self.head_size

    def shared_numbers(self, trained: Set[str], wide: int) -> int:
        """Numbers of a token that are kept once: rotation, and latents of a step's loss."""
        return wide * (2 * self.head_size + 8 * PATCH_CELLS * self.latent_channels)

    def flops(self, grid: LatentShape, rows: int = 512) -> float:
        """Operations of a forward of a clip, with a text of so many rows, which is encoded before.

        Two for each multiplication.
        """
        tokens, inner = self.tokens(grid).tokens, self.num_heads * self.head_size
        linear = 2 * tokens * self.width * (6 * inner + 2 * self.hidden)
        return float(self.depth * (linear + 4 * tokens * inner * (tokens + rows)))

    def tokens(self, grid: LatentShape) -> LatentShape:
        """Tokens of a latent grid.

        Raises:
            ValueError: a side is no multiple of the patch, or beyond the model's positions.
        """
        largest = [n * patch for n, patch in zip(astuple(self.max_grid), PATCH, strict=True)]
        axes = list(zip(astuple(grid), PATCH, largest, strict=True))
        if any(cells % patch or cells > most for cells, patch, most in axes):
            cells, patch, most = (" x ".join(map(str, sides)) for sides in zip(*axes, strict=True))
            raise ValueError(
                f"{cells} latent cells; sides must be multiples of {patch}; positions reach to "
                f"{most}"
            )
        return LatentShape(*(cells // patch for cells, patch, _ in axes))


class Attention(nn.Module):
    """Attention to the tokens themselves, or to all rows of the text, its padding included."""

    def __init__(self, sizes: DiTSizes, source_width: int) -> None:
        super().__init__()
        inner = sizes.num_heads * sizes.head_size
        self.head_size = sizes.head_size
        self.q = nn.Linear(sizes.width, inner, bias=False)
        self.k = nn.Linear(source_width, inner, bias=False)
        self.v = nn.Linear(source_width, inner, bias=False)
        self.q_norm = nn.Parameter(torch.empty(sizes.head_size))
        self.k_norm = nn.Parameter(torch.empty(sizes.head_size))
        self.out = nn.Linear(inner, sizes.width, bias=False)

    def heads(self, x: Tensor) -> Tensor:
        """(B, L, N, K): split by head size, so that column-sharded layers need no change."""
        return x.unflatten(-1, (-1, self.head_size))

    def encode(self, source: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values (B, N, S, K); those of a text are the same for every token and step."""
        k = norm_heads(self.heads(self.k(source)), self.k_norm, rotation)
        return k.transpose(1, 2), self.heads(self.v(source)).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        encoded: tuple[Tensor, Tensor] | None = None,
        rotation: Rotation | None = None,
        attend: Attend = attend,
    ) -> Tensor:
        """(B, L, D); keys and values are by default those of `x`."""
        q = norm_heads(self.heads(self.q(x)), self.q_norm, rotation).transpose(1, 2)
        y = attend(q, *(encoded or self.encode(x, rotation)))
        return self.out(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two matrices with an exact GELU between, a part of the rows at a time when they are many."""

    def __init__(self, sizes: DiTSizes) -> None:
        super().__init__()
        self.up = nn.Linear(sizes.width, sizes.hidden, bias=False)
        self.down = nn.Linear(sizes.hidden, sizes.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        at_once = max(1, HIDDEN_BYTES // (self.up.out_features * x.element_size()))
        if torch.is_grad_enabled() or len(rows) <= at_once:
            return self.down(F.gelu(self.up(x)))
        y = torch.empty_like(rows)
        parts = -(-len(rows) // at_once)
        for part, place in zip(rows.chunk(parts), y.chunk(parts), strict=True):
            torch.mm(F.gelu(self.up(part)), self.down.weight.T, out=place)
        return y.view(x.shape)


class NoiseLevel(NamedTuple):
    """Vectors that modulate the blocks at one noise level a clip, or at one for each of G runs.

    Attributes:
        embedding: (B, D) or (B, G, D), activated.
        shared: (B, 3 D) or (B, G, 3 D), added to every modulation.
    """

    embedding: Tensor
    shared: Tensor


class NoiseEmbedding(nn.Module):
    """Layers that make a `NoiseLevel` of a time; families run them in precisions of their own.

    The norm acts on the bare sinusoid, not on the layers' output.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, 3 * width, bias=False)
        self.norm = nn.Parameter(torch.empty(width))


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A layer without a bias, in the precision of `x`, which may be above that of its weights."""
    return F.linear(x, layer.weight.to(x.dtype))


class Modulation(nn.Module):
    """Low-rank layer that turns a noise level into shifts, scales and gates, in its precision."""

    def __init__(self, sizes: DiTSizes, count: int) -> None:
        super().__init__()
        self.count = count
        self.first = nn.Linear(sizes.width, sizes.lora_rank, bias=False)
        self.second = nn.Linear(sizes.lora_rank, count * sizes.width, bias=False)

    def forward(self, noise: NoiseLevel) -> tuple[Tensor, ...]:
        """`count` vectors, (B, D) or (B, G, D)."""
        learned = linear(self.second, linear(self.first, noise.embedding))
        return (learned + noise.shared[..., : learned.shape[-1]]).chunk(self.count, dim=-1)


class Modulated(nn.Module):
    """Adds the previous sub-block's gated output, applies adaLN, runs the body."""

    def __init__(self, sizes: DiTSizes, body: nn.Module) -> None:
        super().__init__()
        self.modulation = Modulation(sizes, 3)
        self.body = body

    def forward(
        self, residual: Residual, noise: NoiseLevel, *inputs: object, added: Tensor | None = None
    ) -> Residual:
        # rounded to the stream's dtype before use, as in the released pipelines
        shift, scale, gate = (one.to(residual.stream.dtype) for one in self.modulation(noise))
        stream, normed = add_and_modulate(residual, added, shift, scale)
        return Residual(stream, self.body(normed, *inputs), gate)


class Block(nn.Module):
    """DiT block: self-attention, attention to the text and feed-forward, each under adaLN."""

    def __init__(self, sizes: DiTSizes) -> None:
        super().__init__()
        self.attention = Modulated(sizes, Attention(sizes, sizes.width))
        self.cross_attention = Modulated(sizes, Attention(sizes, sizes.context_width))
        self.feed_forward = Modulated(sizes, FeedForward(sizes))

    def forward(
        self,
        residual: Residual,
        noise: NoiseLevel,
        rotation: Rotation,
        context: tuple[Tensor, Tensor],
        added: Tensor | None = None,
        attend: Attend = attend,
    ) -> Residual:
        """The stream and the feed-forward's output; `added` enters the stream first."""
        residual = self.attention(residual, noise, None, rotation, attend, added=added)
        residual = self.cross_attention(residual, noise, context)
        return self.feed_forward(residual, noise)

    def closed(self, *inputs: Any) -> Residual:
        """As a call, with the update in the stream: between blocks it alone is kept."""
        return Residual(Block.forward(self, *inputs).total())


class Head(nn.Module):
    """The last norm and layer, in the precision of the noise level."""

    def __init__(self, sizes: DiTSizes) -> None:
        super().__init__()
        self.modulation = Modulation(sizes, 2)
        self.linear = nn.Linear(sizes.width, sizes.latent_channels * PATCH_CELLS, bias=False)

    def forward(self, residual: Residual, noise: NoiseLevel) -> Tensor:
        shift, scale = self.modulation(noise)
        dtype = torch.promote_types(shift.dtype, residual.stream.dtype)
        return linear(self.linear, add_and_modulate(residual, None, shift, scale, dtype)[1])


def patchify(
    latents: Tensor,
    conditioning: Sequence[Tensor],
    padding_mask: Tensor | None,
) -> Tensor:
    """Input of each token (B, L, features): channels slowest, then rows and columns.

    Args:
        latents: (B, C, T, H, W), in the dtype of the result.
        conditioning: (B, any, T, H, W), further channels.
        padding_mask: (B, 1, h, w) of any size, the last channel; None is a mask of zeros.
    """
    mask = latents.new_zeros(1, 1, 1, 1) if padding_mask is None else padding_mask.to(latents)
    padding = F.interpolate(mask, latents.shape[3:], mode="nearest").unsqueeze(2)
    last = padding.expand(len(latents), 1, latents.shape[2], -1, -1)
    x = torch.cat([latents, *(part.to(latents) for part in conditioning), last], dim=1)
    _, rows, columns = PATCH
    x = x.unflatten(4, (-1, columns)).unflatten(3, (-1, rows))  # (B, C, T, H', r, W', c)
    return x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)


def unpatchify(y: Tensor, grid: LatentShape) -> Tensor:
    """(B, C, T, H, W) of tokens (B, L, features): channels fastest, unlike in the input."""
    _, rows, columns = PATCH
    height, width = grid.height // rows, grid.width // columns
    y = y.view(len(y), grid.frames, height, width, rows, columns, -1)
    y = y.permute(0, 6, 1, 2, 4, 3, 5)
    return y.reshape(len(y), -1, grid.frames, grid.height, grid.width)


class Tokens:
    """All tokens of a clip, in one process; `parallel.context` splits them over several.

    Attributes:
        exchanged: activations of a process's tokens that its attention holds for the exchange.
    """

    exchanged = 0

    def num_rows(self, count: int) -> int:
        """Tokens of a process, of `count` in all, the most that one has."""
        return count

    def part(self, x: Tensor) -> Tensor:
        """This process's rows of (..., L, any)."""
        return x

    def join(self, y: Tensor) -> Tensor:
        """All rows (B, L, any) of each process's."""
        return y

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attend` of this process's queries to the keys of all tokens."""
        return attend(q, k, v)

    def num_queries(self, count: int) -> int:
        """Queries that attention has at once in a clip of `count` tokens."""
        return count

    def __str__(self) -> str:
        return ""


ALL_TOKENS = Tokens()


class Reuse(Protocol):
    """A sampler's choice of calls in which the blocks do not run; see `sampling.cache`."""

    def reuse(self, stream: Tensor) -> Tensor | None:
        """The stream (B, L, D) behind the blocks, from that before them; None where they run."""

    def keep(self, stream: Tensor) -> None:
        """Take the stream behind blocks that ran."""


class DiffusionTransformer(nn.Module):
    """Tokens of noised latents through modulated blocks; families add noise level and positions."""

    def __init__(self, sizes: DiTSizes, input_channels: int, noise: nn.Module) -> None:
        super().__init__()
        self.config = sizes
        self.embed = nn.Linear(input_channels * PATCH_CELLS, sizes.width, bias=False)
        self.noise = noise
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.depth))
        self.head = Head(sizes)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.weight.dtype

    def encode_context(self, context: Tensor) -> Context:
        """Every block's keys and values of a text (B, S, E); the same for all steps."""
        context = context.to(self.embed.weight.device, self.dtype)
        return [block.cross_attention.body.encode(context) for block in self.blocks]  # type: ignore[union-attr, operator]

    def rotation(self, grid: LatentShape, **options: Any) -> Rotation:
        """Rotation of every token of a latent grid within the model's own, else a `ValueError`.

        Options are those of `stretched_angles_3d`.
        """
        config = self.config
        tokens, ratio = config.tokens(grid), config.rope_ratio
        angles = stretched_angles_3d(tokens, config.head_size, ratio=ratio, **options)
        angles = angles.to(self.embed.weight.device)
        return Rotation(angles.cos(), angles.sin())

    def run(
        self,
        latents: Tensor,
        conditioning: Sequence[Tensor],
        padding_mask: Tensor | None,
        noise: NoiseLevel,
        context: Context,
        rotation: Rotation,
        added: Tensor | None = None,
        tokens: Tokens = ALL_TOKENS,
        cache: Reuse | None = None,
    ) -> Tensor:
        """Output, shaped like the latents; their channels and masks as `patchify` takes them.

        The rotation is (L, K); `added` (L, D) enters the stream before every block. Where several
        processes share the tokens, each gets the output of all.
        """
        x = tokens.part(patchify(latents.to(self.dtype), conditioning, padding_mask))
        rotation = Rotation(*map(tokens.part, rotation))
        added = None if added is None else tokens.part(added)
        residual = Residual(self.embed(x))
        if cache and (reused := cache.reuse(residual.stream)) is not None:
            residual = Residual(reused)
        else:
            for block, encoded in zip(self.blocks, context, strict=True):
                residual = block(residual, noise, rotation, encoded, added, tokens.attend)
            if cache:
                cache.keep(residual.total())
        y = tokens.join(self.head(residual, noise))
        return unpatchify(y, LatentShape(*latents.shape[2:]))
