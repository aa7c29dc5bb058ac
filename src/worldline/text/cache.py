"""Embeddings of prompts on disk: 1 MB each, against reading 10 GB of weights to make one."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from pathlib import Path

from torch import Tensor

from worldline.errors import CheckpointError
from worldline.files import replacing
from worldline.weights.read import open_checkpoint
from worldline.weights.write import save

logger = logging.getLogger(__name__)

LARGEST = 1000  # entries; a gigabyte of T5-11B's in bfloat16
_RECIPE = 1  # to be raised when the same encoder and prompt give another embedding
_TENSOR = "embedding"


def cache_folder() -> Path:
    """Return where embeddings are kept: below $WORLDLINE_CACHE, else below ~/.cache."""
    if named := os.environ.get("WORLDLINE_CACHE"):
        return Path(named) / "embeddings"
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "worldline" / "embeddings"
    try:
        home = Path.home()
    except RuntimeError:  # a user without one, as in some containers
        home = Path(tempfile.gettempdir())
    return home / ".cache" / "worldline" / "embeddings"


class EmbeddingCache:
    """Embeddings by encoder and prompt, one safetensors file each, shared by all processes.

    Of more than `largest` entries those that were not used for longest are removed. A prompt is
    not written down, only its hash. A folder that cannot be written makes no error: nothing is
    kept then.

    Attributes:
        folder: of the entries; made when the first is put.
        largest: number of entries.
    """

    def __init__(self, folder: Path | None = None, *, largest: int = LARGEST) -> None:
        self.folder = cache_folder() if folder is None else folder
        self.largest = largest

    def path(self, model_key: str, text: str) -> Path:
        """Return the file of an entry, which may not exist."""
        parts = (str(_RECIPE), model_key, text)
        digest = hashlib.sha256()
        for part in parts:
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return self.folder / f"{digest.hexdigest()}.safetensors"

    def get(self, model_key: str, text: str) -> Tensor | None:
        """Return the embedding on the CPU; None if there is none, or a damaged one.

        Args:
            model_key: tells the encoder, its dtype and length from any other.
            text: the prompt.
        """
        path = self.path(model_key, text)
        try:
            if not path.is_file():
                return None
            # A copy: the mapping would show what another process does to the file.
            found = open_checkpoint(path).read(_TENSOR).clone()
        except (CheckpointError, OSError) as error:
            logger.info("a kept embedding is made anew: %s", error)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now, so removed last
        return found

    def put(self, model_key: str, text: str, embedding: Tensor) -> None:
        """Keep an embedding; an entry of the same key is replaced.

        Args:
            model_key: as for `get`.
            text: the prompt.
            embedding: of any shape, on any device.
        """
        path = self.path(model_key, text)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save({_TENSOR: embedding}, temporary)
            self._remove_oldest()
        except OSError as error:
            logger.info("an embedding is not kept: %s", error)

    def _remove_oldest(self) -> None:
        ages: list[tuple[int, Path]] = []
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):  # removed by another process
                ages.append((path.stat().st_mtime_ns, path))
        for _, path in sorted(ages)[: max(0, len(ages) - self.largest)]:
            path.unlink(missing_ok=True)
