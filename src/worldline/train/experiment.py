"""Experiments: what a run trains, on what and how, as short typed files; needs no torch.

An experiment is a YAML file of `experiments/`, which may build on another (`like`), and values for
single keys. Keys of the released configurations are taken, too, and mean ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
)

from worldline.documents import read_text
from worldline.errors import InputError, brief, did_you_mean, strerror
from worldline.files import LONGEST_NAME, file_name
from worldline.request import Positive, Share, Text
from worldline.yaml_documents import parse_yaml

EXPERIMENTS = Path(__file__).parent / "experiments"
# names that the released guide misprints -> what they mean
MISPRINTED = {"base_4b_example_tealrobotsmall_tp4": "base_4b_example_tealrobot_tp4"}
# keys of the released configurations -> ours; "" has no effect here
RELEASED_KEYS = {
    "dataloader_train.dataset.config.*": "data.*",
    "dataloader_train.sampler.dataset.config.*": "data.*",
    "dataloader_train.dataset.*": "data.*",
    "dataloader_train.sampler.dataset.*": "data.*",
    "dataloader_train.*": "data.*",
    "trainer.callbacks.grad_clip.clip_norm": "trainer.clip_norm",
    "trainer.callbacks.vid_sampling_tf.every_n": "trainer.sample_iter",
    "trainer.callbacks.every_n_sample_*.every_n": "trainer.sample_iter",
    "scheduler.warmup_iters": "scheduler.warmup",
    "scheduler.warm_up_steps": "scheduler.warmup",
    "scheduler.cycle_lengths": "scheduler.cycle",
    "scheduler.lr_decay_iters": "scheduler.decay",
    "scheduler.f_start": "scheduler.start",
    "scheduler.f_max": "scheduler.top",
    "scheduler.f_min": "scheduler.end",
    "model_parallel.tensor_model_parallel_size": "parallel.tensor_model_parallel_size",
    "model.ema.*": "average.*",
    "model.config.ema.*": "average.*",
    "model.peft_control.*": "lora.*",
    "model.config.lora_rank": "lora.rank",
    "model.loss_scale": "objective.scale",
    "job.wandb_mode": "job.wandb_mode",
}

_MOST = 999_999_999  # steps: names of files have nine digits
Count = Annotated[int, Field(ge=1, le=_MOST)]
Times = Annotated[int, Field(ge=0, le=_MOST)]
Beta = Annotated[float, Field(ge=0, lt=1)]
FolderName = Annotated[str, AfterValidator(lambda name: _folder(name) if name else name)]
# YAML takes on and off for true and false
Switch = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda v: ("off", "on")[v] if isinstance(v, bool) else v),
]


def _folder(name: str) -> str:
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"a name has {LONGEST_NAME} bytes at most")
    return file_name(name)


def _sides(value: Any) -> Any:
    """Height and width of a text such as 384x640."""
    if not isinstance(value, str):
        return value
    height, _, width = value.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise ValueError("give height x width, such as 384x640")
    return int(height), int(width)


class Section(BaseModel):
    """Part of an experiment."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Job(Section):
    """Names of the run's folder, `OUTPUT_ROOT/project/group/name`."""

    project: FolderName = "posttraining"
    group: FolderName = "worldline"
    name: FolderName = ""
    wandb_mode: Literal["disabled", "offline", "online"] = "disabled"


class Data(Section):
    """Clips.

    Attributes:
        dataset_dir: folder of videos, or one with `videos`, `metas` and the like in it.
        num_frames: of a clip; None is the model's own, so is `video_size`.
        sequence_interval: frames from one of a clip to the next.
        start_frame_interval: frames from the start of one clip to that of the next.
        video_size: height and width, [384, 640] or 384x640.
        fit: whether frames of another aspect are cropped or stretched.
        one_per_video: one clip of a random place of each video in an epoch, not each of all places.
        caption: of all videos; None reads those beside them.
        prompt_type: which text of a JSON caption, such as "short"; None is its first.
        batch_size: clips of a batch of each process.
        num_workers: processes that read ahead.
        cache_dir: where tokens, latents and embeddings are kept; None computes them each time.
        same_order: the same order in every epoch, as the reference has it.
    """

    dataset_dir: str | None = None
    validation_dir: str | None = None
    num_frames: Count | None = None
    sequence_interval: Count = 1
    start_frame_interval: Count = 1
    video_size: Annotated[tuple[Count, Count] | None, BeforeValidator(_sides)] = None
    fit: Literal["crop", "stretch"] = "crop"
    one_per_video: bool = False
    caption: Text | None = None
    prompt_type: str | None = None
    batch_size: Count = 1
    num_workers: Times = 2
    cache_dir: str | None = None
    same_order: bool = False


class OptimizerSettings(Section):
    """AdamW, of all parameters alike."""

    lr: Positive = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01


