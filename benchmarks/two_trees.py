"""One script in this tree and in that of an earlier commit: arguments, fresh processes, report."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def common_arguments(description: str | None) -> argparse.ArgumentParser:
    """Arguments that such scripts have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--base", help="src of the earlier tree")
    parser.add_argument("--head", default=str(Path(__file__).parents[1] / "src"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", default="")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", choices=["full", "tiny"], default="full")
    return parser


def run_in(source: str, *words: object) -> dict[str, Any]:
    """Last line, which is JSON, of a script's output with the package of a tree."""
    environment = {**os.environ, "PYTHONPATH": f"{source}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} in {source}:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def write_report(report: dict[str, Any], output: Path | None) -> None:
    text = json.dumps(report, indent=1)
    print(text)
    if output:
        output.write_text(f"{text}\n")
