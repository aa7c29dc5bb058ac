"""A fleet whose tasks are done in no time, or end their process: ADDRESS FOLDER COUNT POISON..."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from worldline.cli.fleet import Fleet, FleetFlags, import_driver
from worldline.cli.run import Run

ADDRESS, FOLDER, COUNT, *POISON = sys.argv[1:]


@dataclass(frozen=True)
class Toy:
    output: Path

    def __str__(self) -> str:
        return self.output.stem


def load(toys: Sequence[Toy]) -> Run:
    def make(toy: Toy, label: str, group: Sequence[Toy]) -> str:
        if label in POISON:
            os._exit(7)
        toy.output.write_text(label)
        toy.output.with_suffix(".json").write_text('{"fingerprint": "same"}')
        return f"{label} is made"

    return make, 1


fleet = Fleet(FleetFlags.parse({"words": ("toys",), "attempts": 2}), import_driver())
fleet.driver = fleet.make_driver(ADDRESS, 0, 1, 2)
toys = [Toy(Path(FOLDER, f"{number}.mp4")) for number in range(int(COUNT))]
try:
    fleet.run_tasks(toys, load, lambda toy: "same", SimpleNamespace(no_overwrite=False))
finally:
    fleet.close()
