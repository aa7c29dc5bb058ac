"""Text encoders: their folders, weights that are read when first needed, cached embeddings.

Axes: B batch, S tokens, D width.
"""

from __future__ import annotations

import json
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from worldline.errors import CheckpointError
from worldline.files import read_json, released_folders, stamp, unfinished
from worldline.parallel.offload import Part
from worldline.text.cache import EmbeddingCache
from worldline.weights.keymap import KeyMap, match
from worldline.weights.read import Checkpoint, open_checkpoint
from worldline.weights.stream import load_into

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)

MAX_LENGTH = 512  # rows that the released worlds were trained on
WEIGHTS = (  # in order of preference
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
BYTES = "ByT5Tokenizer"  # a tokenizer_config.json of this class needs no vocabulary


class PromptEncoder(nn.Module, ABC):
    """Prompts to context.

    Attributes:
        network: of transformers.
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
    def make_network(self, config: Mapping[str, Any]) -> nn.Module:
        """The network of a config.json."""

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, max_length, D) of prompts, each encoded alone, where the weights are."""


@dataclass(frozen=True)
class EncoderFiles(ABC):
    """A text encoder on disk, of which headers were read.

    Attributes:
        folder: holds config.json and the weights.
        config: settings of config.json, those of its `text_config` on top.
        checkpoint: the weights, which may hold more than the encoder's.
        tokenizer_files: the file that decides the tokenizer, then those beside it.
        max_length: rows of an embedding; longer prompts are cut.
    """

    folder: Path
    config: Mapping[str, Any]
    checkpoint: Checkpoint
    tokenizer_files: tuple[Path, ...]
    max_length: int

    name: ClassVar[str]
    released: ClassVar[str]  # name on the hub
    revision: ClassVar[str] = ""  # the only right one there, if any
    model_types: ClassVar[tuple[str, ...]]  # of config.json
    encoder: ClassVar[type[PromptEncoder]]
    sizes: ClassVar[tuple[str, ...]]  # settings whose product is the width
    vocabularies: ClassVar[tuple[tuple[str, ...], ...]] = (("tokenizer.json",),)  # any of these
    prefixes: ClassVar[tuple[str, ...]] = ("",)  # what a file may have before our names
    unread: ClassVar[Mapping[str, str]]  # patterns of other tensors in a file -> what they are
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
        kind, language = config.get("model_type"), config.pop("text_config", None)
        if kind not in cls.model_types:
            raise CheckpointError(f"{path}: model_type is {kind!r}, expected {cls.model_types[0]}")
        config |= language if isinstance(language, dict) else {}
        for size in ("vocab_size", *cls.sizes):
            value = config.get(size)
            if type(value) is not int or value < 1:
                raise CheckpointError(f"{path}: {size} is {value!r}")
        checkpoint = open_checkpoint(find_weights(folder))
        for holder in (folder, folder.parent / "tokenizer"):
            path = holder / "tokenizer_config.json"
            settings = read_json(path) if path.is_file() else {}
            beside = [path] if settings else []
            choices = [[holder / name for name in names] for names in cls.vocabularies]
            if settings.get("tokenizer_class") == BYTES:
                choices = [beside]
            for files in choices:
                if all(file.is_file() for file in files):
                    # without a limit of its own it has 1e30, or that of the model
                    limit = settings.get("model_max_length")
                    length = MAX_LENGTH
                    if isinstance(limit, int) and 0 < limit < MAX_LENGTH:
                        length = limit
                    files = [*dict.fromkeys([*files, *beside])]
                    return cls(folder, config, checkpoint, tuple(files), length)
        raise CheckpointError(f"{folder} holds no tokenizer.json{unfinished(folder)}")

    @classmethod
    def folders(cls, root: Path) -> list[Path]:
        """Folders below a folder of models that may hold the released encoder, the best first."""
        return released_folders(root, cls.released, cls.revision)

    @classmethod
    def open_first(cls, folders: Sequence[Path], width: int) -> Self:
        """Open the first folder that holds a whole encoder of a world's context width.

        Raises:
            CheckpointError: there is none; the error is that of the first folder.
        """
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
        raise first or CheckpointError(f"there is no text encoder {cls.released}")

    @property
    def files(self) -> list[Path]:
        """All files that decide an embedding."""
        return [self.folder / "config.json", *self.checkpoint.files, *self.tokenizer_files]

    @property
    def width(self) -> int:
        """D of an embedding."""
        return math.prod(self.config[size] for size in self.sizes)

    @property
    def num_parameters(self) -> int:
        """Parameters that are read."""
        keys, tensors = KeyMap({}, self.unread, self.prefixes), self.checkpoint.tensors
        names = [name for name in tensors if not keys.drops(name)]
        doubled = [name for name in self.tied if name in names][1:]
        return sum(tensors[name].numel for name in names if name not in doubled)

    @cached_property
    @abstractmethod
    def tokenizer(self) -> Any:
        """Prompts to ids; read at the first use."""

    def count_truncated(self, prompt: str) -> int:
        """Tokens of a prompt that are not read."""
        return max(0, len(self.tokenizer.encode(prompt)) - self.max_length)

    def load(self, device: torch.device | str, dtype: torch.dtype) -> Any:
        """The encoder with its weights, for inference.

        Args:
            device: where it goes.
            dtype: float32 or bfloat16; the released encoders overflow in float16.

        Raises:
            CheckpointError: weights, settings or tokenizer do not fit, or cannot be read.
        """
        if self.tokenizer.size > self.config["vocab_size"]:
            raise CheckpointError(
                f"{self.tokenizer_files[0]} has {self.tokenizer.size:,} tokens, {self.folder} "
                f"expects {self.config['vocab_size']:,}"
            )
        encoder, keys = self._build()
        load_into(encoder.network, self.checkpoint, keys, device=device, dtype=dtype)
        return encoder.requires_grad_(False).eval()

    def check(self) -> int:
        """Number of tensors in the weights that the encoder has no use for.

        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape.
        """
        encoder, keys = self._build()
        tensors, path = self.checkpoint.tensors, self.checkpoint.path
        shapes = {name: tuple(t.shape) for name, t in encoder.network.state_dict().items()}
        pairs = match(tensors, shapes, keys, str(path), self.tied)
        if self.tied and not any(name in pairs for name in self.tied):
            raise CheckpointError(f"{path}: 1 missing: {self.tied[0]}")
        return len(tensors) - len(pairs)

    def _build(self) -> tuple[PromptEncoder, KeyMap]:
        """The encoder without weights, and names of its tensors in the file."""
        try:
            with torch.device("meta"):
                encoder = self.encoder(self.config, self.tokenizer, self.max_length)
        except CheckpointError:
            raise
        except Exception as error:  # transformers has a kind of error for each kind of setting
            reason = " ".join(str(error).split())
            path = self.folder / "config.json"
            raise CheckpointError(f"{path} makes no {self.name}: {reason}") from error
        names = {name: name for name in encoder.network.state_dict()}
        return encoder, KeyMap(names, self.unread, self.prefixes)


class TextEncoder:
    """A text encoder behind its cache: the weights are read at the first prompt that is not in it.

    Attributes:
        files: of the encoder.
        device: where it runs.
        dtype: of its weights.
        offload: whether the weights wait in host memory between prompts.
    """

    def __init__(
        self, files: EncoderFiles, device: torch.device, dtype: torch.dtype, *, offload: bool
    ) -> None:
        self.files = files
        self.device = device
        self.dtype = dtype
        self.offload = offload and device.type != "cpu"
        self._cache = EmbeddingCache(*files.cached)
        self._part: Part[PromptEncoder] | None = None
        stamps = [stamp(path) for path in files.files]
        self._key = json.dumps([stamps, str(dtype), files.max_length], sort_keys=True)

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The embedding (1, S, D) of each prompt, on the CPU; warns of prompts that are cut.

        Raises:
            CheckpointError: the weights do not fit, or cannot be read.
        """
        embeddings: dict[str, Tensor] = {}
        missing: list[str] = []
        length = self.files.max_length
        for prompt in dict.fromkeys(prompts):
            if cut := self.files.count_truncated(prompt):
                warning = "a prompt has %d tokens and is cut after %d: %r ..."
                logger.warning(warning, length + cut, length, prompt[:40])
            cached = self._cache.get(self._key, prompt)
            if cached is None:
                missing.append(prompt)
            else:
                embeddings[prompt] = cached.view(1, *cached.shape[-2:])
        if not missing:
            return embeddings
        if self._part is None:
            logger.info("reading %s", self.files.folder)
            encoder = self.files.load("cpu" if self.offload else self.device, self.dtype)
            self._part = Part(encoder, self.device, offload=self.offload)
        with torch.inference_mode(), self._part.on_device() as encoder:
            for prompt in missing:
                embeddings[prompt] = encoder.encode([prompt]).cpu()
        for prompt in missing:
            self._cache.put(self._key, prompt, embeddings[prompt])
        return embeddings

    def truncations(self, prompts: Mapping[str, str]) -> dict[str, dict[str, int]]:
        """Report entry of the prompts that are cut, by their names: tokens read and not read."""
        cuts = {name: self.files.count_truncated(prompt) for name, prompt in prompts.items()}
        length = self.files.max_length
        return {
            name: {"max_length": length, "num_truncated_tokens": cut}
            for name, cut in cuts.items()
            if cut
        }


def find_weights(folder: Path) -> Path:
    """File or index of the weights in a folder as Hugging Face lays it out.

    Raises:
        CheckpointError: there is none.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"{folder} holds no weights ({' or '.join(WEIGHTS[::2])}){unfinished(folder)}"
    )


class FastTokenizer:
    """`tokenizer.json` as it stands, by the package `tokenizers`, with nothing cut or padded.

    transformers would rebuild it from its vocabulary, in seconds.
    """

    special_tokens = True  # added around a prompt

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.size = max(self.vocabulary.values(), default=0) + 1

    def encode(self, prompt: str) -> list[int]:
        """Ids of a whole prompt; "?" for lone surrogates (of a broken command line)."""
        valid = prompt.encode("utf-8", "replace").decode()
        return list(self.backend.encode(valid, add_special_tokens=self.special_tokens).ids)


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        CheckpointError: it is damaged.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception for a damaged file
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error
