"""Embeddings on disk: 1 MB each, against reading 10 GB of weights to make one."""

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

_RECIPE = "1"  # to be raised when the same encoder and prompt give another embedding
_TENSOR = "embedding"


def cache_folder() -> Path:
    """Folder of cached embeddings: below $WORLDLINE_CACHE, else below ~/.cache."""
    if named := os.environ.get("WORLDLINE_CACHE"):
        return Path(named) / "embeddings"
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home, as in some containers
        root = tempfile.gettempdir()
    return Path(root) / "worldline" / "embeddings"


class EmbeddingCache:
    """Embeddings by encoder and prompt, one safetensors file each, shared by all processes.

    A file's name is a hash: the prompt is not written down. A folder that cannot be written is no
    error; nothing is cached then.

    Attributes:
        folder: of the entries; made with the first.
        largest: number of entries, beyond which the one that was unused for longest is removed.
    """

    def __init__(self, name: str | Path = "", largest: int = 1000) -> None:
        self.folder = cache_folder() / name
        self.largest = largest

    def path(self, encoder: str, prompt: str) -> Path:
        """File of an entry, which may not exist."""
        digest = hashlib.sha256()
        for part in (_RECIPE, encoder, prompt):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return self.folder / f"{digest.hexdigest()}.safetensors"

    def get(self, encoder: str, prompt: str) -> Tensor | None:
        """The embedding on the CPU; None where there is none, or a damaged one.

        Args:
            encoder: its files, dtype and length.
            prompt: whole.
        """
        path = self.path(encoder, prompt)
        try:
            if not path.is_file():
                return None
            # a copy: the mapping would change with what another process does to the file
            embedding = open_checkpoint(path).read(_TENSOR).clone()
        except (CheckpointError, OSError) as error:
            logger.info("a cached embedding is made anew: %s", error)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now, so removed last
        return embedding

    def put(self, encoder: str, prompt: str, embedding: Tensor) -> None:
        """Keep an embedding in place of what `get` finds for the same arguments."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.path(encoder, prompt)) as temporary:
                save({_TENSOR: embedding}, temporary)
            ages: list[tuple[int, Path]] = []
            for entry in self.folder.glob("*.safetensors"):
                with contextlib.suppress(OSError):  # removed by another process
                    ages.append((entry.stat().st_mtime_ns, entry))
            for _, entry in sorted(ages)[: max(0, len(ages) - self.largest)]:
                entry.unlink(missing_ok=True)
        except OSError as error:
            logger.info("an embedding is not cached: %s", error)