class SchedulerSettings(Section):
    """Learning rate by step, in factors of the optimizer's.

    Attributes:
        kind: a rise, then half a cosine to `end` at step `decay`; or a rise from `start` to `top`,
            then a line to `end` at step `cycle`.
        warmup: steps of the rise.
        decay: None is the length of the run.
        end: None is 1e-5 of a cosine, and 1 of a line, which then stays.
    """

    kind: Literal["cosine", "linear"] = "linear"
    warmup: Times = 0
    decay: Count | None = None
    cycle: Positive = 1e13
    start: Share = 1e-6
    top: Share = 1.0
    end: Share | None = None

    @property
    def last(self) -> float:
        """Factor at the end."""
        return {"cosine": 1e-5, "linear": 1.0}[self.kind] if self.end is None else self.end


class AverageSettings(Section):
    """Averaged weights; the rate is their deviation in time, relative to the length of the run.

    A mean that weighs all steps alike has a rate of 0.289; smaller ones weigh the last steps most.
    """

    enabled: bool = False
    rate: Annotated[float, Field(gt=0, le=0.28)] = 0.1


class TrainerSettings(Section):
    """Length, precision and reports of the run.

    Attributes:
        precision: of the computation; weights, moments and averages are kept in float32.
        reference_state: weights and moments, not averages, are kept as the released trainer does:
            in bf16, but for Predict1's diffusion models.
        activation_checkpointing: blocks compute their activations again on the way back; auto where
            memory asks for it.
        compile: whether blocks are compiled, by torch.compile, in the first step; auto on GPUs
            where torch can, without tensor parallel layers and `deterministic`.
        logging_iter: steps between lines of the log.
        validation_iter, sample_iter: steps between held-out losses, and between videos of two clips
            beside the truth, held-out ones where there are any; 0 makes none.
    """

    max_iter: Count = 1000
    grad_accum_iter: Count = 1
    clip_norm: Positive = 1.0
    seed: Times = 0
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    reference_state: bool = False
    activation_checkpointing: Switch = "auto"
    compile: Switch = "auto"
    deterministic: bool = False
    logging_iter: Count = 10
    run_validation: bool = True
    validation_iter: Times = 100
    sample_iter: Times = 0


class CheckpointSettings(Section):
    """Files of the run.

    Attributes:
        load_path: weights to begin with; None is the model's own.
        load_training_state: the run goes on with the optimizer, average and step of the released
            trainer's files beside the weights of `load_path`.
        save_state: whether a run can go on; its state is four times the weights.
        format: "reference" writes what the released trainer does, its optimizer's files too.
        keep_last: number of the newest checkpoints that are kept.
        keep_every: those of steps that it divides are kept, too.
        strict_resume: taken from released commands; files must fit, whatever it is.
    """

    load_path: str | None = None
    load_training_state: bool = False
    save_iter: Count = 1000
    save_state: bool = True
    format: Literal["worldline", "reference"] = "worldline"
    keep_last: Count = 3
    keep_every: Times = 0
    strict_resume: bool = True


class ParallelSettings(Section):
    """How processes share the run; others than these have other clips and shares of weights."""

    tensor_model_parallel_size: Count = 1


class LoraSettings(Section):
    """An adapter that is trained in place of the weights; 0 is none.

    Attributes:
        scale: of its product; PEFT's alpha over the rank.
        targets: names of layers in the released files, or ends of them.
    """

    rank: Times = 0
    scale: Positive = 1.0
    targets: tuple[str, ...] = ()


class Experiment(Section):
    """All of a run.

    Attributes:
        model: released name, or a folder.
        objective: fields of the family's recipe of a step.
    """

    description: str = ""
    model: str = ""
    job: Job = Job()
    objective: dict[str, Any] = Field(default_factory=dict)
    data: Data = Data()
    optimizer: OptimizerSettings = OptimizerSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    average: AverageSettings = AverageSettings()
    trainer: TrainerSettings = TrainerSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    parallel: ParallelSettings = ParallelSettings()
    lora: LoraSettings = LoraSettings()

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        root = Path(os.environ.get("OUTPUT_ROOT") or "checkpoints")
        return root / self.job.project / self.job.group / self.job.name

    def to_yaml(self) -> str:
        """The whole experiment, every key written out."""
        return str(yaml.safe_dump(self.to_json(), sort_keys=False))

    def to_json(self) -> dict[str, Any]:
        """The whole experiment, as JSON has it."""
        return self.model_dump(mode="json")


@cache
def released() -> dict[str, str]:
    """Every experiment that names its clips, and its line."""
    stated = {path.stem: _stated(path) for path in sorted(EXPERIMENTS.glob("*.yaml"))}
    return {
        name: str(each["description"])
        for name, each in stated.items()
        if "dataset_dir" in each.get("data", {})
    }


