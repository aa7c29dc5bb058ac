"""Memory plans of a base commit, as JSON on standard output, for comparison with this tree.

    python tests/freeze/base_plans.py [--base COMMIT] > plans.json

`plans` has the bytes of each stage, whose largest is the peak, for configurations named by family
and preset. `fits` has the fewest offload flags of each released checkpoint on GPUs of several
sizes, and `bundled` the need of each bundled world on a CPU. Both depend on whether Triton is
installed, so compare with figures from the same environment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain, combinations, product
from pathlib import Path
from typing import Any

from same_frames import BASE, worktree

DTYPES = ("bfloat16", "float32")
T5 = 4_864_791_552  # weights of the released text encoders
REASON1 = 7_070_619_136
GIGABYTES = (12, 24, 32, 48, 80, 141)
# frames, height, width
DIFFUSION_SIZES = ((121, 704, 1280), (57, 704, 1280), (9, 480, 832), (241, 1024, 1024))
FLOW_SIZES = ((93, 704, 1280), (9, 704, 1280), (77, 480, 832), (189, 1024, 1024))
STEP = 9  # of all combinations, how far apart those are that are taken; coprime with their numbers


def subsets(flags: Sequence[str]) -> list[tuple[str, ...]]:
    return list(chain.from_iterable(combinations(flags, n) for n in range(len(flags) + 1)))


def text_bytes(parameters: int, dtype: str) -> int:
    return parameters * (4 if dtype == "float32" else 2)


def measured(description: dict[str, Any], plan: Any) -> dict[str, Any]:
    return {**description, "stages": asdict(plan), "peak": plan.peak}


def denoising_plans() -> Iterator[dict[str, Any]]:
    """Plans of diffusion and Predict2.5."""
    import torch
    from worldline.choices import DIFFUSION_OFFLOAD_FLAGS, FLOW_OFFLOAD_FLAGS
    from worldline.loading import plan_diffusion, plan_predict2_5
    from worldline.models.predict1_dit.model import PRESETS as DIFFUSION
    from worldline.models.predict2_5_dit.model import PRESETS as FLOW

    from worldline.shapes import VideoShape
    from worldline.tokenizers.cosmos.model import PRESETS as COSMOS
    from worldline.tokenizers.wan.model import WanTokenizerConfig

    worlds = [name for name, config in DIFFUSION.items() if not config.vocabulary]
    cases: list[tuple[Any, ...]] = [
        ("diffusion", *case)
        for case in product(worlds, DIFFUSION_SIZES, subsets(DIFFUSION_OFFLOAD_FLAGS))
    ]
    cases += [
        ("predict2.5", *case) for case in product(FLOW, FLOW_SIZES, subsets(FLOW_OFFLOAD_FLAGS))
    ]
    settings = [(*case, *way) for case in cases for way in product(DTYPES, *[(True, False)] * 3)]
    for family, preset, video, flags, dtype, fused, prompts, guarded in settings[::STEP]:
        of_flow = family == "predict2.5"
        options: dict[str, Any] = {
            "text_bytes": text_bytes(REASON1 if of_flow else T5, dtype) if prompts else 0,
            "fused": fused,
            "visitor_bytes": 30_000_000_000 if guarded else 0,
        }
        plan = (plan_predict2_5 if of_flow else plan_diffusion)(
            (FLOW if of_flow else DIFFUSION)[preset],
            WanTokenizerConfig() if of_flow else COSMOS["CV8x8x8"],
            video=VideoShape(*video),
            dtype=getattr(torch, dtype),
            **dict.fromkeys(flags, True),
            **options,
        )
        description = {
            "family": family,
            "preset": preset,
            "tokenizer": "Wan2.1" if of_flow else "CV8x8x8",
            "video": video,
            "dtype": dtype,
            "flags": flags,
        }
        yield measured({**description, **options}, plan)


def autoregressive_plans() -> Iterator[dict[str, Any]]:
    import torch
    from worldline.choices import AUTOREGRESSIVE_OFFLOAD_FLAGS
    from worldline.loading import plan_autoregressive, plan_decoder, window_grid
    from worldline.models.predict1_ar.model import PRESETS
    from worldline.models.predict1_dit.model import PRESETS as DIFFUSION

    from worldline.tokenizers.cosmos.model import PRESETS as COSMOS

    discrete, continuous = COSMOS["DV8x16x16"], COSMOS["CV8x8x8"]
    settings = product(
        PRESETS,
        subsets(AUTOREGRESSIVE_OFFLOAD_FLAGS),
        DTYPES,
        (True, False),  # diffusion decoder
        (True, False),  # its kernels
        (True, False),  # prompts are encoded
        ((1, None), (8, None), (1, 97), (3, 257)),
    )
    for preset, flags, dtype, decodes, fused, prompts, (batch, frames) in [*settings][::STEP]:
        config, kind = PRESETS[preset], getattr(torch, dtype)
        decoder = None
        if decodes:
            grid = window_grid(config, discrete, continuous)
            decoder = plan_decoder(
                DIFFUSION["7B-Decoder"], continuous, grid, dtype=kind, fused=fused
            )
        encodes = prompts and config.context_width is not None
        options: dict[str, Any] = {
            "text_bytes": text_bytes(T5, dtype) if encodes else 0,
            "batch": batch,
            "num_video_frames": frames,
            "visitor_bytes": 20_000_000_000 if batch == 3 else 0,
        }
        plan = plan_autoregressive(
            config, discrete, dtype=kind, decoder=decoder, **dict.fromkeys(flags, True), **options
        )
        description = {
            "family": "autoregressive",
            "preset": preset,
            "tokenizer": "DV8x16x16",
            "decoder": "7B-Decoder" if decodes else None,
            "decoder_tokenizer": "CV8x8x8" if decodes else None,
            "fused": fused,
            "dtype": dtype,
            "flags": flags,
        }
        yield measured({**description, **options}, plan)


def fits() -> Iterator[dict[str, Any]]:
    import torch
    from worldline.loading import fit_entry
    from worldline.machine import Memory

    from worldline.catalog import ENTRIES

    for entry, gigabytes in product(ENTRIES, GIGABYTES):
        nbytes = gigabytes * 10**9
        found = fit_entry(entry, torch.device("cuda"), Memory(free=nbytes, total=nbytes))
        if found is not None:
            yield {"name": entry.name, "free": nbytes, **asdict(found)}


def bundled() -> Iterator[dict[str, Any]]:
    import torch
    from worldline.loading import find_world, fit_files
    from worldline.places import bundled_names, has_decoder

    for name in bundled_names():
        files = find_world(name, "checkpoints", diffusion_decoder=has_decoder(name))
        yield {"name": name, "need": fit_files(files, torch.device("cpu"), None).need}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=BASE, help="Commit whose plans are printed.")
    parser.add_argument("--current", action="store_true", help="Use the worldline on the path.")
    arguments = parser.parse_args()
    if arguments.current:
        plans = [*denoising_plans(), *autoregressive_plans()]
        found = {"plans": plans, "fits": [*fits()], "bundled": [*bundled()]}
        json.dump(found, sys.stdout, indent=0)
        return
    with (
        tempfile.TemporaryDirectory() as temporary,
        worktree(arguments.base, Path(temporary) / "tree") as tree,
    ):
        words = [sys.executable, __file__, "--current"]
        subprocess.run(words, env=os.environ | {"PYTHONPATH": str(tree / "src")}, check=True)


if __name__ == "__main__":
    main()
