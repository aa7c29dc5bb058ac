"""What post-training of the autoregressive transformer minimises: the next token's cross entropy.

Source: nvidia-cosmos/cosmos-predict1 `autoregressive/training/model.py`. Models with a text have no
released recipe; theirs is ours: the same loss, and prompts that are dropped as in the released
recipes of the diffusion transformers.
Axes: B batch, L tokens of a clip, V vocabulary, D width, S rows of the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from worldline.families.autoregressive.model import (
    ARTransformer,
    ARTransformerConfig,
    Positions,
    make_positions,
)
from worldline.families.autoregressive.weights import settings_of
from worldline.family import Opened, Parts
from worldline.losses import IGNORED, next_token_labels
from worldline.request import Share
from worldline.shapes import LatentShape
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import Network

_ROWS = 1024  # positions whose float32 logits exist at once: those of a clip would need 2.7 GB


class Losses(NamedTuple):
    """Terms of a step's loss, float32, ().

    Attributes:
        cross_entropy: mean over the tokens that count, nats.
        z: weighted mean over all positions of log(sum(exp(logits)))^2; arXiv 2204.02311, section 5.
    """

    cross_entropy: Tensor
    z: Tensor


@dataclass(frozen=True, kw_only=True)
class NextTokenObjective:
    """Recipe of a step.

    Attributes:
        conditioning: latent frames that are given; only tokens behind them count.
        z_coefficient: weight of the z-loss.
        text_dropout: share of prompts that are dropped, of models that read one.
    """

    conditioning: Annotated[int, Field(ge=1)] = 1
    z_coefficient: Annotated[float, Field(ge=0)] = 1e-4
    text_dropout: Share = 0.2

    def draw(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """(B,), 0 where the prompt is dropped, else 1."""
        chance = torch.rand(len(tokens), generator=generator, device=generator.device)
        return (chance >= self.text_dropout).float().to(tokens.device)

    def labels(self, model: ARTransformer, tokens: Tensor) -> Tensor:
        """Labels (B, L - 1) of tokens (B, L): the next one, or IGNORED in the frames given."""
        config = model.config
        given = config.leading_tokens + self.conditioning * config.grid.tokens_per_frame
        return next_token_labels(tokens, given - 1)

    def loss(
        self,
        model: ARTransformer,
        batch: tuple[Tensor, Positions, Tensor | None],
        text_kept: Tensor | None = None,
    ) -> Losses:
        """Terms of the loss of clips.

        Args:
            model: float32 or bf16.
            batch: tokens (B, L); positions of a whole clip; text (B, S, width), None for a base
                model.
            text_kept: of `draw`.
        """
        tokens, positions, text = batch
        if text is not None and text_kept is not None:
            text = text * text_kept.to(text)[:, None, None]
        labels = self.labels(model, tokens)
        stream = model.hidden(tokens, positions, context=model.encode_context(text))
        hidden = model.norm(stream[:, :-1])
        parts = [
            checkpoint(_terms, model.head, rows, given, use_reentrant=False)
            for rows, given in zip(
                hidden.flatten(0, 1).split(_ROWS), labels.flatten().split(_ROWS), strict=True
            )
        ]
        entropy, z = (torch.stack(term).sum() for term in zip(*parts, strict=True))
        entropy = entropy / (labels != IGNORED).sum()
        return Losses(entropy, self.z_coefficient * z / labels.numel())


class TrainingStep(nn.Module):
    """Loss of the clips of a batch, all of one grid.

    Attributes:
        recipe: of the step.
    """

    BLOCKS = "layers"
    RECIPE = NextTokenObjective

    def __init__(
        self, network: ARTransformer, recipe: NextTokenObjective, grid: LatentShape
    ) -> None:
        super().__init__()
        network.config = replace(network.config, grid=grid)
        self.network, self.recipe = network, recipe
        self.positions: dict[tuple[torch.device, torch.dtype], Positions] = {}

    def draw(self, batch: tuple[Tensor, ...], generator: torch.Generator) -> tuple[Tensor, ...]:
        """Arguments of `forward`, of those that `make_batch` made."""
        return batch if len(batch) == 1 else (*batch, self.recipe.draw(batch[0], generator))

    def forward(
        self, tokens: Tensor, text: Tensor | None = None, text_kept: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and its terms; tokens (B, L), text (B, S, width) of models that read one."""
        batch = tokens.long(), self._positions(tokens), text
        entropy, z = self.recipe.loss(self.network, batch, text_kept)
        return entropy + z, {"cross_entropy": entropy.detach(), "z_loss": z.detach()}

    def predict(self, parts: Parts, tokens: Tensor, text: Tensor | None = None) -> Tensor:
        """Ids (1, t, h, w) that are most likely behind the true ones, as the released trainer has.

        Arguments are those that `make_batch` made of one clip; its given frames stay.
        """
        config, context = self.network.config, self.network.encode_context(text)
        stream = self.network.hidden(tokens.long(), self._positions(tokens), context=context)
        hidden = self.network.norm(stream)
        rows = [self.network.head(part).argmax(-1) for part in hidden[:, :-1].split(_ROWS, 1)]
        given = config.leading_tokens + self.recipe.conditioning * config.grid.tokens_per_frame
        ids = torch.cat([tokens[:, :given], torch.cat(rows, 1)[:, given - 1 :]], 1)
        return ids[:, config.leading_tokens :].unflatten(1, astuple(config.grid))

    def _positions(self, tokens: Tensor) -> Positions:
        where = tokens.device, self.network.norm.weight.dtype
        if where not in self.positions:
            self.positions[where] = make_positions(self.network.config, *where)
        return self.positions[where]


