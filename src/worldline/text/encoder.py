"""Text encoders: their folders, weights that are read when first needed, kept embeddings.

Axes: B batch, S tokens, D width.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from worldline.errors import CheckpointError, InputError
from worldline.files import read_json, released_folders, replacing, stamp, unfinished
from worldline.parallel.offload import Part
from worldline.weights.keymap import KeyMap, match
from worldline.weights.read import Checkpoint, open_checkpoint
from worldline.weights.stream import load_into
from worldline.weights.write import save

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger(__name__)

MAX_LENGTH = 512  # rows that the released worlds were trained on
TRUNCATION = "prompt_truncation"  # fact of a recorder, and entry of a report
WEIGHTS = (  # in order of preference
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class PromptTokenizer(Protocol):
    """Prompts to ids."""

    size: int  # one more than the largest id

    def encode(self, prompt: str) -> list[int]:
        """Ids of a whole prompt, those that the encoder adds among them."""


class PromptEncoder(nn.Module, ABC):
    """Prompts to context.

    Attributes:
        network: the network of transformers.
        config: settings of config.json.
        tokenizer: prompts to ids.
        max_length: S of an embedding; longer prompts are cut.
    """

    def __init__(
        self, network: Any, config: Mapping[str, Any], tokenizer: Any, max_length: int
    ) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.tokenizer = tokenizer
        self.max_length = max_length

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (B, max_length, D) of prompts, each encoded alone, where the weights are."""

    def export(
        self,
        folder: Path,
        config: Mapping[str, Any],
        tokenizer_config: Mapping[str, Any],
        *,
        prefix: str = "",
        dtype: torch.dtype | None,
    ) -> None:
        """Write config.json, tokenizer_config.json and model.safetensors.

        Args:
            folder: made if absent.
            config: of the encoder.
            tokenizer_config: besides the length.
            prefix: of the tensors' names in the file.
            dtype: of the weights; None keeps theirs.

        Raises:
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer_config = {**tokenizer_config, "model_max_length": self.max_length}
        for name, settings in (("config", config), ("tokenizer_config", tokenizer_config)):
            (folder / f"{name}.json").write_text(json.dumps(settings, indent=1) + "\n")
        tensors = {
            prefix + name: tensor.to(dtype or tensor.dtype)
            for name, tensor in self.network.named_parameters()  # each shared tensor once
        }
        save(tensors, folder / "model.safetensors", {"format": "pt"})


EncoderType = TypeVar("EncoderType", bound=PromptEncoder)


@dataclass(frozen=True)
class EncoderFiles(ABC, Generic[EncoderType]):
    """A text encoder on disk, of which config.json alone was read.

    Attributes:
        folder: holds config.json and the weights.
        config: settings of config.json, those of its `text_config` on top.
        weights: file or index of the weights, which may hold more than the encoder's.
        tokenizer_files: the file that decides the tokenizer, then those beside it.
        max_length: rows of an embedding; longer prompts are cut.
    """

    folder: Path
    config: Mapping[str, Any]
    weights: Path
    tokenizer_files: tuple[Path, ...]
    max_length: int

    name: ClassVar[str]
    released: ClassVar[str]  # name on the hub
    revision: ClassVar[str] = ""  # the only right one there, if any
    model_types: ClassVar[tuple[str, ...]]  # of config.json
    sizes: ClassVar[tuple[str, ...]]  # settings that must be whole numbers above 0
    prefixes: ClassVar[tuple[str, ...]] = ("",)  # what a file may have before our names
    unread: ClassVar[Mapping[str, str]]  # patterns of other tensors in a file -> what they are
    most_added: ClassVar[int]  # tokens that the encoder puts around a prompt, at most
    tied: ClassVar[tuple[str, ...]] = ()  # names of one tensor, of which a file holds any

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Check the folder of an encoder by names and config.json; transformers is not imported.

        Args:
            folder: config.json, weights (safetensors or `pytorch_model.bin`, whole or in shards)
                and tokenizer, which may also lie in the folder `tokenizer` beside.

        Raises:
            CheckpointError: a file is missing, half downloaded, damaged, or of another model.
        """
        if not folder.is_dir():
            raise CheckpointError(f"no text encoder folder {folder}")
        path = folder / "config.json"
        if not path.is_file():
            raise CheckpointError(f"{folder} holds no config.json{unfinished(folder)}")
        config = read_json(path)
        kind, language = config.get("model_type"), config.pop("text_config", None)
        if kind not in cls.model_types:
            raise CheckpointError(f"{path}: model_type is {kind!r}, expected {cls.model_types[0]}")
        config |= language if isinstance(language, dict) else {}
        for size in cls.sizes:
            value = config.get(size)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"{path}: {size} is {value!r}")
        weights = find_weights(folder)
        for holder in (folder, folder.parent / "tokenizer"):
            settings = holder / "tokenizer_config.json"
            beside = [settings] if settings.is_file() else []
            stated = read_json(settings) if beside else {}
            if (tokenizer := cls.find_tokenizer(holder, stated)) is None:
                continue
            # a tokenizer without a limit of its own has 1e30, or the length of the model's context
            limit = stated.get("model_max_length")
            length = limit if isinstance(limit, int) and 0 < limit <= MAX_LENGTH else MAX_LENGTH
            files = dict.fromkeys([*tokenizer, *beside])
            return cls(folder, config, weights, tuple(files), length)
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
                if files.width != width:
                    raise CheckpointError(
                        f"text encoder {folder} has width {files.width}, the world expects {width}"
                    )
                return files
            except CheckpointError as error:
                first = first or error
        raise first or CheckpointError(f"there is no text encoder {cls.released}")

    @property
    def files(self) -> list[Path]:
        """All files that decide an embedding.

        Raises:
            CheckpointError: the index of the weights is damaged.
        """
        shards: list[Path] = []
        if self.weights.suffix == ".json":
            listed = read_json(self.weights).get("weight_map")
            if not isinstance(listed, dict):
                raise CheckpointError(f"{self.weights} has no weight_map; download it again")
            shards = [self.folder / str(name) for name in sorted(set(listed.values()))]
        return [self.folder / "config.json", self.weights, *shards, *self.tokenizer_files]

    @property
    @abstractmethod
    def width(self) -> int:
        """D of an embedding."""

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Parameters that are read."""

    @classmethod
    @abstractmethod
    def find_tokenizer(cls, folder: Path, settings: Mapping[str, Any]) -> list[Path] | None:
        """Files of the tokenizer in a folder with these settings, the deciding one first."""

    @property
    @abstractmethod
    def tokenizer(self) -> PromptTokenizer:
        """Prompts to ids; read at the first use."""

    @abstractmethod
    def build(self) -> EncoderType:
        """The encoder on the default device, its weights not read."""

    def count_tokens(self, prompt: str) -> int:
        """Tokens of a whole prompt, those that the encoder adds among them."""
        return len(self.tokenizer.encode(prompt))

    def count_truncated(self, prompt: str) -> int:
        """Tokens of a prompt that are not read."""
        # a token is a byte or more: most prompts are short enough without reading the tokenizer
        if len(prompt.encode("utf-8", "replace")) <= self.max_length - self.most_added:
            return 0
        return max(0, self.count_tokens(prompt) - self.max_length)

    def load(self, device: torch.device | str, dtype: torch.dtype) -> EncoderType:
        """The encoder with its weights, for inference.

        Args:
            device: where it goes.
            dtype: float32, or bfloat16; the released encoders overflow in float16.

        Raises:
            InputError: another dtype.
            CheckpointError: weights, settings or tokenizer do not fit, or cannot be read.
            Error: a package is not installed.
        """
        if dtype not in (torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            raise InputError(f"the text encoder runs in bfloat16 or float32, not in {name}")
        if self.tokenizer.size > self.config["vocab_size"]:
            raise CheckpointError(
                f"{self.tokenizer_files[0]} has {self.tokenizer.size:,} tokens, {self.folder} "
                f"expects {self.config['vocab_size']:,}"
            )
        encoder, checkpoint, keys = self._unfilled()
        load_into(encoder.network, checkpoint, keys, device=device, dtype=dtype)
        return encoder.requires_grad_(False).eval()

    def check(self) -> int:
        """Number of tensors in the weights that the encoder has no use for; headers only.

        Raises:
            CheckpointError: a tensor is missing, unknown or of another shape.
        """
        encoder, checkpoint, keys = self._unfilled()
        shapes = {name: tuple(t.shape) for name, t in encoder.network.state_dict().items()}
        pairs = match(checkpoint.tensors, shapes, keys, str(checkpoint.path), self.tied)
        if self.tied and not any(name in pairs for name in self.tied):
            raise CheckpointError(f"{checkpoint.path}: 1 missing: {self.tied[0]}")
        return len(checkpoint.tensors) - len(pairs)

    def _unfilled(self) -> tuple[EncoderType, Checkpoint, KeyMap]:
        try:
            with torch.device("meta"):
                encoder = self.build()
        except Exception as error:  # transformers has a kind of error for each kind of setting
            reason = " ".join(str(error).split())
            path = self.folder / "config.json"
            raise CheckpointError(f"{path} makes no {self.name}: {reason}") from error
        names = {name: name for name in encoder.network.state_dict()}
        keys = KeyMap(names, self.unread, self.prefixes)
        return encoder, open_checkpoint(self.weights), keys

    @property
    def cache(self) -> EmbeddingCache:
        """Kept embeddings of encoders of this kind."""
        return EmbeddingCache()


FilesType = TypeVar("FilesType", bound=EncoderFiles[Any])


class TextEncoder(Generic[FilesType]):
    """A text encoder behind its cache: the weights are read at the first prompt that is not in it.

    Attributes:
        files: of the encoder.
        device: where it runs.
        dtype: of its weights.
        offload: whether the weights wait in host memory between prompts.
    """

    def __init__(
        self, files: FilesType, device: torch.device, dtype: torch.dtype, *, offload: bool
    ) -> None:
        self.files = files
        self.device = device
        self.dtype = dtype
        self.offload = offload and device.type != "cpu"
        self._cache = files.cache
        self._part: Part[PromptEncoder] | None = None
        try:
            stamps = [stamp(path) for path in files.files]
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from error
        self._key = json.dumps([stamps, str(dtype), files.max_length], sort_keys=True)

    def embed(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The embedding (1, S, D) of each prompt, on the CPU; warns of prompts that are cut.

        Raises:
            CheckpointError: the weights do not fit, or cannot be read.
        """
        embeddings: dict[str, Tensor] = {}
        missing: list[str] = []
        for prompt in dict.fromkeys(prompts):
            if cut := self.files.count_truncated(prompt):
                length = self.files.max_length
                logger.warning(
                    "a prompt has %d tokens and is cut after %d: %r ...",
                    length + cut,
                    length,
                    prompt[:40],
                )
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


