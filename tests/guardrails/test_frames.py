"""The frame classifier: strict files, rules as shares of frames, nothing undecided is safe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from worldline.errors import CheckpointError, Error
from worldline.guardrails.frames import (
    CLASSES,
    PREDICT1,
    PREDICT2_5,
    FrameFeatures,
    FrameFilter,
    Rule,
    frame_classifier,
    key_map,
)
from worldline.weights.checkpoint import open_checkpoint, save
from worldline.weights.networks import read_network

from .networks import write_classifier, write_siglip

FRAMES = np.random.RandomState(0).randint(0, 256, (20, 12, 16, 3), np.uint8)
MANIFEST = Path(__file__).parents[1] / "keys" / "Cosmos-Guardrail1.video_content_safety_filter.json"


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_siglip(tmp_path_factory.mktemp("siglip"))


FIRST = Rule(PREDICT2_5.unsafe, 0.0)  # of Predict2.5, until 2025-10-13


def load(classifier: Path, siglip: Path, rule: Rule = PREDICT1) -> FrameFilter:
    network = read_network(frame_classifier, classifier, key_map)
    return FrameFilter(FrameFeatures(siglip), network, rule)


def test_released_keys() -> None:
    released = json.loads(MANIFEST.read_text())["tensors"]
    network = frame_classifier()
    keys = key_map(network)
    ours = {keys.released(n): list(t.shape) for n, t in network.state_dict().items()}
    assert ours == {name: shape for name, (_, shape) in released.items()}


@pytest.mark.parametrize("answer", range(len(CLASSES)))
def test_every_class(answer: int, siglip: Path, tmp_path: Path) -> None:
    classifier = write_classifier(tmp_path / "safety_filter.pt", answer)
    guard = load(classifier, siglip)
    verdict = guard.check(FRAMES)
    assert verdict.safe == (answer == 0)
    assert verdict.reasons == ((CLASSES[answer],) if answer else ())


def test_shares() -> None:
    """Predict2.5 lets violence pass, and a tenth of the frames."""
    for total, most in ((121, 12), (10, 1), (30, 3)):
        for count in (most, most + 1):
            classes = [4] * count + [0] * (total - count)
            assert PREDICT2_5.refuses(classes) == (count > most)
            assert FIRST.refuses(classes)
            assert PREDICT1.refuses(classes)
    assert PREDICT1.refuses([0, 2])
    assert not FIRST.refuses([2, 2])
    assert not PREDICT2_5.refuses([2, 2])
    assert not any(rule.refuses([]) for rule in (PREDICT1, PREDICT2_5, FIRST))


def test_logits_that_are_not_finite(siglip: Path, tmp_path: Path) -> None:
    guard = load(write_classifier(tmp_path / "f.pt"), siglip)
    with torch.no_grad():
        guard.classifier[6].bias[3] = torch.nan
    with pytest.raises(Error, match="not finite"):
        guard.check(FRAMES)


def test_other_files(siglip: Path, tmp_path: Path) -> None:
    classifier = write_classifier(tmp_path / "safety_filter.pt")
    with pytest.raises(CheckpointError, match=r"absent\.pt is missing"):
        read_network(frame_classifier, tmp_path / "absent.pt", key_map)
    with pytest.raises(CheckpointError, match="16 features"):
        load(classifier, write_siglip(tmp_path / "narrow", 16))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        load(classifier, tmp_path / "none")
    (siglip / "preprocessor_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="resample"):
        load(classifier, siglip)


def test_classifier_is_strict(tmp_path: Path) -> None:
    path = write_classifier(tmp_path / "safety_filter.pt")
    state = torch.load(path, weights_only=True)["model"]
    counted = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    torch.save({"model": counted}, path)
    read_network(frame_classifier, path, key_map)  # files of old torch lack the counts
    del counted["network.layers.3.bias"]
    torch.save({"model": counted}, path)
    with pytest.raises(CheckpointError, match=r"network\.layers\.3\.bias"):
        read_network(frame_classifier, path, key_map)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    folder = write_siglip(tmp_path)
    file = next(folder.rglob("*.safetensors"))
    source = open_checkpoint(file)
    tensors = {name: source.read(name) for name in source.entries}
    [name] = [n for n in tensors if "vision" in n and n.endswith("layers.0.mlp.fc1.weight")]
    tensors[name][0, 3] = torch.inf
    save(tensors, file)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.fc1\.weight holds Inf"):
        FrameFeatures(folder)
