"""Text encoders: their folders, weights that are read when first needed, cached embeddings.

Axes: B batch, S tokens, D width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from worldline.documents import read_json
from worldline.errors import CheckpointError, blame
from worldline.files import remove, stamp
from worldline.finite import check_finite, total
from worldline.parallel.offload import BlockPlan, Offloadable
from worldline.repositories import holds_diffusers, released_folders, unfinished
from worldline.weights.checkpoint import (
    Checkpoint,
    content_digest,
    open_checkpoint,
    open_set,
    save,
    take_network,
)
from worldline.weights.keymap import KeyMap, match
from worldline.weights.networks import find_files
from worldline.weights.stream import load_into

logger = logging.getLogger(__name__)

MAX_LENGTH = 512  # rows that the released worlds were trained on
WEIGHTS = (  # in order of preference
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
BYTES = "ByT5Tokenizer"  # a tokenizer_config.json of this class needs no vocabulary
_TOKENIZER = ("tokenizer.json", "vocab.json", "merges.txt")  # the first decides its kind
_RECIPE = "2"  # to be raised when the same encoder and prompt give another embedding


class PromptEncoder(nn.Module, ABC):
    """Prompts to context, by a network of transformers.

    Attributes:
        config: settings of config.json.
        tokenizer: prompts to ids, by `encode`; `size` is one more than the largest id.
        max_length: S of an embedding; longer prompts are cut.
    """

    def __init__(self, config: Mapping[str, Any], tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self.network: Any = self.make_network(config)
        self.config = config
        self.tokenizer = tokenizer
        self.max_length = max_length

    @abstractmethod
    def make_network(self, config: Mapping[str, Any]) -> nn.Module: ...

    @abstractmethod
    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """Ids (B, max_length) int64 on the CPU, and what else `embed` takes."""

    @abstractmethod
    def embed(self, *tokens: Any, **named: Any) -> Tensor:
        """Embeddings (B, S, D) where the weights are; differentiable."""

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, max_length, D)."""
        # alone, so that an embedding does not depend on which others are asked for
        return torch.cat([self.embed(*self.tokenize([prompt])) for prompt in prompts])


@dataclass(frozen=True)
class TextPart:
    """A text encoder that is only planned for."""

    num_parameters: int  # that are read
    num_streamed: int | None = None  # on the device at most as blocks come one after another
    max_length: int = MAX_LENGTH  # rows of an embedding; longer prompts are cut
    files: tuple[Path, ...] = ()  # all that decide an embedding
    notes: tuple[str, ...] = ()

    def nbytes(self, compute: Any) -> int:
        return self.num_parameters * int(compute.text_dtype.itemsize)

    def streamed_nbytes(self, compute: Any) -> int | None:
        return self.num_streamed and self.num_streamed * int(compute.text_dtype.itemsize)


