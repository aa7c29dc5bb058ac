"""How long guardrails take: the blocklist on one core, a clip on one device.

    python benchmarks/guardrails.py --output benchmarks/results/guardrails.json [--device cuda]

Lists of made-up words of about the released lengths, prompts of 40 words that nothing refuses (the
slowest kind), SigLIP so400m, the frame classifier and RetinaFace at full size with random weights.
Without --device the blocklist alone is measured.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldline.files import GIGABYTE
from worldline.guardrails.blocklist import COSMOS1, PREDICT, Blocklist
from worldline.guardrails.faces import FaceBlur, RetinaFace
from worldline.guardrails.frames import PREDICT1, FrameFeatures, FrameFilter, frame_classifier
from worldline.report import environment

FRAMES, HEIGHT, WIDTH = 33, 640, 1024
PROMPTS, WORDS = 2000, 40
SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


def write(folder: Path, tables: dict[str, Iterable[str]]) -> None:
    for name, lines in tables.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))


def blocklist(rng: random.Random, folder: Path) -> dict[str, Any]:
    """Prompts a second of processor time."""
    letters = "aeiourtnslbcdfghmpvwz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 10))) for _ in range(20_000)]
    listed, free = words[:2200], sorted(set(words[2200:]) - set(words[:2200]))
    custom = [*listed[:800], *(f"{a} {b}" for a, b in zip(listed, listed[800:1600], strict=False))]
    english, wordnet = "nltk_data/tokenizers/punkt_tab/english", "nltk_data/corpora/wordnet"
    tables = {
        "custom/words": custom,
        "whitelist/words": free[:50],
        "exact_match/words": listed[1600:],
        f"{english}/abbrev_types.txt": ("dr", "e.g"),
        f"{english}/collocations.tab": (),
        f"{english}/sent_starters.txt": ("however",),
        f"{english}/ortho_context.tab": (),
        f"{wordnet}/index.noun": free[::2],
        f"{wordnet}/noun.exc": (),
    }
    write(folder, tables)
    found: dict[str, Any] = {"entries": len(custom) + 600, "words": WORDS}
    for name, near in (("predict", PREDICT), ("cosmos1", COSMOS1)):
        guard = Blocklist(folder, near)
        prompts: list[str] = []
        while len(prompts) < PROMPTS:
            parts = [" ".join(rng.choices(free, k=WORDS // 2)) for _ in range(2)]
            prompt = f"{parts[0].capitalize()}, isn't it? {parts[1].capitalize()}."
            if guard.check(prompt).safe:
                prompts.append(prompt)
        rounds = []
        for _ in range(5):
            started = time.process_time()
            for prompt in prompts:
                guard.check(prompt)
            rounds.append(time.process_time() - started)
        found[f"{name}_prompts_per_second"] = round(PROMPTS / statistics.median(rounds))
    return found


def clip(device: torch.device) -> dict[str, Any]:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    frames = np.random.RandomState(0).randint(0, 256, (FRAMES, HEIGHT, WIDTH, 3), np.uint8)
    settings = {"size": {"width": 384, "height": 384}, "resample": 3, "rescale_factor": 1 / 255}
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    with tempfile.TemporaryDirectory() as name:
        SiglipVisionModel(SiglipVisionConfig(**SIGLIP)).save_pretrained(name)
        (Path(name) / "preprocessor_config.json").write_text(json.dumps(settings))
        features = FrameFeatures(Path(name), device)
    guard = FrameFilter(features, frame_classifier().eval().to(device), PREDICT1)
    faces = FaceBlur(RetinaFace().eval().to(device))
    measured = {"classifier": guard.check, "face_blur": faces.apply}
    return {name: seconds(work, frames, device) for name, work in measured.items()}


def seconds(
    work: Callable[[np.ndarray], object], frames: np.ndarray, device: torch.device
) -> dict[str, float]:
    cuda = device.type == "cuda"
    work(frames)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    rounds = []
    for _ in range(3):
        started = time.perf_counter()
        work(frames)  # ends with numbers on the host, so the device has finished
        rounds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_reserved() / GIGABYTE if cuda else 0.0
    return {"seconds": round(statistics.median(rounds), 3), "peak_gb": round(peak, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="")
    parser.add_argument("--commit", default="")
    arguments = parser.parse_args()
    device = torch.device(arguments.device or "cpu")
    torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())
    with tempfile.TemporaryDirectory() as name:
        result: dict[str, Any] = {
            "commit": arguments.commit,
            "environment": environment(device),
            "blocklist_one_core": blocklist(random.Random(0), Path(name)),
        }
    if arguments.device:
        result["clip"] = {"frames": [FRAMES, HEIGHT, WIDTH], **clip(device)}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
