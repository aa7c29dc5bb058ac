"""Frames as the released trainers make them: resized, cropped, in 8 bits; and scaled to [-1, 1].

Sources: nvidia-cosmos/cosmos-predict1 `cosmos_predict1/autoregressive/datasets/dataset_utils.py`
and `cosmos_predict1/diffusion/training/datasets/dataset_video.py`, whose pixels these are, without
torchvision. Axes: T frames, C colours, H/W pixels.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from worldline.shapes import LARGEST_CROP
from worldline.video.read import Frames

# 255 times a 255th of a level is often below it again
_TRUNCATED = torch.arange(256).div(255).mul(255).to(torch.uint8).numpy()


@dataclass(frozen=True)
class Transform:
    """Change of a frame to the size of training.

    Attributes:
        height: pixels.
        width: pixels.
        fit: "crop" keeps the aspect, covers the size and cuts at the centre; "stretch" does not.
        resample: "bicubic" rounds levels, as the released trainer that crops; "bilinear" truncates
            them, as those that stretch. Both are antialiased.
        largest_scale: times by which a frame may be enlarged; the released trainers take any.
    """

    height: int
    width: int
    fit: Literal["crop", "stretch"] = "crop"
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    largest_scale: float = 4.0

    def __call__(self, frame: Frames) -> Tensor:
        """Frame uint8 (3, height, width) of one (H, W, 3)."""
        size = self.resized(*frame.shape[:2])
        # half goes to even, as torchvision rounds
        top, left = round((size[0] - self.height) / 2), round((size[1] - self.width) / 2)
        rows, columns = slice(top, top + self.height), slice(left, left + self.width)
        rounded = self.resample == "bicubic"
        if frame.shape[:2] == size:  # each level is the same function of one
            frame = frame[rows, columns]
            return torch.from_numpy(frame if rounded else _TRUNCATED[frame]).permute(2, 0, 1)
        levels = torch.from_numpy(frame).permute(2, 0, 1)[None].contiguous()
        levels = levels.float()  # kernels of 8 bits give others
        if not rounded:
            levels.div_(255)
        levels = F.interpolate(
            levels, size=size, mode=self.resample, align_corners=False, antialias=True
        )[0, :, rows, columns]
        levels = levels.clamp(0, 255).round_() if rounded else levels.mul(255).clamp_(0, 255)
        return levels.to(torch.uint8)

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a frame before it is cropped."""
        if self.fit == "stretch":
            return self.height, self.width
        scale = max(self.width / width, self.height / height)
        return int(scale * height + 0.5), int(scale * width + 0.5)

    def cropping(self, height: int, width: int) -> dict[str, int]:
        """Numbers of the crop as the released trainer yields them; offsets may be one too low."""
        rows, columns = self.resized(height, width)
        offsets = {
            "crop_x0": (columns - self.width) // 2,
            "crop_y0": (rows - self.height) // 2,
        }
        sizes = {"crop_w": self.width, "crop_h": self.height}
        return {"resize_w": columns, "resize_h": rows, **offsets, **sizes}

    def problem(self, height: int, width: int) -> str:
        """Why frames of a size are too small, or too narrow for the crop; "" if they are not."""
        least, most = sorted((self.width / width, self.height / height))
        if most > self.largest_scale:
            return f"{width} x {height} pixels are too small for {self.width} x {self.height}"
        if self.fit == "crop" and most > LARGEST_CROP * least:
            return f"of {width} x {height} pixels a crop would keep 1/{most / least:.0f}"
        return ""


def to_signed(video: Tensor, dtype: torch.dtype) -> Tensor:
    """Levels uint8 as numbers in [-1, 1], each step rounded to `dtype` as in the reference.

    The released trainer computes them in bfloat16, which it makes torch's default dtype.
    """
    return video.to(dtype).div_(255).sub_(0.5).div_(0.5)