@dataclass(frozen=True, kw_only=True)
class EncoderFiles(TextPart, ABC):
    """A text encoder on disk, of which headers were read."""

    folder: Path
    config: Mapping[str, Any]  # of config.json, with its `text_config` on top
    checkpoint: Checkpoint  # may hold more than the encoder's weights
    vocabulary: Path  # file that decides the tokenizer

    name = ""
    released, revision = "", ""  # name on the hub, and the only right revision there, if any
    model_types: ClassVar[tuple[str, ...]]  # of config.json
    encoder: ClassVar[type[PromptEncoder]]
    sizes: ClassVar[tuple[str, ...]]  # settings whose product is the width
    keys: ClassVar[KeyMap]  # but for names, which are the network's
    blocks: ClassVar[BlockPlan]  # of the network
    anchor: ClassVar[str]  # name of a tensor of every file, without a prefix
    tied: ClassVar[tuple[str, ...]] = ()  # names of one tensor, of which a file holds any
    cached: ClassVar[tuple[str, int]] = ("", 1000)  # folder and number of cached embeddings

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Check the folder of an encoder; transformers is not imported.

        Args:
            folder: config.json, weights (safetensors or `pytorch_model.bin`, whole or in shards)
                and tokenizer, which may also lie in the folder `tokenizer` beside.

        Raises:
            CheckpointError: a file is missing, half downloaded, damaged, or of another model.
        """
        path = folder / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} holds no config.json{unfinished(folder)}")
        config = read_json(path)
        if (kind := config.get("model_type")) not in cls.model_types:
            raise CheckpointError(f"{path}: model_type is {kind!r}, expected {cls.model_types[0]}")
        config |= config.pop("text_config", None) or {}
        for size in ("vocab_size", *cls.sizes):
            value = config.get(size)
            if type(value) is not int or value < 1:
                raise CheckpointError(f"{path}: {size} is {value!r}")
        stored = open_set(find_files(folder, WEIGHTS, "weights")[0])
        checkpoint = take_network(stored, (cls.anchor,), cls.keys.prefixes)
        sizes = {
            cls.tied[0] if name in cls.tied else name: tensor.numel()
            for name, tensor in checkpoint.tensors.items()
            if not cls.keys.drops(name)
        }
        for holder in (folder, folder.parent / "tokenizer"):
            stated = holder / "tokenizer_config.json"
            settings = read_json(stated) if stated.is_file() else {}
            vocabularies = [holder / name for name in _TOKENIZER if (holder / name).is_file()]
            limit = settings.get("model_max_length")  # 1e30 where it has none of its own
            if vocabularies or settings.get("tokenizer_class") == BYTES:
                vocabularies += [stated] if settings else []
                return cls(
                    sum(sizes.values()),
                    cls.blocks.count(sizes),
                    limit if isinstance(limit, int) and 0 < limit < MAX_LENGTH else MAX_LENGTH,
                    (path, *checkpoint.files, *vocabularies),
                    checkpoint.notes,
                    folder=folder,
                    config=config,
                    checkpoint=checkpoint,
                    vocabulary=vocabularies[0],
                )
        raise CheckpointError(f"{folder} holds no tokenizer.json{unfinished(folder)}")

    @classmethod
    def find(cls, opened: Any, width: int) -> Self:
        """Open the encoder of a model: as chosen, beside the transformer, or below a root.

        Raises:
            CheckpointError: no folder holds a whole one of this context width; the error is that
                of the first folder.
        """
        place, chosen = opened.place, opened.options.text_encoder_dir
        folders = [
            path
            for root in place.roots
            for path in released_folders(root, cls.released, cls.revision)
        ]
        beside = opened.folder / "text_encoder"
        if chosen is not None:
            folders = [place.chosen(chosen, "text_encoder_dir")]
        elif beside.is_dir():
            folders.insert(0 if holds_diffusers(opened.source.path) else len(folders), beside)
        first: CheckpointError | None = None
        for folder in folders:
            try:
                files = cls.open(folder)
                if files.width == width:
                    return files
                raise CheckpointError(
                    f"text encoder {folder} has width {files.width}, the world expects {width}"
                )
            except CheckpointError as error:
                first = first or error
        raise first or CheckpointError(f"no text encoder {cls.released} in {place.searched}")

    @property
    def width(self) -> int:
        """D of an embedding."""
        return math.prod(self.config[size] for size in self.sizes)

    @cached_property
    @abstractmethod
    def tokenizer(self) -> Any:
        """Prompts to ids; read at the first use."""

    def load(self, compute: Any, *, offload: bool) -> TextEncoder:
        """The encoder, whose weights are read at the first prompt that is not cached."""
        return TextEncoder(self, compute.device, compute.text_dtype, offload=offload)

    def read(self, device: torch.device | str, dtype: torch.dtype) -> Any:
        """The encoder with its weights, for inference; the released ones overflow in float16.

        Raises:
            CheckpointError: weights, settings or tokenizer do not fit, or cannot be read.
        """
        if self.tokenizer.size > self.config["vocab_size"]:
            raise CheckpointError(
                f"{self.vocabulary} has {self.tokenizer.size:,} tokens, {self.folder} "
                f"expects {self.config['vocab_size']:,}"
            )
        encoder, keys = self._build()
        load_into(encoder.network, self.checkpoint, keys, device=device, dtype=dtype)
        return encoder.requires_grad_(False).eval()

    def check(self) -> int:
        """Number of tensors that are not read.

        Raises:
            CheckpointError: one is missing, unknown or of another shape.
        """
        encoder, keys = self._build()
        tensors = self.checkpoint.tensors
        shapes = {name: t.shape for name, t in encoder.network.state_dict().items()}
        tied = () if tensors.keys().isdisjoint(self.tied) else self.tied
        return len(tensors) - len(match(tensors, shapes, keys, self.checkpoint, tied))

    def _build(self) -> tuple[PromptEncoder, KeyMap]:
        """The encoder without weights, and names of its tensors in the file."""
        tokenizer = self.tokenizer  # whose errors are its own
        try:
            with torch.device("meta"):
                encoder = self.encoder(self.config, tokenizer, self.max_length)
        except Exception as error:  # transformers has a kind of error for each kind of setting
            reason = " ".join(str(error).split())
            path = self.folder / "config.json"
            raise CheckpointError(f"{path} makes no {self.name}: {reason}") from error
        names = {name: name for name in encoder.network.state_dict()}
        return encoder, replace(self.keys, rename=names)


class TextEncoder:
    """A text encoder behind its cache: weights are read at the first prompt that is not in it."""

    def __init__(
        self, files: EncoderFiles, device: torch.device, dtype: torch.dtype, *, offload: bool
    ) -> None:
        self.files = files
        self.device = device
        self.dtype = dtype
        self.offload = offload and device.type != "cpu"
        self._cache = EmbeddingCache(*files.cached)
        stamps = [stamp(path) for path in files.files]
        self._key = json.dumps([stamps, str(dtype), files.max_length], sort_keys=True)

    @property
    def streamed(self) -> bool:
        return self.offload

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The embedding (1, S, D) of each prompt, on the CPU.

        Raises:
            CheckpointError: the weights do not fit, or cannot be read.
            NonFiniteError: an embedding has NaN or infinity; its `index` is that of the prompt.
        """
        embeddings: dict[str, Any] = {p: self._cache.get(self._key, p) for p in prompts}
        if missing := [prompt for prompt in embeddings if embeddings[prompt] is None]:
            with torch.inference_mode(), self._part.on_device() as encoder:
                for prompt in missing:
                    embeddings[prompt] = encoder.encode([prompt]).cpu()
                    with blame(prompts.index(prompt)):
                        check_finite(total(embeddings[prompt]), "text: embeddings", self.dtype)
                    self._cache.put(self._key, prompt, embeddings[prompt])
        return embeddings

    @cached_property
    def _part(self) -> Offloadable[PromptEncoder]:
        logger.info("reading %s", self.files.folder)
        encoder = self.files.read("cpu" if self.offload else self.device, self.dtype)
        blocks = replace(self.files.blocks, blocks=f"network.{self.files.blocks.blocks}")
        return Offloadable(encoder, self.device, offload=self.offload, blocks=blocks)

    def truncations(self, prompts: Mapping[str, str]) -> dict[str, dict[str, int]]:
        """Report entry of the prompts that are cut, by their names, with a warning of each."""
        length = self.files.max_length
        cuts = {}
        for name, prompt in prompts.items():
            if (cut := len(self.files.tokenizer.encode(prompt)) - length) > 0:
                warning = "a prompt has %d tokens and is cut after %d: %r ..."
                logger.warning(warning, length + cut, length, prompt[:40])
                cuts[name] = {"max_length": length, "num_truncated_tokens": cut}
        return cuts


