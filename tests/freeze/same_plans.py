"""Memory plans of this tree are those of a base commit.

    python tests/freeze/same_plans.py [--base COMMIT]

Compared are all plans of `base_plans.py` (bytes of each stage, and the peak), what fits where, and
the needs of the bundled worlds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from worldline.catalog import ENTRIES
from worldline.family import Compute, Opened, load_family
from worldline.locate import Place, locate
from worldline.memory import Memory, Plan
from worldline.nn.modulation import fused
from worldline.opening import fit_released, open_world, plan
from worldline.text.encoder import TextPart

BASE = "7f4d740"
STAGES = {"visit": "guardrail"}  # name of a stage in the base -> now


def planned(case: dict[str, Any]) -> Plan:
    """The plan of a described request, of files that are not there."""
    family = load_family(case["family"])
    entry = next(entry for entry in ENTRIES if entry.preset == case["preset"] and entry.command)
    parts = family.presets(entry)
    dtype = getattr(torch, case["dtype"])
    if case["text_bytes"]:
        parts["text"] = TextPart(case["text_bytes"] // dtype.itemsize)
    else:
        parts.pop("text", None)
    if case.get("decoder", "") is None:
        del parts["decoder"], parts["decoder_tokenizer"]
    opened = Opened(
        family, entry.name, Place(Path(entry.name), ()), family.options.parse({}), parts=parts
    )
    stated: dict[str, Any] = {"num_video_frames": case.get("num_video_frames")}
    if "video" in case:
        names = ("num_video_frames", "height", "width")
        stated = dict(zip(names, case["video"], strict=True))
    compute = Compute(torch.device("cuda"), dtype, dtype, case["fused"], case.get("batch", 1))
    return plan(opened, [family.request.parse(stated)], compute, case["visitor_bytes"])


def differences(case: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Bytes in the base and now, by stage, where they differ."""
    now = planned(case)
    found = {stage.name: now.need(stage, case["flags"]) for stage in now.stages}
    found["peak"] = now.peak(case["flags"])
    base = {STAGES.get(name, name): nbytes for name, nbytes in case["stages"].items()}
    base["peak"] = case["peak"]
    if not case["text_bytes"]:
        del base["text"]  # of a model without a text encoder: it was planned for, and never runs
    names = {name for name in {*base, *found} if base.get(name, 0) != found.get(name, 0)}
    return {name: (base.get(name, 0), found.get(name, 0)) for name in sorted(names)}


def fits(case: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """How a released model fits, in the base and now, where it differs."""
    entry = next(entry for entry in ENTRIES if entry.name == case["name"])
    cuda = torch.device("cuda")
    compute = Compute(cuda, torch.bfloat16, torch.bfloat16, fused(cuda))
    found = fit_released(entry, compute, Memory(case["free"], case["free"]))
    now = {} if found is None else {**vars(found), "flags": list(found.flags)}
    return {
        name: (case[name], now.get(name))
        for name in ("need", "flags", "fits")
        if case[name] != now.get(name)
    }


def bundled(case: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Need of a bundled world in the base and now, where it differs."""
    opened = open_world(locate(case["name"], ""), {})
    cpu = Compute(torch.device("cpu"), torch.float32, torch.float32, fused=False)
    request = opened.family.request.parse(opened.defaults)
    need = plan(opened, [request], cpu).peak()
    return {} if need == case["need"] else {"need": (case["need"], need)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=BASE, help="Commit to compare with.")
    parser.add_argument("--plans", type=Path, help="What base_plans.py printed of it.")
    arguments = parser.parse_args()
    if arguments.plans:
        text = arguments.plans.read_text()
    else:
        script = str(Path(__file__).with_name("base_plans.py"))
        words = [sys.executable, script, "--base", arguments.base]
        text = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    base, different = json.loads(text), Counter[str]()
    for kind, compare in (("plans", differences), ("fits", fits), ("bundled", bundled)):
        for case in base[kind]:
            if found := compare(case):
                different[kind] += 1
                described = {name: case[name] for name in case if name not in ("stages", "peak")}
                print(f"DIFFERENT  {described}: {found}")
        print(f"{len(base[kind]) - different[kind]} of {len(base[kind])} {kind} are the same")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
