"""The classifier of frames: SigLIP features, three linear layers, seven classes.

Sources: arXiv 2303.15343 (SigLIP, through transformers); the released `safety_filter.pt`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from worldline.documents import read_json
from worldline.errors import CheckpointError, NonFiniteError
from worldline.guardrails.base import Verdict
from worldline.weights.keymap import KeyMap
from worldline.weights.networks import Settings, pretrained

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
    """Condition under which a video is refused."""

    unsafe: frozenset[int]  # numbers of the classes that count
    share: float  # largest allowed one of frames in these classes

    def refuses(self, classes: Sequence[int]) -> bool:
        count = sum(number in self.unsafe for number in classes)
        return count > 0 and count / len(classes) > self.share


_ALL = frozenset(range(1, len(CLASSES)))
_NO_VIOLENCE = _ALL - {CLASSES.index("Violence")}  # Predict2.5 allows that class
PREDICT1 = Rule(_ALL, 0.0)  # Cosmos 1.0 as well
PREDICT2_5 = Rule(_NO_VIOLENCE, 0.10)  # from 2025-10-13 on; before, 0


def frame_classifier() -> nn.Sequential:
    """Features (N, 1152) of length 1 -> logits (N, 7), float32: classes are compared exactly."""
    first = nn.Linear(_FEATURES, 512), nn.BatchNorm1d(512), nn.ReLU()
    second = nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU()
    return nn.Sequential(*first, *second, nn.Linear(256, len(CLASSES)))


def key_map(network: nn.Module) -> KeyMap:
    """Names of `safety_filter.pt`."""
    return KeyMap({f"network.layers.{name}": name for name in network.state_dict()})


class Preprocessing(Settings):
    """Settings of preprocessor_config.json: how frames become input."""

    resample: Image.Resampling
    rescale_factor: float
    image_mean: list[float]
    image_std: list[float]


class FrameFeatures:
    """The image half of SigLIP, from a folder as released."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        from transformers import SiglipVisionModel

        path = folder / "preprocessor_config.json"
        self.preprocessing = Preprocessing.parse(read_json(path), path)
        text_half = ("text_model.*", "logit_scale", "logit_bias")
        network: Any = pretrained(SiglipVisionModel, folder, torch.float32, text_half)
        self.network = network.to(device)

    def pixels(self, frames: np.ndarray) -> Tensor:
        """Frames uint8 (N, H, W, 3) as the network's input (N, 3, h, w), in [-1, 1]."""
        how, size = self.preprocessing, (self.network.config.image_size,) * 2
        small = [np.asarray(Image.fromarray(f).resize(size, how.resample)) for f in frames]
        x = torch.from_numpy(np.stack(small)).to(torch.float32) * how.rescale_factor
        x = (x - torch.tensor(how.image_mean)) / torch.tensor(how.image_std)
        return x.permute(0, 3, 1, 2)

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray) -> Tensor:
        """Features (N, D) of frames uint8 (N, H, W, 3), of length 1."""
        pixels = self.pixels(frames).to(self.network.device)
        return F.normalize(self.network(pixel_values=pixels).pooler_output, dim=-1)


class FrameFilter:
    """The video guardrail: every frame is classified."""

    name = "video_content_safety_filter"

    def __init__(self, features: FrameFeatures, classifier: nn.Sequential, rule: Rule) -> None:
        if (width := features.network.config.hidden_size) != _FEATURES:
            raise CheckpointError(
                f"SigLIP has {width} features, the frame classifier expects {_FEATURES}"
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
                raise NonFiniteError(f"guardrail {self.name}: the logits are not finite")
            classes += logits.argmax(-1).tolist()
        if not self.rule.refuses(classes):
            return Verdict(True)
        unsafe = sorted(self.rule.unsafe.intersection(classes))
        return Verdict(False, tuple(CLASSES[number] for number in unsafe))
