"""LoRA adapters (arXiv 2106.09685) in files of every form, read and matched with a network.

A matrix W of a network becomes W + scale * up @ down, with down (rank, columns) and up (rows,
rank). Forms differ in names and in where the scale stands. Source: huggingface/peft `utils/
save_and_load.py`; huggingface/diffusers `loaders/peft.py`; kohya-ss/sd-scripts `networks/lora.py`;
nvidia-cosmos/cosmos-predict1 `diffusion/training/utils/peft`; nvidia-cosmos/cosmos-predict2.5
`_src/predict2/models/text2world_model_rectified_flow.py`.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from worldline.documents import parse_json, read_json
from worldline.errors import CheckpointError
from worldline.weights.checkpoint import Checkpoint, LowRank, content_digest
from worldline.weights.keymap import KeyMap
from worldline.weights.names import is_averaged, with_dots

ADAPTER_FILES = tuple(
    f"{name}{suffix}"
    for name in ("adapter_model", "pytorch_lora_weights")
    for suffix in (".safetensors", ".bin")
)
CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # of diffusers, in the header
# ends of names by which a file of adapters is known
SIGNATURE = (
    *(f".lora_A{adapter}.weight" for adapter in ("", ".default")),
    *(f"{end}.weight" for end in (".lora_down", ".lora.down", "_lora.net.0")),
)
_HALF = re.compile(
    r"(.+?)(?:\.lora_(A|B|down|up)(?:\.\w+)?|[._]lora\.(down|up)|_lora\.net\.(0|1))\.weight"
)
_ALPHA = re.compile(r"(.+?)(?:\.lora)?\.alpha")
_DOWN = {"A", "down", "0"}
# kinds of adapters that are no plain sum, by parts of names
_OTHER_KINDS = {
    "DoRA": r"dora_scale|lora_magnitude_vector",
    "LoHa or LoKr": r"[._](hada|lokr)_",
    "for embeddings or convolutions": r"lora_(embedding|mid)",
}
# settings by which an adapter is more than a sum
_NO_SUM = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "layer_replication"),
    *("alora_invocation_tokens", "kasa_config", "monteclora_config", "velora_config"),
)
# starts that change the weights themselves, which the file does not hold
_CHANGED_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# what may stand before the name of a layer: with dots, and in kohya's form
_OUTER = re.compile(r"([a-z]+_)?model|transformer|unet|net|dit|state_dict")
_FLAT_OUTER = re.compile(r"(lora_(unet|transformer|dit|net|model)|lycoris)(_net|_model)?|")
_MOST_NAMES = 3  # of each kind in one message


class Config(BaseModel):
    """Scale of an adapter, as PEFT and diffusers state it."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    peft_type: str = "LORA"
    r: Annotated[int, Field(ge=1)] | None = None
    lora_alpha: float | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    init_lora_weights: str | bool = True

    @classmethod
    def read(cls, source: Checkpoint) -> tuple[Self | None, tuple[Path, ...]]:
        """What is stated in the header or, for PEFT, beside the file; the file that was read.

        Raises:
            CheckpointError: it is damaged, or of another kind of adapter.
        """
        path, files = source.path, tuple[Path, ...]()
        try:
            if METADATA in source.metadata:
                stated = parse_json(source.metadata[METADATA])
            elif (path := source.path.with_name(CONFIG)).is_file():
                stated, files = read_json(path), (path,)
            else:
                return None, ()
            # a pipeline's has the name of its part before each key
            stated = {name.removeprefix("transformer."): stated[name] for name in stated}
            config = cls.model_validate({k: v for k, v in stated.items() if v is not None})
        except ValidationError as error:
            wrong = error.errors()[0]
            where, value = ".".join(map(str, wrong["loc"])), wrong["input"]
            raise CheckpointError(f"{path}: {where} is {value!r:.80}; {wrong['msg']}") from None
        except (ValueError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{path}: damaged settings of an adapter: {error}") from error
        odd = [name for name in _NO_SUM if stated.get(name)]
        if config.peft_type != "LORA":
            odd.append(f"peft_type {config.peft_type}")
        if str(config.init_lora_weights).lower().startswith(_CHANGED_WEIGHTS):
            odd.append(f"init_lora_weights {config.init_lora_weights}")
        if odd:
            raise CheckpointError(
                f"{path}: with {odd[0]} it is no plain LoRA; merge it by the library that made it"
            )
        return config, files

    def scale(self, stem: str, rank: int, path: Path) -> float | None:
        """Factor of a layer's product; None where none is stated."""

        def of(patterns: Mapping[str, Any], default: Any) -> Any:
            found = (p for p in patterns if re.match(rf"(.*\.)?({p})$", stem))
            return patterns.get(next(found, ""), default)

        try:
            stated, alpha = of(self.rank_pattern, self.r), of(self.alpha_pattern, self.lora_alpha)
        except re.error as error:
            raise CheckpointError(f"{path}: a pattern of {CONFIG} is wrong: {error}") from error
        if stated not in (None, rank):
            raise CheckpointError(f"{path}: {stem} has rank {rank}, {CONFIG} states {stated}")
        if alpha is None:
            return None
        return float(alpha) / (rank**0.5 if self.use_rslora else rank)


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk that fits a network: headers are checked, its halves are not read.

    Attributes:
        updates: our name of a matrix -> what is added to it.
        files: that decide what is added.
        scale: the user's factor, which those of `updates` contain.
        notes: what is not stated in the file, or not used of it.
        has_scale: whether the file states the scale of all products.
    """

    path: Path
    updates: Mapping[str, LowRank]
    files: tuple[Path, ...]
    scale: float
    notes: tuple[str, ...] = ()
    has_scale: bool = True

    @property
    def factors(self) -> list[float]:
        """Distinct factors of all products, the user's included."""
        return sorted({update.scale for update in self.updates.values()})

    @cached_property
    def digest(self) -> str:
        """Hash of its scaled numbers, all of which are read: a whole checkpoint hides them."""
        sha = hashlib.sha256()
        for ours, update in sorted(self.updates.items()):
            halves = {name: half.read() for name, half in zip("AB", update.halves, strict=True)}
            sha.update(content_digest(halves, {ours: update.scale}).encode())
        return sha.hexdigest()

    def report(self) -> dict[str, Any]:
        """Entry of a video's report."""
        ranks = sorted({update.down.meta.shape[0] for update in self.updates.values()})
        facts = {"file": str(self.path), "scale": self.scale, "factors": self.factors}
        return {**facts, "ranks": ranks, "matrices": len(self.updates), "notes": list(self.notes)}

    def __str__(self) -> str:
        ranks = "/".join(map(str, self.report()["ranks"]))
        scales = "/".join(f"{scale:g}" for scale in self.factors[:3])
        facts = f"rank {ranks}, scale {scales}, {len(self.updates):,} matrices"
        return "; ".join((f"LoRA {self.path}: {facts}", *self.notes))


def layer_of(name: str) -> str:
    """Name of the layer that a tensor of an adapter is for; "" for other tensors."""
    found = _HALF.fullmatch(with_dots(name))
    return found[1] if found else ""


def target_names(
    layouts: Iterable[KeyMap], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Names that files have for the layers of a network, with dots and with `_` -> our matrix."""
    names: dict[str, str] = {}
    for keys, (ours, shape) in product(layouts, shapes.items()):
        stem, end, _ = (keys.find(ours) or "").rpartition(".weight")
        if end and len(shape) == 2:
            # NVIDIA's trainer names a layer without its place in a list
            for name in (stem, stem.removesuffix(".0")):
                names.setdefault(name, ours)
                names.setdefault(name.replace(".", "_"), ours)
    return names


def locate(stem: str, names: Mapping[str, str]) -> tuple[str, str]:
    """What stands before the name of a layer, and our name of its matrix; "" for unknown ones."""
    separator = "." if "." in stem else "_"
    words = stem.split(separator)
    for count in range(len(words)):
        if ours := names.get(separator.join(words[count:])):
            outer = separator.join(words[:count])
            if separator == "_":
                known = bool(_FLAT_OUTER.fullmatch(outer))
            else:
                known = all(_OUTER.fullmatch(word) or is_averaged(word) for word in words[:count])
            return outer, ours if known else ""
    return "", ""


class _Half(NamedTuple):
    """One half of a product in a file: its name, its layer's, what stands before that, ours."""

    name: str
    layer: str
    outer: str
    ours: str
    down: bool


def read_adapter(
    source: Checkpoint,
    layouts: Iterable[KeyMap],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    kind: str,
    scale: float = 1.0,
) -> Adapter:
    """Match an opened file of an adapter with a network; strict.

    The averaged one of several sets is taken. A whole checkpoint has its own weights beside, which
    are not used.

    Args:
        source: its tensors; of a checkpoint with weights, these too.
        layouts: names of the network in files.
        shapes: of the network's parameters, by our names.
        kind: the network in words.
        scale: factor of the whole adapter.

    Raises:
        CheckpointError: it fits in no part, or only in part; or it is of another kind.
    """
    names = target_names(layouts, shapes)
    stored = source.adapters or source.entries
    entries = {with_dots(name): entry for name, entry in stored.items()}
    for (other, pattern), name in product(_OTHER_KINDS.items(), entries):
        if re.search(pattern, name):
            raise CheckpointError(f"{source.path}: it is {other} ({name}), which is not read")
    alphas = {found[1]: name for name in entries if (found := _ALPHA.fullmatch(name))}
    halves = [
        _Half(name, found[1], *locate(found[1], names), not _DOWN.isdisjoint(found.groups()[1:]))
        for name in entries
        if (found := _HALF.fullmatch(name))
    ]
    if not halves:
        first = ", ".join(sorted(entries)[:_MOST_NAMES])
        raise CheckpointError(
            f"{source.path}: it holds no LoRA adapter (tensors {first}); whole weights are given "
            "as the model"
        )
    if not any(half.ours for half in halves):
        first = ", ".join(half.name for half in halves[:_MOST_NAMES])
        raise CheckpointError(
            f"{source.path}: none of its {len(halves):,} tensors belongs to {kind}, such as {first}"
        )
    sets = {half.outer for half in halves if half.ours}
    chosen, *others = sorted(filter(is_averaged, sets)) or sorted(sets)
    if others:
        listed = ", ".join((chosen, *others))
        raise CheckpointError(f"{source.path} holds several sets ({listed:.200}); keep one")
    pairs: dict[str, dict[bool, _Half]] = {}
    for half in halves:
        if half.ours and half.outer == chosen:
            pairs.setdefault(half.ours, {}).setdefault(half.down, half)
    beside = [*entries.keys() - {half.name for half in halves} - {*alphas.values()}]
    own = {locate(name.removesuffix(".weight"), names)[1] for name in beside}
    notes: list[str] = []
    if beside and pairs.keys() <= own:
        notes.append(f"{len(beside):,} other tensors of its checkpoint are not used")
        beside = []
    lone = [alphas[layer] for layer in alphas.keys() - {half.layer for half in halves}]
    unknown = [half.name for half in halves if half.ours not in pairs]
    problems = {"match nothing": [*unknown, *lone, *beside]}
    problems |= _misfits(halves, pairs, entries, shapes)
    if wrong := [
        f"{len(found):,} {problem}: {', '.join(found[:_MOST_NAMES])}"
        for problem, found in problems.items()
        if found
    ]:
        raise CheckpointError(
            f"{source.path} does not fit {kind}; of {len(entries):,} tensors {'; '.join(wrong)}"
        )
    whole = all(half.layer in alphas for half in halves)
    config, files = (None, ()) if whole else Config.read(source)
    if config is None and not whole and chosen.startswith("base_model"):  # of PEFT, which has one
        raise CheckpointError(
            f"{source.path}: {CONFIG}, which states its scale, is not beside it; copy it there"
        )
    updates, unstated = dict[str, LowRank](), False
    for ours, pair in pairs.items():
        down, up = pair[True], pair[False]
        rank, factor = entries[down.name].meta.shape[0], None
        if alpha := alphas.get(down.layer):
            value = entries[alpha].read()
            if value.numel() != 1 or not value.isfinite().all():
                raise CheckpointError(f"{source.path}: {alpha} is not one finite number")
            factor = float(value) / rank
        elif config:
            layer = re.sub(r"^(base_model\.model|transformer)\.", "", down.layer)
            factor = config.scale(layer, rank, source.path)
        unstated |= factor is None
        factor = scale * (1.0 if factor is None else factor)
        tensors = entries[down.name], entries[up.name]
        updates[ours] = LowRank(*tensors, factor, (down.name, up.name))
    if unstated:
        notes.append("its file states no scale; 1 is taken")
    files = (*source.files, *files)
    return Adapter(source.path, updates, files, scale, tuple(notes), has_scale=not unstated)


def _misfits(
    halves: Iterable[_Half],
    pairs: Mapping[str, Mapping[bool, _Half]],
    entries: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, list[str]]:
    """Kind of problem -> halves that have it, of those that belong to a network."""
    metas = {half: entries[half.name].meta for half in halves if half.ours in pairs}
    odd = {h: m for h, m in metas.items() if m.dim() != 2 or not m.is_floating_point()}
    taken = {half for pair in pairs.values() for half in pair.values()}
    problems = {
        "are no matrices of floats": [
            f"{h.name} is {m.dtype} {[*m.shape]}" for h, m in odd.items()
        ],
        "stand twice": [h.name for h in metas.keys() - taken if h.outer == next(iter(taken)).outer],
        "lack their other half": [
            next(iter(p.values())).name for p in pairs.values() if len(p) < 2
        ],
        "are of two ranks": list[str](),
        "are of another size of model": list[str](),
    }
    for ours, pair in pairs.items():
        if len(pair) < 2 or not odd.keys().isdisjoint(pair.values()):
            continue
        (rank, columns), (rows, other) = (metas[pair[half]].shape for half in (True, False))
        down, up = (pair[half].name for half in (True, False))
        if not rank or rank != other:
            problems["are of two ranks"].append(f"{down} has {rank}, {up} {other}")
        elif (rows, columns) != shapes[ours]:
            sizes = f"{[rows, columns]}, not {[*shapes[ours]]}"
            problems["are of another size of model"].append(f"{up} is for {sizes}")
    return problems