def cache_folder() -> Path:
    """Folder of cached embeddings: below $WORLDLINE_CACHE, else below ~/.cache."""
    if named := os.environ.get("WORLDLINE_CACHE"):
        return Path(named) / "embeddings"
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if root.startswith("~"):  # a user without a home, as in some containers
        root = tempfile.gettempdir()
    return Path(root) / "worldline" / "embeddings"


class EmbeddingCache:
    """Embeddings by encoder and prompt: 1 MB each of T5, 103 MB of Reason1; weights are 10 GB.

    One safetensors file each, shared by all processes; its name is a hash, as the prompt is not
    written down, and its digest covers name, dtype, shape and numbers. A folder that cannot be
    written is no error; nothing is cached then. Beyond `largest` files, temporary ones of killed
    processes too, the one that was unused for longest is removed; none is where it is None.
    """

    def __init__(self, name: str | Path = "", largest: int | None = 1000) -> None:
        self.folder = cache_folder() / name
        self.largest = largest

    def path(self, encoder: str, prompt: str) -> Path:
        """File of an entry, which may not exist."""
        key = json.dumps([_RECIPE, encoder, prompt]).encode()
        return self.folder / f"{hashlib.sha256(key).hexdigest()}.safetensors"

    def get(self, encoder: str, prompt: str) -> Tensor | None:
        """The embedding on the CPU; None where there is none, or another than was put there."""
        path = self.path(encoder, prompt)
        try:
            if not path.is_file():
                return None
            entry = open_checkpoint(path)
            embedding = entry.read("embedding")
            if entry.metadata.get("digest") != content_digest({path.stem: embedding}):
                raise CheckpointError(f"{path} is not the entry that was written under its name")
        except (CheckpointError, OSError) as error:
            logger.info("a cached embedding is made anew: %s", error)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now, so removed last
        return embedding

    def put(self, encoder: str, prompt: str, embedding: Tensor) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.path(encoder, prompt)
            if path.is_dir():
                remove(path)  # it would be in the way for ever
            save({"embedding": embedding}, path, {"digest": content_digest({path.stem: embedding})})
            if self.largest is None:
                return
            files = [path for path in self.folder.iterdir() if path.is_symlink() or path.is_file()]
            for file in sorted(files, key=lambda path: path.lstat().st_mtime)[: -self.largest]:
                file.unlink(missing_ok=True)
        except OSError as error:  # a full disk, or an entry that another process removed
            logger.info("the cache of embeddings is left as it is: %s", error)


class FastTokenizer:
    """`tokenizer.json` as it stands, by the package `tokenizers`, with nothing cut or padded.

    transformers would rebuild it from its vocabulary, in seconds.
    """

    special_tokens = True  # added around a prompt

    def __init__(self, backend: Any) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.size = max(self.vocabulary.values(), default=0) + 1

    def encode(self, prompt: str) -> list[int]:
        """Ids of a whole prompt; "?" for lone surrogates (of a broken command line)."""
        valid = prompt.encode("utf-8", "replace").decode()
        return list(self.backend.encode(valid, add_special_tokens=self.special_tokens).ids)


def read_tokenizer(path: Path) -> Any:
    """Read a `tokenizer.json`.

    Raises:
        CheckpointError: it is damaged.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception for a damaged file
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error
