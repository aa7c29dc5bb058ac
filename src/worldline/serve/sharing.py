"""Check of whether processes can share a world's videos; a program of its own, for it needs torch.

`python -m worldline.serve.sharing` reads {"count", "worlds": [[name, load options], …]} as JSON,
and prints what is wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from worldline.errors import Error, InputError, as_flags, option
from worldline.locate import locate
from worldline.parallel.job import own_device


def refuse_unless_shared(count: int, worlds: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Ask the program.

    Args:
        count: processes that make a video together.
        worlds: names or paths, and load options.

    Raises:
        InputError: the videos of one cannot be shared so, or there are too few devices.
        Error: the program failed.
    """
    # -P: a module of the working folder must not take the place of ours
    words = [sys.executable, "-P", "-m", "worldline.serve.sharing"]
    asked = json.dumps({"count": count, "worlds": worlds})
    done = subprocess.run(words, input=asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Error(f"{option('gpus_per_worker', count)}: {done.stderr.strip().splitlines()[-1]}")
    if done.stdout:
        raise InputError(done.stdout.strip())


def check(count: int, name: str, options: Mapping[str, Any]) -> None:
    """Refuse a number of processes that cannot share the usual video of a world.

    Raises:
        InputError: see `refuse_unless_shared`.
    """
    from worldline.opening import open_world

    opened = open_world(locate(name, options.get("checkpoint_dir", "checkpoints")), options)
    request = opened.family.request.parse(opened.defaults)
    called = option("gpus_per_worker", count)
    try:
        own_device(opened.options.device, count)
    except InputError as error:
        raise InputError(f"{called}: {error}") from error
    try:
        opened.family.layout(opened, [request], count)
    except InputError as error:
        possible = list[int]()
        for number in range(1, 2 * count):
            with suppress(InputError):
                opened.family.layout(opened, [request], number)
                possible.append(number)
        reason = str(error).partition(";")[0].removeprefix(f"{opened.name}: ")
        numbers = " or ".join(map(str, possible))
        raise InputError(f"{called}: {opened.name}: {reason}; give {numbers}") from error


def main() -> None:
    as_flags.set(True)
    asked = json.load(sys.stdin)
    try:
        for name, options in asked["worlds"]:
            check(asked["count"], name, options)
    except InputError as error:
        print(error)


if __name__ == "__main__":
    main()
