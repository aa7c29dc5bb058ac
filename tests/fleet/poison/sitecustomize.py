"""On the path of a test's cluster: "poison" in an input's prompt or file kills its process."""

import os
import sys
from typing import Any

actor = any(word.endswith("default_worker.py") for word in sys.orig_argv)
if actor or "WORLDLINE_ASKED" in os.environ:
    import worldline.cli.run

    make_videos = worldline.cli.run.make_videos

    def poisoned(world: Any, items: Any, *rest: Any) -> None:
        if any("poison" in f"{item.request.prompt} {item.input}" for item in items):
            os._exit(7)
        make_videos(world, items, *rest)

    worldline.cli.run.make_videos = poisoned