def find(name: str) -> Path:
    """File of an experiment, by its name or as a path.

    Raises:
        InputError: there is none; the nearest one is named.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    if name in released():
        return EXPERIMENTS / f"{name}.yaml"
    right = MISPRINTED.get(name)
    advice = f"; it is {right}" if right else did_you_mean(name, [*released()], 0.6)
    raise InputError(f"experiment={name}: there is none{advice or '; --list shows all'}")


def read(name: str, overrides: Sequence[str] = ()) -> Experiment:
    """An experiment with values for some of its keys.

    Args:
        name: of an experiment, or path of a file like them.
        overrides: `key.path=value`, the value as YAML.

    Raises:
        InputError: a line for each wrong key or value.
    """
    path = find(name)
    return check(_merged({"job": {"name": path.stem}}, _stated(path)), overrides)


def short_form(
    family: str,
    stated: dict[str, Any],
    overrides: Sequence[str] = (),
    flags: Mapping[str, str] | None = None,
) -> Experiment:
    """An experiment of a family's defaults, whose clips have the model's size.

    The learning rate rises for a twentieth of the run at most, unless its rise is stated. As its
    first step has a rate of 0, runs of less than 20 steps have none.

    Args:
        family: name of it.
        stated: values over the defaults.
        overrides: as of `read`.
        flags: key -> the flag that stated it, which messages name.

    Raises:
        InputError: as of `read`.
    """
    base = _stated(EXPERIMENTS / "short" / f"{family}.yaml")
    sizes = ("num_frames", "video_size")
    base["data"] = {name: value for name, value in base["data"].items() if name not in sizes}
    experiment = check(_merged(base, stated), overrides, flags)
    if any(our_key(word.partition("=")[0]) == "scheduler.warmup" for word in overrides):
        return experiment
    scheduler = experiment.scheduler
    rise = min(scheduler.warmup, experiment.trainer.max_iter // 20)
    shorter = scheduler.model_copy(update={"warmup": rise})
    return experiment.model_copy(update={"scheduler": shorter})


def check(
    stated: dict[str, Any], overrides: Sequence[str] = (), flags: Mapping[str, str] | None = None
) -> Experiment:
    """A checked experiment; see `short_form`."""
    given: dict[str, tuple[str, Any]] = {}
    for word in overrides:
        key, value = _parse(word)
        ours = our_key(key)
        if ours in given and given[ours][1] != value:
            raise InputError(
                f"{key} is {brief(value)}, but {given[ours][0]} is {brief(given[ours][1])}; they "
                "are one key here: give one value"
            )
        given[ours] = key, value
    over: dict[str, Any] = {}
    for ours, (_, value) in given.items():
        nested = value
        for section in reversed(ours.split(".")):
            nested = {section: nested}
        over = _merged(over, nested)
    stated = _merged(stated, over)
    try:
        experiment = Experiment.model_validate(stated)
    except ValidationError as error:
        typed = {**(flags or {}), **{ours: key for ours, (key, _) in given.items()}}
        lines = [_problem(each, typed) for each in error.errors()]
        raise InputError("\n".join(dict.fromkeys(lines))) from None
    for ours, (key, _) in given.items():
        if reason := _unread(ours, experiment):
            raise InputError(f"{key} has no effect with {reason}; leave it out, or change that")
    return experiment


def _unread(key: str, experiment: Experiment) -> str:
    """The setting with which nothing reads a key; "" where it is read."""
    kind, part = experiment.scheduler.kind, key.partition(".")
    unread = {"cosine": ("cycle", "start", "top"), "linear": ("decay",)}[kind]
    if part[0] == "scheduler" and part[2] in unread:
        return f"scheduler.kind={kind}"
    if key == "checkpoint.load_training_state" and experiment.checkpoint.load_path is None:
        return "no checkpoint.load_path"
    rank = experiment.lora.rank
    return "lora.rank=0" if part[0] == "lora" and not rank and part[2] != "rank" else ""


def our_key(key: str) -> str:
    """Our name of a key, which may be a released one."""
    for pattern, ours in RELEASED_KEYS.items():
        if fnmatchcase(key, pattern):
            return ours.replace("*", key[len(pattern.partition("*")[0]) :])
    return key


# keys that may change when a run goes on: they decide neither what a step computes nor of what;
# with the length of a run, the learning rate changes that is to fall to its end
FREE_KEYS = (
    *("description", "job.*", "data.num_workers", "data.cache_dir", "data.dataset_dir"),
    *("data.validation_dir", "trainer.*_iter", "trainer.run_validation", "trainer.compile"),
    *("trainer.activation_checkpointing", "checkpoint.*", "parallel.*", "model"),
)
# although a pattern frees them; files of another format would stay when theirs are removed
FIXED_KEYS = ("trainer.grad_accum_iter", "checkpoint.format")


def differences(
    before: Mapping[str, Any], now: Experiment, defaults: Experiment | None = None
) -> list[str]:
    """Lines about the keys that make another run of an experiment, as `to_json` gave it before.

    A run may become longer; the short form's rise of the learning rate follows its length. Keys
    that came later were at their defaults, which are `Experiment`'s own and the recipe's.
    """
    after, absent = now.to_json(), (defaults or Experiment()).to_json()
    lines, length = [], "trainer.max_iter"
    rises = _at(before, "scheduler.warmup"), _at(after, "scheduler.warmup")
    # of less than 20 steps, short forms had a rise of one
    shorter = _at(before, length) != _at(after, length) or rises == (1, 0)
    follows = ("scheduler.warmup",) if shorter else ()
    recipes = before.get("objective") or {}, after["objective"]
    fields = [f"objective.{name}" for name in dict.fromkeys([*recipes[0], *recipes[1]])]
    for key in [*fields, *(key for key in keys() if key != "objective")]:
        free = any(fnmatchcase(key, pattern) for pattern in (*FREE_KEYS, *follows))
        free &= key not in FIXED_KEYS
        was, value = _at(before, key, _at(absent, key)), _at(after, key)
        if was != value and not free:
            lines.append(f"{key} was {brief(was)} and is {brief(value)}")
    return lines


def _at(values: Mapping[str, Any], key: str, absent: Any = None) -> Any:
    found: Any = values
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return absent
        found = found[part]
    return found


def keys() -> list[str]:
    """All keys, as they are typed."""
    return [*_keys(Experiment)]


def _keys(kind: Any, before: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            yield from _keys(inner, f"{before}{name}.")
        else:
            yield f"{before}{name}"


def _parse(word: str) -> tuple[str, Any]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise InputError(f"{brief(word)} is no key.path=value; write experiment=NAME first")
    try:
        value = parse_yaml(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{key}: {brief(text)} is no value: {error}") from None
    if isinstance(value, str):  # YAML takes 1e-4 for a text
        try:
            value = float(value)
        except ValueError:
            return key, value
    return key, value


def _problem(error: Any, typed: Mapping[str, str]) -> str:
    path = [str(part) for part in error["loc"]]
    where = ".".join(path)
    where = next((typed[k] for k in typed if f"{where}.".startswith(f"{k}.")), where)
    if error["type"] == "extra_forbidden":
        known = did_you_mean(".".join(path), keys(), 0.6)
        return f"{where}: there is no such key{known or '; --dry_run prints all'}"
    advice = error["msg"].replace("Input should", "it must").removeprefix("Value error, ")
    kind, most = error["type"], error.get("ctx", {}).get("max_length")
    if kind == "missing":
        advice = "one more value belongs to it"
    elif kind == "too_long":
        advice = f"{most} values belong to it"
    elif kind == "string_unicode":
        advice = "it is no valid Unicode"
    elif kind in ("tuple_type", "list_type"):
        advice = "give values in brackets, such as [a,b]"
    elif kind in ("dict_type", "model_type", "model_attributes_type"):
        advice = f"it is a section; give {where}.KEY=VALUE"
    return f"{where} is {brief(error['input'])}; {advice}"


def _stated(path: Path, *above: Path) -> dict[str, Any]:
    """Values of a file and of those that it builds on, for those `above` that build on it.

    Raises:
        InputError: one cannot be read, is no experiment, or builds on itself.
    """
    try:
        own = parse_yaml(read_text(path))
    except OSError as error:
        raise InputError(f"{path}: it cannot be read: {strerror(error)}") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: it is not valid YAML: {reason}") from error
    if not isinstance(own, dict):
        raise InputError(f"{path}: it is no experiment; give names and values")
    base = own.pop("like", None)
    if base is None:
        return own
    files = (folder / f"{base}.yaml" for folder in (path.parent, EXPERIMENTS))
    below = next((file for file in files if file.exists() and file != path), None)
    if below is None or below in above:
        problem = "there is no such experiment" if below is None else "it builds on itself"
        known = did_you_mean(str(base), [*released()], 0.6) if below is None else ""
        raise InputError(f"{path}: like is {brief(base)}; {problem}{known}")
    return _merged(_stated(below, path, *above), own)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Values of `base` but for those of `over`, section by section.

    A learning rate of another kind keeps nothing of the base's but its rise.
    """
    joined = dict(base)
    if "kind" in base and over.get("kind", base["kind"]) != base["kind"]:
        joined = {name: value for name, value in base.items() if name == "warmup"}
    for name, value in over.items():
        inner = joined.get(name)
        both = isinstance(value, dict) and isinstance(inner, dict)
        joined[name] = _merged(inner, value) if both else value  # type: ignore[arg-type]
    return joined