def check_grid(recipe: NextTokenObjective, grid: LatentShape) -> None:
    """Raise `ValueError` for a clip whose frames are all given."""
    if recipe.conditioning >= grid.frames:
        raise ValueError(
            f"{grid.frames} latent frames, of which objective.conditioning ({recipe.conditioning}) "
            "are given; one more at least is predicted"
        )


# files of a checkpoint: name, what it holds, precision; and what names the newest
MODEL_FILES = (("iter_{step:09}.pt", "weights", torch.bfloat16),)
NEWEST = "iter_{step:09}.pt"
BESIDE = ""  # pattern of further names of files that are kept as they were


def make_step(
    model: ARTransformer, recipe: NextTokenObjective, grid: LatentShape, network: Network[Any]
) -> TrainingStep:
    """A step of a model, whose files are those of `network`."""
    return TrainingStep(model, recipe, grid)


def released_name(keys: KeyMap, name: str) -> str:
    """Name in files of a parameter of a step."""
    return keys.released(name.removeprefix("network."))


def loss_bytes(config: ARTransformerConfig, tokens: int, itemsize: int) -> int:
    """Bytes of the loss: the last norm, and float32 logits of the rows that exist at once."""
    return 6 * tokens * config.width * itemsize + 4 * 4 * min(tokens, _ROWS) * config.vocabulary


def settings(config: ARTransformerConfig, opened: Opened) -> dict[str, Any]:
    """Content of config.json beside a checkpoint, with the grid of training."""
    return settings_of(replace(opened.config, grid=config.grid))  # `config` may be a part's


@torch.no_grad()
def encode_clips(parts: Parts, video: Tensor) -> Tensor:
    """Token ids (B, t, h, w), int32, of clips (B, 3, T, H, W) in [-1, 1]."""
    return torch.cat([parts.tokenizer.module.encode_tokens(clip) for clip in video.split(1)])


def to_tokenizer(parts: Parts, ids: Tensor) -> Tensor:
    """What the tokenizer decodes, of token ids (B, t, h, w) as `encode_clips` makes them."""
    codes: Tensor = parts.tokenizer.module.to_codes(ids)
    return codes


def make_batch(
    config: ARTransformerConfig, ids: Tensor, text: Tensor | None, fps: Sequence[float]
) -> tuple[Tensor, ...]:
    """Tokens (B, L), int64, and embeddings of prompts where the model reads them."""
    tokens = F.pad(ids.flatten(1).long(), (config.leading_tokens, 0), value=config.begin_token)
    return (tokens,) if config.context_width is None or text is None else (tokens, text)


def _terms(head: nn.Module, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over rows (R, D): of the cross entropy of labels (R,), and of the squared log sum."""
    logits = head(hidden).float()  # float32: in bf16 a loss near 7 has steps of 0.03
    total = logits.logsumexp(-1)
    counted = labels != IGNORED
    chosen = logits.gather(-1, labels.clamp_min(0)[:, None])[:, 0]
    return ((total - chosen) * counted).sum(), total.square().sum()