def text_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the text encoder beside networks of another; it overflows in float16."""
    return dtype if dtype == torch.float32 else torch.bfloat16


class FastTokenizer:
    """`tokenizer.json` as it stands, by the package `tokenizers`, with nothing cut or padded.

    transformers would rebuild it from its vocabulary, in seconds.
    """

    add_special_tokens = True

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(self.vocabulary.values(), default=0) + 1

    def encode(self, prompt: str) -> list[int]:
        ids = self._tokenizer.encode(
            valid_unicode(prompt), add_special_tokens=self.add_special_tokens
        ).ids
        return list(ids)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        self._tokenizer.save(str(folder / "tokenizer.json"))


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


def valid_unicode(prompt: str) -> str:
    """The prompt with "?" for lone surrogates (of a broken command line), which have no UTF-8."""
    return prompt.encode("utf-8", "replace").decode("utf-8")


# --- kept embeddings: 1 MB each, against reading 10 GB of weights to make one

LARGEST = 1000  # entries; a gigabyte of T5-11B's in bfloat16
_RECIPE = 1  # to be raised when the same encoder and prompt give another embedding
_TENSOR = "embedding"


def cache_folder() -> Path:
    """Folder of kept embeddings: below $WORLDLINE_CACHE, else below ~/.cache."""
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

    A file's name is a hash: the prompt is not written down. A folder that cannot be written is no
    error; nothing is kept then.

    Attributes:
        folder: of the entries; made with the first.
        largest: number of entries, beyond which the one that was unused for longest is removed.
    """

    def __init__(self, folder: Path | None = None, *, largest: int = LARGEST) -> None:
        self.folder = cache_folder() if folder is None else folder
        self.largest = largest

    def path(self, model_key: str, text: str) -> Path:
        """File of an entry, which may not exist."""
        digest = hashlib.sha256()
        for part in (str(_RECIPE), model_key, text):
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return self.folder / f"{digest.hexdigest()}.safetensors"

    def get(self, model_key: str, text: str) -> Tensor | None:
        """The embedding on the CPU; None where there is none, or a damaged one.

        Args:
            model_key: encoder, dtype and length.
            text: the prompt.
        """
        path = self.path(model_key, text)
        try:
            if not path.is_file():
                return None
            # a copy: the mapping would change with what another process does to the file
            embedding = open_checkpoint(path).read(_TENSOR).clone()
        except (CheckpointError, OSError) as error:
            logger.info("a kept embedding is made anew: %s", error)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used now, so removed last
        return embedding

    def put(self, model_key: str, text: str, embedding: Tensor) -> None:
        """Keep an embedding in place of what `get` finds for the same arguments."""
        path = self.path(model_key, text)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save({_TENSOR: embedding}, temporary)
            ages: list[tuple[int, Path]] = []
            for entry in self.folder.glob("*.safetensors"):
                with contextlib.suppress(OSError):  # removed by another process
                    ages.append((entry.stat().st_mtime_ns, entry))
            for _, entry in sorted(ages)[: max(0, len(ages) - self.largest)]:
                entry.unlink(missing_ok=True)
        except OSError as error:
            logger.info("an embedding is not kept: %s", error)
