"""One record for a model family, and what is opened and loaded of it; needs no torch.

A family is a folder of `worldline.families`: `request.py` (its requests, load options and
commands, imported for --help) and `family.py` (`FAMILY`, imported when a model is opened).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from worldline.errors import CheckpointError, option, printable
from worldline.request import LoadOptions, Options, Request

if TYPE_CHECKING:
    import torch

    from worldline.locate import Place
    from worldline.memory import Stage
    from worldline.parallel.mesh import Layout, Mesh
    from worldline.report import Recorder
    from worldline.shapes import VideoShape
    from worldline.step import Step
    from worldline.video.read import Clip
    from worldline.video.span import Span

# name -> package; the first whose SIGNATURE ends the name of one of a transformer's tensors
FAMILIES = {
    "predict2.5": "worldline.families.predict2_5",
    "diffusion": "worldline.families.diffusion",
    "autoregressive": "worldline.families.autoregressive",
}


class OpenedPart(Protocol):
    """One part of a model on disk: headers are checked, tensors are not read."""

    @property
    def files(self) -> Sequence[Path]:
        """Every file that decides what the part computes."""

    @property
    def notes(self) -> Sequence[str]:
        """What was done to the names and values of its tensors."""

    def nbytes(self, compute: Compute) -> int:
        """Bytes of its weights."""

    def streamed_nbytes(self, compute: Compute) -> int | None:
        """Bytes on the device while it is offloaded block by block; None where it moves whole."""

    def load(self, compute: Compute, *, offload: bool) -> Any:
        """The part on its device, or waiting in host memory."""


@dataclass(frozen=True)
class Compute:
    """Where and in which precision a model runs."""

    device: torch.device
    dtype: torch.dtype
    text_dtype: torch.dtype  # the text encoder overflows in float16
    fused: bool  # Triton kernels between the layers
    batch_size: int = 1  # clips computed together
    sharded: bool = False  # whether processes of a video hold rows of blocks, gathered when used
    # processes that compute together
    mesh: Mesh = field(default_factory=lambda: import_module("worldline.parallel.mesh").ALONE)


@dataclass(frozen=True)
class Part:
    """One part of a family's models: "transformer", "tokenizer" (of video), "text", "decoder".

    Attributes:
        flag: load option that offloads it.
        open: opens it beside the parts that are opened already; None where the model has none.
        option: load option that names another folder.
        optional: whether a model opens without it: a request that needs it is refused instead.
        disable: load option that leaves it out.
        split: whether all processes that make a video together compute by it, or the first alone.
    """

    name: str
    flag: str
    open: Callable[[Opened], OpenedPart | None]
    option: str = ""
    optional: bool = False
    disable: str = ""
    split: bool = True


@dataclass(frozen=True)
class Item:
    """One video that a command is asked for.

    Attributes:
        label: short name for progress.
        place: where it is described, for messages; "" for the command line.
        stated: fields of the request.
        input: file to continue, or a span of one.
        names: field -> the name that it has where it is described.
        sample: its description, for the report.
        sources: files that describe it.
        request: its checked request; None before the model is open.
    """

    label: str
    place: str
    stated: Mapping[str, Any]
    input: Path | Span | None
    kind: Literal["image", "video"] | None
    output: Path
    names: Mapping[str, str] = field(default_factory=dict)
    sample: Mapping[str, Any] | None = None
    sources: tuple[Path, ...] = ()
    request: Any = None

    def __str__(self) -> str:
        return printable(self.label)

    def field(self, name: str) -> str:
        """What an error calls a field."""
        name = self.names.get(name, name)
        if name.startswith("--") or not self.place:
            return f"--{name.removeprefix('--')}"
        return f"{self.place}, {name}"


class Reader(Protocol):
    """Reader of a command's inputs, with options of its own."""

    flags: type[Options]

    def read(self, flags: Any, stated: Mapping[str, Any]) -> tuple[list[Item], list[str]]:
        """Every video asked for, with the typed fields of requests; what is wrong with others.

        Raises:
            InputError: nothing can be read.
        """


@dataclass(frozen=True)
class Command:
    """One command of a family: a released one, or `generate` for one model.

    Attributes:
        name: words after `worldline`; of a released one the first is the family's name.
        model: flag that names the model; "" where it is `default_model`.
        reads: "module:attribute" of its `Reader`.
        hidden: fields that the command has no flag for.
        defaults: fields whose default differs from the class's.
        negatable: whether boolean flags have a --no_… form.
    """

    name: str
    help: str
    model: str
    default_model: str
    reads: str
    hidden: frozenset[str] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    negatable: bool = False


