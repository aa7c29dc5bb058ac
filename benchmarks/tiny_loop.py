"""A tiny recipe in this tree and in that of an earlier commit, in turn: losses, weights, speed.

    git worktree add /tmp/base 2ca1cd5
    python benchmarks/tiny_loop.py --base /tmp/base/src --recipe flow --steps 1000 \
        --words "--tokenizer src/worldline/bundled/Cosmos-Predict2.5-2B/vae --compile --graph"

2ca1cd5 is the last commit whose loop served the tiny worlds alone. Each round runs
`python -m tiny RECIPE` in each tree from the same seed. Steps a second are those between two lines
of a log, which leaves out what comes before the first; the best of all lines is compared, since
other work on the machine makes single ones slower. On a CPU seconds of the processor are compared,
too: those of a run less those of one of a fifth of its steps, the least of all rounds. On a GPU
runs of one tree differ, too, by the order of sums: `spread` is by how much.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from two_trees import common_arguments, write_report

from worldline.report import environment
from worldline.weights.checkpoint import open_checkpoint


def run(tree: Path, arguments: argparse.Namespace, steps: int, folder: Path) -> dict[str, Any]:
    """Losses and steps a second by step, the processor's seconds, the files of a recipe."""
    words = [*arguments.words.split(), "--steps", str(steps), "--folder", str(folder)]
    command = [sys.executable, "-m", "tiny", arguments.recipe, *words]
    paths = f"{tree}/src:{tree}:{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "PYTHONPATH": paths}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} in {tree}:\n{done.stderr[-4000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    ends = [(line["step"], line["step"] / line["steps_per_second"]) for line in lines]
    return {
        "losses": {line["step"]: line["loss"] for line in lines},
        "cpu_seconds": after.ru_utime - before.ru_utime,
        "steps_per_second": [
            round((step - before) / (end - began), 4)
            for (before, began), (step, end) in pairwise(ends)
            if step > before
        ],
        "files": {
            str(path.relative_to(folder)): path
            for path in sorted((folder / "export").rglob("*.safetensors"))
        },
    }


def distance(first: dict[str, Any], second: dict[str, Any]) -> dict[str, float]:
    """Largest difference of two runs' losses, relative, and of their weights, over the largest."""
    losses = [
        abs(loss - second["losses"][step]) / abs(loss) for step, loss in first["losses"].items()
    ]
    weights = [0.0]
    for name, path in first["files"].items():
        one, other = open_checkpoint(path), open_checkpoint(second["files"][name])
        for tensor in one.tensors:
            x, y = one.read(tensor).float(), other.read(tensor).float()
            weights.append(float((x - y).abs().max() / x.abs().max().clamp(min=1e-12)))
    return {"losses": max(losses), "weights": max(weights)}


def main() -> None:
    parser = common_arguments(__doc__)
    parser.add_argument("--recipe", default="flow")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--words", default="", help="Further options of the recipe.")
    arguments = parser.parse_args()
    trees = {"base": Path(arguments.base).parent, "head": Path(arguments.head).parent}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cpu: dict[str, list[float]] = {name: [] for name in trees}
    steps = arguments.steps
    with tempfile.TemporaryDirectory() as temporary:
        for number in range(arguments.rounds):
            for name, tree in trees.items():
                folder = Path(temporary) / f"{name}{number}"
                runs[name].append(run(tree.resolve(), arguments, steps, folder))
                speeds = runs[name][-1]["steps_per_second"]
                if device.type == "cpu":
                    few = run(tree.resolve(), arguments, steps // 5, folder / "few")
                    spent = runs[name][-1]["cpu_seconds"] - few["cpu_seconds"]
                    cpu[name].append(round(spent / (steps - steps // 5), 5))
                print(name, speeds, cpu[name][-1:], file=sys.stderr, flush=True)
        base, head = runs["base"], runs["head"]
        found = {
            "between trees": distance(base[0], head[0]),
            "spread": distance(base[0], base[-1]) if len(base) > 1 else None,
        }
    best = {
        name: max(speed for one in each for speed in one["steps_per_second"])
        for name, each in runs.items()
    }
    write_report(
        {
            "recipe": arguments.recipe,
            "words": arguments.words,
            "steps": arguments.steps,
            "commit": arguments.commit,
            **environment(device),
            "largest relative difference": found,
            "best steps a second": best,
            "head over base": round(best["head"] / best["base"], 4),
            "cpu seconds a step": cpu,
            "head over base, cpu seconds": round(min(cpu["head"]) / min(cpu["base"]), 4)
            if cpu["head"]
            else None,
            "losses": {name: each[0]["losses"] for name, each in runs.items()},
            "steps a second": {
                name: [one["steps_per_second"] for one in each] for name, each in runs.items()
            },
        },
        arguments.output,
    )


if __name__ == "__main__":
    main()
