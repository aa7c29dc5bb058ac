"""Sizes of videos and of latent grids, and the rules that tie them; needs no torch.

A causal video tokenizer with temporal compression `c` turns 1 + c*k frames into 1 + k latent
frames: latent 0 holds frame 0 alone, latent k >= 1 holds frames c*k - c + 1 .. c*k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from worldline.errors import InputError

# how a picture of another aspect fills a size: distorted, without its edges, or between black bars
Fit = Literal["stretch", "crop", "pad"]
LARGEST_CROP = 16  # times what is kept; far beyond, enlarging would fill the memory


@dataclass(frozen=True)
class LatentShape:
    """A grid of latent cells.

    Attributes:
        frames: latent frames, T.
        height: rows, H.
        width: columns, W.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise ValueError(f"a latent grid needs at least one cell on each axis, got {self}")

    @property
    def tokens_per_frame(self) -> int:
        return self.height * self.width

    @property
    def tokens(self) -> int:
        return self.frames * self.tokens_per_frame

    def video(self, temporal: int, spatial: int) -> VideoShape:
        """Video that decodes from this grid; arguments are the factors of compression."""
        return VideoShape(
            1 + (self.frames - 1) * temporal, self.height * spatial, self.width * spatial
        )


@dataclass(frozen=True)
class VideoShape:
    """A block of pixels: frames, rows, columns."""

    frames: int
    height: int
    width: int

    def latent(self, temporal: int, spatial: int) -> LatentShape:
        """Latent grid of this video; arguments are the factors of compression.

        Raises:
            InputError: the frame count is not 1 + temporal*k, or a side is no multiple of spatial.
        """
        if (self.frames - 1) % temporal:
            raise InputError(
                f"{self.frames} frames: a clip must have 1 + {temporal}k frames "
                f"(nearest: {nearest_frames(self.frames, temporal)})"
            )
        if self.height % spatial or self.width % spatial:
            raise InputError(
                f"{self.height} x {self.width} pixels: both sides must be multiples of {spatial}"
            )
        return LatentShape(
            1 + (self.frames - 1) // temporal, self.height // spatial, self.width // spatial
        )


def nearest_frames(frames: int, temporal: int) -> int:
    """Frame count 1 + temporal*k that is closest to `frames`."""
    return 1 + temporal * max(0, round((frames - 1) / temporal))


def latent_frames_of(frames: int, temporal: int) -> int:
    """Number of latent frames that the first `frames` frames fill completely."""
    return 0 if frames < 1 else 1 + (frames - 1) // temporal