@dataclass(frozen=True)
class Family:
    """What common code asks of a family; its request.py holds the rest.

    Attributes:
        parts: cheapest to offload first; opened from the last to the first.
        agree: (part, attribute of its config, part, attribute) that must be equal.
        check: refuses what opened files cannot do; fills in what a request leaves to the model.
        stages: memory of a request, stage by stage, beside the weights.
        generate: a request -> steps, the last of which carries all frames; None where
            generate_together takes its place.
        presets: catalog entry -> parts of a released model, for its memory plan.
        guardrails: opened model -> name of its set of guardrails.
        unused: fields of a request without effect -> why.
        report: family's own entries of a video's report.
        notes: lines to log about an allowed request.
        generate_together: several clips in step; None computes them one after another.
        max_batch_size: clips that can be computed in step; None where any number can, but none is
            faster than another.
        holds_batch: whether clips in step hold all their frames at once, or one after another.
        upsampler: opened model -> whether its prompt upsampler describes clips, and its folders.
        read_settings: reads config.json; by default whatever it holds.
        prepare: what runs beside the reading of weights, such as compiling kernels.
        layout: (opened model, requests, number of processes) -> how they make one video together;
            an `InputError` names the numbers that can. By default each computes the whole.
    """

    name: str
    request: type[Request]
    options: type[LoadOptions]
    parts: tuple[Part, ...]
    agree: tuple[tuple[str, str, str, str], ...]
    check: Callable[[Opened, Any], Any]
    stages: Callable[[Opened, Any, Compute], Iterator[Stage]]
    guardrails: Callable[[Opened], str]
    generate: Callable[[Parts, Clip | None, Any, Recorder], Generator[Step, None, None]] | None = (
        None
    )
    presets: Callable[[Any], dict[str, OpenedPart]] = lambda entry: {}
    video: Callable[[Opened, Any], VideoShape] = lambda opened, request: request.video
    unused: Callable[[Opened, Any], dict[str, str]] = lambda opened, request: request.unused()
    report: Callable[[Parts, Any, Recorder], dict[str, Any]] = lambda parts, request, recorder: {}
    notes: Callable[[Opened, Any], list[str]] = lambda opened, request: []
    generate_together: Callable[..., Iterator[tuple[int, Step]]] | None = None
    max_batch_size: Callable[[Opened, Compute], int | None] = lambda opened, compute: 1
    holds_batch: Callable[[Opened, Any], bool] = lambda opened, request: True
    upsampler: Callable[[Opened], Any] | None = None
    prepare: Callable[[Opened, Compute], AbstractContextManager[None]] = lambda opened, compute: (
        nullcontext()
    )
    read_settings: Callable[[Path], dict[str, Any]] | None = None
    layout: Callable[[Opened, Sequence[Any], int], Layout] = lambda opened, requests, count: (
        import_module("worldline.parallel.mesh").Layout(cp=count)
    )


def load_family(name: str) -> Family:
    """The record of a family; imports torch."""
    family: Family = import_module(f"{FAMILIES[name]}.family").FAMILY
    return family


def requests_of(name: str) -> Any:
    """A family's request.py: SIGNATURE, REQUEST, OPTIONS, COMMANDS, HELP of a group; no torch."""
    return import_module(f"{FAMILIES[name]}.request")


@dataclass(frozen=True)
class Opened:
    """A model on disk: headers are checked, tensors are not read.

    Attributes:
        name: for messages and reports.
        source: tensors of its transformer.
        settings: its config.json.
        defaults: fields of requests in it.
        missing: optional parts that did not open -> why.
    """

    family: Family
    name: str
    place: Place
    options: Any
    source: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.parts[name]

    def get(self, name: str) -> Any | None:
        """An opened part; None where the model has none."""
        return self.parts.get(name)

    @property
    def config(self) -> Any:
        """Configuration of the transformer."""
        return self.parts["transformer"].config

    @property
    def folder(self) -> Path:
        """Folder of the transformer; in diffusers' layout the one around `transformer/`."""
        return self.place.folder

    @property
    def text_length(self) -> int:
        """Rows of a text embedding."""
        from worldline.text.encoder import MAX_LENGTH

        return self.parts["text"].max_length if "text" in self.parts else MAX_LENGTH

    @property
    def encoder_unused(self) -> dict[str, str]:
        """The text encoder and its options, where every prompt comes as an embedding."""
        options = [name for name in type(self.options).model_fields if "text_encoder" in name]
        return dict.fromkeys(("text", *options), "embeddings are given")

    def with_part(self, name: str, part: Any) -> Opened:
        """The same with one more part."""
        return replace(self, parts={**self.parts, name: part})

    def require(self, name: str, purpose: str) -> Any:
        """An optional part that a request needs.

        Raises:
            CheckpointError: it is missing.
        """
        if name not in self.parts:
            reason = self.missing.get(name, f"{self.name} has no {name}")
            [folder] = (part.option for part in self.family.parts if part.name == name)
            message = f"{reason} (needed for {purpose}); {option(folder)} names another"
            raise CheckpointError(message)
        return self.parts[name]


@dataclass(frozen=True)
class Parts:
    """The loaded parts of a model, each on its device or waiting in host memory."""

    opened: Opened
    compute: Compute
    loaded: Mapping[str, Any]

    @property
    def transformer(self) -> Any:
        return self.loaded["transformer"]

    @property
    def tokenizer(self) -> Any:
        return self.loaded["tokenizer"]

    @property
    def text(self) -> Any | None:
        """The text encoder; None where the model has none."""
        return self.loaded.get("text")

    @property
    def decoder(self) -> Any | None:
        """The diffusion decoder; None where the tokenizer decodes."""
        return self.loaded.get("decoder")

    @property
    def device(self) -> torch.device:
        return self.compute.device

    @property
    def config(self) -> Any:
        """Configuration of the transformer."""
        return self.opened.config

    @cached_property
    def colours(self) -> Any:
        """Linear map from latents to colours, for previews; first read with the tokenizer there."""
        from worldline.nn.pieces import fit_colours

        return self.compute.mesh.video.once(lambda: fit_colours(self.tokenizer.module))
