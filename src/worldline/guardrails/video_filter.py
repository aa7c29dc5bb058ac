"""The classifier of frames: SigLIP features, three linear layers, seven classes.

Sources: arXiv 2303.15343 (SigLIP, through transformers); the classifier's layers are those of the
released `safety_filter.pt`. Everything in float32: a class is decided by a comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from worldline.errors import CheckpointError, Error
from worldline.files import read_json
from worldline.guardrails.base import Verdict
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import fill, pretrained
from worldline.weights.read import open_checkpoint

CLASSES = (
    "Safe",
    "Sexual_Content",
    "Violence",
    "Drugs",
    "Child_Abuse",
    "Hate_and_Harassment",
    "Self-Harm",
)
_WIDTHS = (1152, 512, 256)
_FRAMES_AT_ONCE = 16  # 16 frames of SigLIP so400m in float32 take about 2 GB

_SIZED = ("network.layers.0.weight", "network.layers.3.weight")  # tell the widths
_LEAVES = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
KEYS = KeyMap(
    rename={
        **{
            f"network.layers.{i}.{leaf}": f"layers.{i}.{leaf}"
            for i in (0, 3, 6)
            for leaf in _LEAVES
        },
        **{
            f"network.layers.{i}.{leaf}": f"layers.{i}.{leaf}"
            for i in (1, 4)
            for leaf in (*_LEAVES, *_STATISTICS)
        },
    }
)


@dataclass(frozen=True)
class Rule:
    """When a video is refused.

    Attributes:
        unsafe: numbers of the classes that count.
        share: of frames that must be of such a class; more than this refuses.
    """

    unsafe: frozenset[int]
    share: float

    def refuses(self, classes: list[int]) -> bool:
        count = sum(number in self.unsafe for number in classes)
        return count > 0 and count / len(classes) > self.share


_ALL = frozenset(range(1, len(CLASSES)))
_NO_VIOLENCE = _ALL - {CLASSES.index("Violence")}  # Predict2.5 lets that class pass
PREDICT1 = Rule(_ALL, 0.0)  # Cosmos 1.0 as well
PREDICT2_5_FIRST = Rule(_NO_VIOLENCE, 0.0)  # of 2025-10-06
PREDICT2_5 = Rule(_NO_VIOLENCE, 0.10)  # from 2025-10-13 on


class FrameClassifier(nn.Module):
    """Features (N, 1152) of length 1 -> scores (N, 7), all float32."""

    def __init__(self, widths: tuple[int, int, int] = _WIDTHS) -> None:
        super().__init__()
        self.width = widths[0]
        first, second, third = widths
        self.layers = nn.Sequential(
            nn.Linear(first, second),
            nn.BatchNorm1d(second),
            nn.ReLU(),
            nn.Linear(second, third),
            nn.BatchNorm1d(third),
            nn.ReLU(),
            nn.Linear(third, len(CLASSES)),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


def load_classifier(path: Path, device: torch.device | str = "cpu") -> FrameClassifier:
    """Read `safety_filter.pt`.

    Raises:
        CheckpointError: it is absent, damaged or of another network.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    stored = open_checkpoint(path).tensors
    shapes = [stored[name].shape for name in _SIZED if name in stored]
    with torch.device("meta"):
        if [len(shape) for shape in shapes] == [2, 2]:
            network = FrameClassifier((shapes[0][1], shapes[0][0], shapes[1][0]))
        else:
            network = FrameClassifier()  # what does not fit is then named
    fill(network, path, KEYS, device)
    return network


class FrameFeatures:
    """The image half of SigLIP."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        """Load from a folder as released.

        Raises:
            CheckpointError: a file is absent or does not fit.
        """
        from transformers import SiglipVisionModel

        settings = read_json(folder / "preprocessor_config.json")
        try:
            self.size = int(settings["size"]["width"]), int(settings["size"]["height"])
            self.scale = float(settings["rescale_factor"])
            self.mean, self.std = (
                torch.tensor([float(x) for x in settings[name]]).view(3, 1, 1)
                for name in ("image_mean", "image_std")
            )
            self.resample = Image.Resampling(settings["resample"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{folder}/preprocessor_config.json: {error!r}") from error
        text = ("text_model.*", "logit_scale", "logit_bias")  # the other half
        self.network = pretrained(SiglipVisionModel, folder, torch.float32, text).to(device)

    def pixels(self, frames: np.ndarray) -> Tensor:
        """Return what the network sees of frames uint8 (N, H, W, 3): (N, 3, h, w), in [-1, 1]."""
        small = [np.asarray(Image.fromarray(f).resize(self.size, self.resample)) for f in frames]
        x = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).to(torch.float32)
        return (x * self.scale - self.mean) / self.std

    @torch.inference_mode()
    def pooled(self, pixels: Tensor) -> Tensor:
        """Return the vector of each image, (N, D), of any length."""
        device = next(self.network.parameters()).device
        return self.network(pixel_values=pixels.to(device)).pooler_output

    def __call__(self, frames: np.ndarray) -> Tensor:
        """Return the feature of each frame, (N, D), of length 1."""
        return F.normalize(self.pooled(self.pixels(frames)), dim=-1)


class VideoFilter:
    """The video guard: every frame is classified."""

    name = "video_content_safety_filter"

    def __init__(self, features: FrameFeatures, classifier: FrameClassifier, rule: Rule) -> None:
        self.features = features
        self.classifier = classifier
        self.rule = rule
        self.networks = (features.network, classifier)

    @classmethod
    def load(
        cls, classifier: Path, siglip: Path, rule: Rule, device: torch.device | str = "cpu"
    ) -> VideoFilter:
        """Load both networks.

        Args:
            classifier: safety_filter.pt.
            siglip: folder of google/siglip-so400m-patch14-384.
            rule: when a video is refused.
            device: where both run.

        Raises:
            CheckpointError: a file is absent or does not fit, or the two do not fit together.
        """
        network = load_classifier(classifier, device)
        features = FrameFeatures(siglip, device)
        width = features.network.config.hidden_size
        if width != network.width:
            raise CheckpointError(
                f"{siglip} gives features of {width} numbers, and {classifier} wants "
                f"{network.width}"
            )
        return cls(features, network, rule)

    def check(self, frames: np.ndarray) -> Verdict:
        classes = [number for part in self._parts(frames) for number in part]
        if not self.rule.refuses(classes):
            return Verdict(True)
        found = sorted(self.rule.unsafe.intersection(classes))
        return Verdict(False, "", tuple(CLASSES[number] for number in found))

    @torch.inference_mode()
    def _parts(self, frames: np.ndarray) -> Iterator[list[int]]:
        for start in range(0, len(frames), _FRAMES_AT_ONCE):
            scores = self.classifier(self.features(frames[start : start + _FRAMES_AT_ONCE]))
            if not scores.isfinite().all():
                raise Error(f"guardrail {self.name} gave scores that are no numbers")
            yield scores.argmax(-1).tolist()
