"""What to download for a model: repositories, the files of each that are read, and where they go.

The released scripts fetch whole repositories, of T5 the weights for two frameworks (90 GB) and of
Pixtral a form that they convert; `catalog.toml` lists what this package reads. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

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
from worldline.hub import RemoteFile, matching

_TOKENIZER_PREFIX = "Cosmos-Tokenize1-"

AUTOREGRESSIVE_SIZES = ("4B", "5B", "12B", "13B")
DIFFUSION_SIZES = ("7B", "14B")
DIFFUSION_TYPES = ("Text2World", "Video2World")
SAMPLE_TYPES = (
    "Text2World-Sample-AV-Multiview",
    "Video2World-Sample-AV-Multiview",
    "SingleToMultiView-Sample-AV",
)
TOKENIZER_TYPES = tuple(
    entry.name.removeprefix(_TOKENIZER_PREFIX)
    for entry in ENTRIES
    if entry.name.startswith(_TOKENIZER_PREFIX)
)
GROUPS = ("autoregressive", "diffusion", "predict2.5", "tokenizers", "guardrails")

# Families of optional parts, by the flags that turn them off in the commands that run the models.
OPTIONAL = {
    "disable_guardrail": "guardrail",
    "disable_prompt_upsampler": "prompt upsampler",
    "disable_diffusion_decoder": "diffusion decoder",
}


def choose(entry: Entry, files: Sequence[RemoteFile]) -> list[RemoteFile]:
    """Files to download for an entry, of all that its repository holds.

    Raises:
        DownloadError: it does not hold what is needed.
    """
    never = matching(files, entry.fetch_never)
    files = [file for file in files if file not in never]
    for patterns in entry.fetch:
        if all(matching(files, [pattern]) for pattern in patterns):
            return matching(files, [*patterns, *entry.fetch_beside])
    wanted = " or ".join(" and ".join(patterns) for patterns in entry.fetch)
    raise DownloadError(f"{entry.repository} holds no {wanted}")


def sources(
    models: Iterable[str], generation: str | None = None, without: Collection[str] = ()
) -> list[Entry]:
    """Entries of all that models need, each repository once, the models themselves first.

    Args:
        models: names of the catalog, of either generation, or of `FLOW_MODELS`.
        generation: generation of the parts; None is that of each name.
        without: families of parts that are left out, values of `OPTIONAL`.

    Raises:
        InputError: a name is not known.
    """
    own: list[Entry] = []
    parts: list[Entry] = []
    for name in models:
        entry, model = _look_up(name)
        if model is None:
            own.append(entry)
        else:  # the entry's own files are the tokenizer
            beside = ("config.json", "LICENSE*")
            layouts = ((model.file,),)
            own.append(replace(entry, fetch=layouts, fetch_beside=beside, revision=model.revision))
            parts.append(_part(FLOW_TOKENIZER[0]))
        era = generation or ("1.0" if "Cosmos-1.0-" in name else "Predict1")
        own[-1] = _of_generation(own[-1], era)
        parts += [_of_generation(_part(part), era) for part in needs(entry, era, without)]
    return list(dict.fromkeys(own + parts))


def _of_generation(entry: Entry, generation: str) -> Entry:
    """The entry with the repository of Cosmos 1.0, if that is asked for and has one."""
    first = next((name for name in entry.folders if name.startswith("Cosmos-1.0-")), None)
    if generation != "1.0" or first is None:
        return entry
    fetch = entry.fetch_1_0 or entry.fetch
    return replace(entry, repository=f"nvidia/{first}", destination=first, fetch=fetch)


def needs(entry: Entry, generation: str = "Predict1", without: Collection[str] = ()) -> list[str]:
    """Names of the parts that a model needs beside itself, and theirs."""
    names: list[str] = []
    for name in entry.needs:
        part = _part(name)
        # Cosmos 1.0 keeps Aegis with its other guardrails.
        if part.family not in without and (generation != "1.0" or name != "Llama-Guard-3-8B"):
            names += [name, *needs(part, generation, without)]
    return list(dict.fromkeys(names))


def _part(name: str) -> Entry:
    entry = find(name)
    assert entry is not None, name  # a test compares
    return entry


def _look_up(name: str) -> tuple[Entry, FlowModel | None]:
    """Entry of a name; and its model of Predict2.5, for a repository the first one.

    Raises:
        InputError: it is not known.
    """
    models: dict[str, FlowModel] = {}
    for model in FLOW_MODELS:
        whole = f"{model.repository}/{model.name.partition('/')[2]}"
        for alias in (model.name, whole, model.repository):
            models.setdefault(alias, model)
            models.setdefault(alias.removeprefix("nvidia/"), model)
    if name in models:
        return _part(models[name].repository), models[name]
    entry = find(name) or find(name.removeprefix("nvidia/"))
    if entry is not None and "_post-trained" in name:
        raise InputError(f"{name} is not released: it is what post-training makes of {entry.name}")
    if entry is None and is_bundled(name):
        raise InputError(f"{name}: models of that name come with the package; nothing is fetched")
    if entry is None:
        known = [*GROUPS, *models, *(folder for each in ENTRIES for folder in each.folders)]
        hint = did_you_mean(name, known, 0.6) or "; `worldline models` lists them"
        raise InputError(f"no model {name} is known{hint}")
    return entry, None


def select(
    models: Sequence[str],
    sizes: Sequence[str],
    types: Sequence[str],
    tokenizers: Sequence[str],
    *,
    generation: str | None = None,
) -> list[str]:
    """Names of models, from names, groups, and the flags of the released scripts.

    Args:
        models: names, and groups of `GROUPS`.
        sizes: sizes of autoregressive and diffusion models; empty for all of a group.
        types: types of diffusion models; empty for Text2World and Video2World.
        tokenizers: types of tokenizers; empty for all of the group.
        generation: generation of the names.

    Raises:
        InputError: nothing is named, or a size or type fits nothing.
    """
    if not (models or sizes or types or tokenizers):
        raise InputError(
            "nothing is named: give a model, such as Cosmos-Predict1-4B, one of "
            f"{', '.join(GROUPS)}, or --model_sizes; `worldline models` lists them"
        )
    groups = {name for name in models if name in GROUPS}
    names = [name for name in models if name not in GROUPS]
    autoregressive = [size for size in sizes if size in AUTOREGRESSIVE_SIZES]
    diffusion = [size for size in sizes if size in DIFFUSION_SIZES]
    if types and autoregressive and not diffusion:
        raise InputError(
            f"--model_types {' '.join(types)} is of diffusion models, which have the sizes "
            f"{' and '.join(DIFFUSION_SIZES)}, not {' '.join(autoregressive)}"
        )
    if autoregressive or "autoregressive" in groups:
        prompted = ("5B", "13B")
        names += [
            f"Cosmos-Predict1-{size}{'-Video2World' if size in prompted else ''}"
            for size in autoregressive or AUTOREGRESSIVE_SIZES
        ]
    if diffusion or types or "diffusion" in groups:
        wanted = [
            f"Cosmos-Predict1-{size}-{kind}"
            for size in diffusion or DIFFUSION_SIZES
            for kind in types or DIFFUSION_TYPES
        ]
        known = [name for name in wanted if find(name)]  # the samples have one size
        if not known:
            raise InputError(f"there is no {' or '.join(wanted)}")
        names += known
    if "predict2.5" in groups:
        names += [model.name for model in FLOW_MODELS]
    if tokenizers or "tokenizers" in groups:
        names += [_TOKENIZER_PREFIX + kind for kind in tokenizers or TOKENIZER_TYPES]
    if "guardrails" in groups:
        names += ["Cosmos-Guardrail1", *(() if generation == "1.0" else ("Llama-Guard-3-8B",))]
    return list(dict.fromkeys(names))
