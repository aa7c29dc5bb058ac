"""What to download for a model: repositories, the files of each that are read, and where they go.

The released scripts fetch whole repositories, of T5 the weights for two frameworks (90 GB) and of
Pixtral a form that they convert; here only what this package reads. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from worldline.catalog import (
    ENTRIES,
    FLOW_MODELS,
    FLOW_TOKENIZER,
    Entry,
    FlowModel,
    find,
    is_bundled,
)
from worldline.errors import DownloadError, InputError, did_you_mean
from worldline.hub import RemoteFile, chosen

AUTOREGRESSIVE_SIZES = ("4B", "5B", "12B", "13B")
DIFFUSION_SIZES = ("7B", "14B")
DIFFUSION_TYPES = ("Text2World", "Video2World")
SAMPLE_TYPES = (
    "Text2World-Sample-AV-Multiview",
    "Video2World-Sample-AV-Multiview",
    "SingleToMultiView-Sample-AV",
)
TOKENIZER_TYPES = tuple(
    entry.name.removeprefix("Cosmos-Tokenize1-")
    for entry in ENTRIES
    if entry.name.startswith("Cosmos-Tokenize1-")
)
GROUPS = ("autoregressive", "diffusion", "predict2.5", "tokenizers", "guardrails")

# families of parts that a user may do without, by the flags of the commands that run the models
OPTIONAL = {
    "disable_guardrail": "guardrail",
    "disable_prompt_upsampler": "prompt upsampler",
    "disable_diffusion_decoder": "diffusion decoder",
}

_SETTINGS = ("config.json", "LICENSE*")
_TRANSFORMERS = ("*.json", "*.jinja", "tokenizer*", "*.model", "LICENSE*")


@dataclass(frozen=True)
class Source:
    """What is fetched of one repository.

    Attributes:
        repository: "owner/name".
        folder: where it goes, below the checkpoint folder.
        needed: sets of patterns in order of preference; of the first that is there all is fetched.
        beside: patterns of files that are fetched where they are there.
        never: patterns of files that are not.
        revision: commit; None is the newest.
    """

    repository: str
    folder: str
    needed: tuple[tuple[str, ...], ...]
    beside: tuple[str, ...] = _SETTINGS
    never: tuple[str, ...] = ()
    revision: str | None = None

    def choose(self, files: Sequence[RemoteFile]) -> list[RemoteFile]:
        """Return what to fetch of all that the repository holds.

        Raises:
            DownloadError: it does not hold what is needed.
        """
        refused = {file.name for file in chosen(files, self.never)}
        left = [file for file in files if file.name not in refused]
        for patterns in self.needed:
            if all(chosen(left, [pattern]) for pattern in patterns):
                return chosen(left, [*patterns, *self.beside])
        wanted = " or ".join(" and ".join(patterns) for patterns in self.needed)
        raise DownloadError(f"{self.repository} holds no {wanted}")


_TOKENIZER = (("encoder.jit", "decoder.jit"), ("autoencoder.jit",))
_SAFETENSORS = (("*.safetensors",),)
_GUARDRAIL_PARTS = ("blocklist/*", "video_content_safety_filter/*", "face_blur_filter/*")
_TWICE = ("*/blobs/*",)  # of a hub cache inside of a repository: the snapshots hold the same

# names of catalog entries whose files are not those of a transformer in a repository of NVIDIA's
_SOURCES = {
    "Cosmos-Predict1-7B-Decoder-DV8x16x16ToCV8x8x8-720p": Source(
        "", "", (("model.pt", "aux_vars.pt"),)
    ),
    "Cosmos-Guardrail1": Source(
        "nvidia/Cosmos-Guardrail1",
        "nvidia/Cosmos-Guardrail1",
        (_GUARDRAIL_PARTS,),
        never=_TWICE,
    ),
    "Llama-Guard-3-8B": Source(
        "meta-llama/Llama-Guard-3-8B",
        "meta-llama/Llama-Guard-3-8B",
        _SAFETENSORS,
        _TRANSFORMERS,
        revision="7327bd9f6efbbe6101dc6cc4736302b3cbb6e425",
    ),
    "Qwen3Guard-Gen-0.6B": Source(
        "Qwen/Qwen3Guard-Gen-0.6B", "Qwen/Qwen3Guard-Gen-0.6B", _SAFETENSORS, _TRANSFORMERS
    ),
    "Cosmos-UpsamplePrompt1-12B-Text2World": Source(
        "", "", (("model.pt",), *_SAFETENSORS), _TRANSFORMERS
    ),
    "Pixtral-12B": Source(
        "mistral-community/pixtral-12b", "Pixtral-12B", _SAFETENSORS, _TRANSFORMERS
    ),
    "google-t5/t5-11b": Source(
        "google-t5/t5-11b",
        "google-t5/t5-11b",
        (("model*.safetensors",), ("pytorch_model*.bin",)),
        ("*.json", "spiece.model", "LICENSE*"),
    ),
    "Cosmos-Reason1-7B": Source(
        "nvidia/Cosmos-Reason1-7B",
        "nvidia/Cosmos-Reason1-7B",
        _SAFETENSORS,
        (*_TRANSFORMERS, "*.txt"),
        revision="3210bec0495fdc7a8d3dbb8d58da5711eab4b423",
    ),
}


def source_of(entry: Entry, generation: str = "Predict1", flow: FlowModel | None = None) -> Source:
    """Return where an entry of the catalog is published, and what of it is fetched.

    Args:
        entry: of the catalog.
        generation: of Cosmos 1.0 the repository is taken that has its name, where there is one.
        flow: which model of Predict2.5 it is; None for the tokenizer alone.
    """
    own = next((name for name in entry.folders if name.startswith("Cosmos-1.0-")), None)
    known = _SOURCES.get(entry.name)
    if generation == "1.0" and own is not None:
        if entry.name == "Cosmos-Guardrail1":
            needed: tuple[tuple[str, ...], ...] = ((*_GUARDRAIL_PARTS, "aegis/*"),)
            return Source(f"nvidia/{own}", own, needed, never=_TWICE)
        name = own
    elif known is not None and known.repository:
        return known
    else:
        name = entry.name
    repository = f"nvidia/{name}"
    if known is not None:
        return Source(repository, name, known.needed, known.beside)
    if entry.family.endswith("tokenizer"):
        return Source(
            repository, name, _TOKENIZER, ("mean_std.pt", "image_mean_std.pt", *_SETTINGS)
        )
    if entry.family == "flow":
        if flow is None:
            return Source(FLOW_TOKENIZER[0], name, (("tokenizer.pth",),), (), (), FLOW_TOKENIZER[1])
        return Source(repository, name, ((flow.file,),), revision=flow.revision)
    return Source(repository, name, (("model.pt",), ("model*.safetensors",)))


def sources(
    models: Iterable[str], generation: str | None = None, without: Collection[str] = ()
) -> list[Source]:
    """Return what models need, each repository once, the models themselves first.

    Args:
        models: names of the catalog, of either generation, or of `FLOW_MODELS`.
        generation: of the parts; None is that of each name.
        without: families of parts that are left out, values of `OPTIONAL`.

    Raises:
        InputError: a name is not known.
    """
    found: dict[tuple[str, str], Source] = {}

    def add(source: Source) -> None:
        found.setdefault((source.repository, str(source.needed)), source)

    named = [_look_up(model) for model in models]
    chosen_of = [
        generation or ("1.0" if "Cosmos-1.0-" in model else "Predict1") for model, _, _ in named
    ]
    for (_, entry, flow), of in zip(named, chosen_of, strict=True):
        add(source_of(entry, of, flow))
    for (_, entry, _), of in zip(named, chosen_of, strict=True):
        if entry.family == "flow":
            smaller = find(FLOW_TOKENIZER[0])
            assert smaller is not None
            add(source_of(smaller))
        for name in needs(entry, of, without):
            part = find(name)
            assert part is not None  # a test compares
            add(source_of(part, of))
    return list(found.values())


def needs(entry: Entry, generation: str = "Predict1", without: Collection[str] = ()) -> list[str]:
    """Return the names of the parts that a model needs beside itself, and theirs."""
    names: list[str] = []
    for name in entry.needs:
        part = find(name)
        assert part is not None  # a test compares
        # Cosmos 1.0 keeps Aegis with its other guardrails
        if part.family in without or (generation == "1.0" and name == "Llama-Guard-3-8B"):
            continue
        names += [name, *needs(part, generation, without)]
    return list(dict.fromkeys(names))


def _look_up(model: str) -> tuple[str, Entry, FlowModel | None]:
    """Return a model's name, its entry, and which one of Predict2.5 it is.

    Of a repository of Predict2.5 that is its first model; another is named by its kind behind it.

    Raises:
        InputError: it is not known.
    """
    flows = {
        name: flow
        for flow in FLOW_MODELS[::-1]
        for name in (flow.repository, f"{flow.repository}/{flow.name.partition('/')[2]}", flow.name)
    }
    flow = flows.get(model) or flows.get(f"nvidia/{model}")
    name = flow.repository if flow else model
    entry = find(name) or find(name.removeprefix("nvidia/"))
    if entry is not None and "_post-trained" in name:
        raise InputError(f"{model} is not released: it is what post-training makes of {entry.name}")
    if entry is None and is_bundled(model):
        raise InputError(f"{model}: models of that name come with the package; nothing is fetched")
    if entry is None:
        known = [*GROUPS, *flows, *(folder for each in ENTRIES for folder in each.folders)]
        hint = did_you_mean(model, known, 0.6) or "; `worldline models` lists them"
        raise InputError(f"no model {model} is known{hint}")
    return name, entry, flow


def select(
    models: Sequence[str],
    sizes: Sequence[str],
    types: Sequence[str],
    tokenizers: Sequence[str],
    *,
    generation: str | None = None,
) -> list[str]:
    """Return the names of models, from names, groups, and the flags of the released scripts.

    Args:
        models: names, and groups of `GROUPS`.
        sizes: of autoregressive and diffusion models; none given is all of a group.
        types: of diffusion models; none given is Text2World and Video2World.
        tokenizers: types of tokenizers; none given is all of the group.
        generation: whose names are meant.

    Raises:
        InputError: nothing is asked for, or a size or type goes with nothing that is.
    """
    groups = {name for name in models if name in GROUPS}
    found = [name for name in models if name not in GROUPS]
    of_tokens = [size for size in sizes if size in AUTOREGRESSIVE_SIZES]
    of_noise = [size for size in sizes if size in DIFFUSION_SIZES]
    if not models and not sizes and not types and not tokenizers:
        raise InputError(
            "nothing is named: give a model, such as Cosmos-Predict1-4B, one of "
            f"{', '.join(GROUPS)}, or --model_sizes; `worldline models` lists them"
        )
    if types and of_tokens and not of_noise:
        raise InputError(
            f"--model_types {' '.join(types)} is of diffusion models, which have the sizes "
            f"{' and '.join(DIFFUSION_SIZES)}, not {' '.join(of_tokens)}"
        )
    if of_tokens or "autoregressive" in groups:
        found += [autoregressive_name(size) for size in of_tokens or AUTOREGRESSIVE_SIZES]
    if of_noise or types or "diffusion" in groups:
        known = {folder for entry in ENTRIES for folder in entry.folders}
        wanted = [
            f"Cosmos-Predict1-{size}-{kind}"
            for size in of_noise or DIFFUSION_SIZES
            for kind in types or DIFFUSION_TYPES
        ]
        # the samples are released in one size alone
        found += [name for name in wanted if name in known]
        if not any(name in known for name in wanted):
            raise InputError(f"there is no {' or '.join(wanted)}")
    if "predict2.5" in groups:
        found += [model.name for model in FLOW_MODELS]
    if tokenizers or "tokenizers" in groups:
        found += [f"Cosmos-Tokenize1-{kind}" for kind in tokenizers or TOKENIZER_TYPES]
    if "guardrails" in groups:
        found += ["Cosmos-Guardrail1", *(() if generation == "1.0" else ("Llama-Guard-3-8B",))]
    return list(dict.fromkeys(found))


def autoregressive_name(size: str) -> str:
    """Return the name of the model of a size; 5B and 13B take prompts."""
    return f"Cosmos-Predict1-{size}" + ("-Video2World" if size in ("5B", "13B") else "")


def target(source: Source, file: RemoteFile, checkpoint_dir: Path) -> Path:
    """Return where a file belongs."""
    return checkpoint_dir / source.folder / file.name
