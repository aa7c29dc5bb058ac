"""Time the reading of the 4B transformer's file from the page cache, in two trees in turn.

    git worktree add /tmp/base 01edd32
    PYTHONPATH=src:. python benchmarks/loading.py --base /tmp/base/src

The file has the released layout, names and size, with random weights. Each sample is a fresh
process that opens the model and reads it onto the GPU, once to warm up and then `--repeats` times.
`--size tiny` tries the script on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from two_trees import common_arguments, run_in, write_report


def write(folder: Path, tiny: bool) -> None:
    """Write the transformer in both released containers."""
    import full_size

    from worldline.families.autoregressive.model import PRESETS, ARTransformer
    from worldline.families.autoregressive.weights import KEYS, settings_of

    config = PRESETS["4B"]
    if tiny:
        config = replace(config, depth=4, width=128, num_heads=8, num_kv_heads=2, head_size=16)
        config = replace(config, hidden=256, vocabulary=640, embedding_rows=640)
    full_size.write_network(folder, ARTransformer, config, KEYS)
    (folder / "config.json").write_text(json.dumps(settings_of(config)))


def read(folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds of opening and reading, and a hash of the weights' sums."""
    from worldline.family import Compute
    from worldline.locate import Place
    from worldline.opening import recognise

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16
    opening, reading = [], []
    for _ in range(repeats + 1):
        gc.collect()
        started = time.perf_counter()
        opened = recognise(Place(folder, ()))
        opened = replace(opened, options=opened.family.options.parse({}))
        part = next(part for part in opened.family.parts if part.name == "transformer")
        network = part.open(opened)
        middle = time.perf_counter()
        held = network.load(Compute(device, dtype, dtype, None), offload=False)
        if device.type == "cuda":
            torch.cuda.synchronize()
        opening.append(middle - started)
        reading.append(time.perf_counter() - middle)
        weights = dict(held.module.named_parameters())
        digest = hashlib.sha256()
        for name in sorted(weights):
            digest.update(repr(float(weights[name].double().sum())).encode())
        del held, weights, network
    nbytes = (folder / "model.pt").stat().st_size
    return {
        "open": opening[1:],
        "read": reading[1:],
        "digest": digest.hexdigest()[:16],
        "nbytes": nbytes,
    }


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(read(arguments.read, arguments.repeats)))
        return
    samples: dict[str, list[dict[str, Any]]] = {"base": [], "head": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "Cosmos-Predict1-4B"
        write(folder, arguments.size == "tiny")
        for round_ in range(arguments.rounds):
            # each tree is first as often as it is last
            for tree in ("base", "head") if round_ % 2 == 0 else ("head", "base"):
                words = (__file__, "--read", folder, "--repeats", arguments.repeats)
                samples[tree].append(run_in(getattr(arguments, tree), *words))
    cuda = torch.cuda.is_available()
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
        "commit": arguments.commit,
        "nbytes": samples["head"][0]["nbytes"],
        "equal": len({each["digest"] for tree in samples.values() for each in tree}) == 1,
    }
    for part in ("open", "read"):
        times = {
            tree: sorted(t for each in found for t in each[part]) for tree, found in samples.items()
        }
        base, head = (statistics.median(times[tree]) for tree in ("base", "head"))
        report[part] = {
            "base_seconds": round(base, 4),
            "seconds": round(head, 4),
            "ratio": round(head / base, 4),
            "fastest": {tree: round(found[0], 4) for tree, found in times.items()},
        }
    totals = [report["open"][key] + report["read"][key] for key in ("seconds", "base_seconds")]
    report["ratio"] = round(totals[0] / totals[1], 4)
    write_report(report, arguments.output)


if __name__ == "__main__":
    main()
