"""The classifier of frames: SigLIP features, three linear layers, seven classes.

Sources: arXiv 2303.15343 (SigLIP, through transformers); the released `safety_filter.pt`.
"""

from __future__ import annotations

from collections.abc import Sequence
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

CLASSES = (
    "Safe",
    "Sexual_Content",
    "Violence",
    "Drugs",
    "Child_Abuse",
    "Hate_and_Harassment",
    "Self-Harm",
)
_FEATURES = 1152
_BATCH = 16  # frames; SigLIP so400m takes about 2 GB for them in float32


@dataclass(frozen=True)
class Rule:
    """Condition under which a video is refused.

    Attributes:
        unsafe: numbers of the classes that count.
        share: largest allowed share of frames in these classes, in [0, 1].
    """

    unsafe: frozenset[int]
    share: float

    def refuses(self, classes: Sequence[int]) -> bool:
        count = sum(number in self.unsafe for number in classes)
        return count > 0 and count / len(classes) > self.share


_ALL = frozenset(range(1, len(CLASSES)))
_NO_VIOLENCE = _ALL - {CLASSES.index("Violence")}  # Predict2.5 allows that class
PREDICT1 = Rule(_ALL, 0.0)  # Cosmos 1.0 as well
PREDICT2_5 = Rule(_NO_VIOLENCE, 0.10)  # from 2025-10-13 on; before, 0


class FrameClassifier(nn.Module):
    """Features (N, 1152) of length 1 -> logits (N, 7), float32: classes are compared exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(_FEATURES, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(),
            nn.Linear(512, 256),
            nn.BatchNorm1d(256),
            nn.ReLU(),
            nn.Linear(256, len(CLASSES)),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


KEYS = KeyMap({f"network.{name}": name for name in FrameClassifier().state_dict()})


def load_classifier(path: Path, device: torch.device | str = "cpu") -> FrameClassifier:
    """Frame classifier of `safety_filter.pt`."""
    with torch.device("meta"):
        network = FrameClassifier()
    fill(network, path, KEYS, device)
    return network


class FrameFeatures:
    """The image half of SigLIP, from a folder as released."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
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
        text_half = ("text_model.*", "logit_scale", "logit_bias")
        network = pretrained(SiglipVisionModel, folder, torch.float32, text_half)
        self.network: nn.Module = network.to(device)
        self.width: int = network.config.hidden_size

    def pixels(self, frames: np.ndarray) -> Tensor:
        """Frames uint8 (N, H, W, 3) as the network's input (N, 3, h, w), in [-1, 1]."""
        small = [np.asarray(Image.fromarray(f).resize(self.size, self.resample)) for f in frames]
        x = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2).to(torch.float32)
        return (x * self.scale - self.mean) / self.std

    @torch.inference_mode()
    def pooled(self, pixels: Tensor) -> Tensor:
        """Features (N, D) of `pixels`, of any length."""
        device = next(self.network.parameters()).device
        return self.network(pixel_values=pixels.to(device)).pooler_output

    def __call__(self, frames: np.ndarray) -> Tensor:
        """Features (N, D) of frames uint8 (N, H, W, 3), of length 1."""
        return F.normalize(self.pooled(self.pixels(frames)), dim=-1)


class FrameFilter:
    """The video guardrail: every frame is classified."""

    name = "video_content_safety_filter"

    def __init__(self, features: FrameFeatures, classifier: FrameClassifier, rule: Rule) -> None:
        if features.width != _FEATURES:
            raise CheckpointError(
                f"SigLIP has {features.width} features, the frame classifier expects {_FEATURES}"
            )
        self.features = features
        self.classifier = classifier
        self.rule = rule
        self.networks = (features.network, classifier)

    @torch.inference_mode()
    def check(self, frames: np.ndarray) -> Verdict:
        classes: list[int] = []
        for start in range(0, len(frames), _BATCH):
            logits = self.classifier(self.features(frames[start : start + _BATCH]))
            if not logits.isfinite().all():
                raise Error(f"guardrail {self.name}: the logits are not finite")
            classes += logits.argmax(-1).tolist()
        if not self.rule.refuses(classes):
            return Verdict(True)
        unsafe = sorted(self.rule.unsafe.intersection(classes))
        return Verdict(False, "", tuple(CLASSES[number] for number in unsafe))
