"""Files of checkpoints against those of the reference's own trainers, tensor by tensor."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from tests.golden.cases import Case, cases
from worldline.parallel.mesh import ALONE, Axis
from worldline.shapes import LatentShape
from worldline.train.experiment import Experiment
from worldline.train.files import Checkpoints
from worldline.train.loop import LoopConfig, Objective, Run
from worldline.train.lora import add_adapters
from worldline.train.optim import Power
from worldline.train.training import _checkpoints, order_of
from worldline.weights.archive import everything, open_pickled
from worldline.weights.checkpoint import FileTensor, open_checkpoint, sharded_axes
from worldline.weights.trainings import StoredState, open_state

CASES = [*cases("ar_ckpt_layouts"), *cases("train_ckpt_layouts")]
LORA = [*cases("dit_lora_tiny"), *cases("flow_lora_tiny")]
# family -> files of the reference that have all weights, and the name of ours of the same
FILES = {
    "autoregressive": ("autoregressive_base/*_tp1/checkpoints/iter_*.pt", "iter_000000007.pt"),
    "diffusion": ("diffusion_*/*/checkpoints/iter_*_reg_model.pt", "iter_000000007_reg_model.pt"),
    "predict2_5": (
        "cosmos_predict_v2p5/video2world/*/checkpoints/iter_*/model_ema_bf16.pt",
        "iter_000000007/model_ema_bf16.pt",
    ),
}
# of a network so narrow that no released one states it
SETTINGS: dict[str, Any] = {"diffusion": {"settings": {"rope_ratio": [1.0, 1.0, 1.0]}}}


def load(path: Path) -> dict[str, Tensor]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    tensors: dict[str, Tensor] = found.get("model", found)
    # counters of the reference alone are left out
    return {name: one for name, one in tensors.items() if not name.startswith("net.accum_")}


@pytest.mark.parametrize("family", FILES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_files_are_those_of_the_reference(case: Case, family: str, tmp_path: Path) -> None:
    """Names, precision and values, of weights that no step has changed."""
    pattern, name = FILES[family]
    sources = [*case.path.rglob(pattern)]
    if not sources:
        pytest.skip("of the other families")
    for source in sources:
        step, training = trained(family, source, tmp_path, {"average": {"enabled": True}}, {})

        def weights(_: str, step: nn.Module = step) -> Iterator[tuple[str, Tensor]]:
            yield from step.named_parameters()

        files = _checkpoints(training, step, {})
        files.gather(7, weights, True)()
        files.name(7)
        found, wanted = load(tmp_path / name), load(source)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert found[key].dtype == tensor.dtype, key
            assert torch.equal(found[key], tensor), key
        latest = source.parents["/" in name] / "latest_checkpoint.txt"
        ours = (tmp_path / "latest_checkpoint.txt").read_text()
        assert ours == latest.read_text().replace("2", "7")


def trained(
    family: str, source: Path, folder: Path, stated: dict[str, Any], adapted: dict[str, Any]
) -> tuple[Any, Any]:
    """A module of the reference's weights, and the run that it is of.

    `adapted` are fields of the family's recipe of adapters, of a file that has one inside.
    """
    package = f"worldline.families.{family}"
    module, weights = (import_module(f"{package}.{name}") for name in ("objective", "weights"))
    network = weights.open_network(source, **SETTINGS.get(family, {})).bare()
    model = network.read("cpu", torch.float32).requires_grad_(True)
    if adapted:
        add_adapters(model, replace(weights.LORA, **adapted), torch.Generator())
    step = module.make_step(model, module.TrainingStep.RECIPE(), LatentShape(1, 4, 4), network)
    for name, parameter in step.named_parameters():
        parameter.requires_grad_(not adapted or name.endswith((".down", ".up")))
    training: Any = SimpleNamespace(
        network=network,
        opened=SimpleNamespace(name=family, settings={}, config=network.config),
        module=module,
        part=lambda name: import_module(f"{package}.{name}"),
        mesh=ALONE,
        folder=folder,
        experiment=Experiment.model_validate(stated),
    )
    return step, training


def contents(path: Path) -> dict[str, Tensor]:
    """All tensors of a file or distributed checkpoint by their places, but for counters."""
    if path.is_dir() and path.name not in ("model", "optim"):
        return {}
    if path.is_dir():
        source = open_checkpoint(path)
        found = {name: source.read(name) for name in source.tensors}
    else:
        stored = open_pickled(path, everything)[1]
        found = {name: FileTensor(path, *each).read() for name, each in stored.items()}
    return {name: tensor for name, tensor in found.items() if ".accum_" not in name}


def facts(folder: Path) -> dict[str, Any]:
    """What a folder of a distributed checkpoint holds beside tensors."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    names: dict[str, Any] = {n: "" for n, each in metadata.items() if not hasattr(each, "size")}
    dcp.load(names, checkpoint_id=folder, no_dist=True)
    return names


def runs(case: Case) -> list[tuple[str, Path]]:
    """Family and beginning of the files of each training in a case, of all that has moments."""
    found = {}
    paths = [*case.path.glob("**/iter_*_optim*.pt"), *case.path.glob("**/iter_*/optim")]
    for path in sorted(paths):
        place = path.parent if path.is_dir() else path
        words = place.relative_to(case.path).parts
        families = {"p1": "diffusion", "p25": "predict2_5"}
        family = families.get(words[0], "autoregressive")
        found[place.with_name("_".join(place.name.split("_")[:2]))] = family
    for path in case.path.glob("train/**/iter_*.pt"):
        if re.fullmatch(r"iter_\d+\.pt", path.name):
            found[path.with_suffix("")] = "autoregressive"
    return [(family, place) for place, family in found.items()]


def weights_of(place: Path) -> Path:
    """File of a training by which its network is opened."""
    names = ("_reg_model.pt", "_model.pt", "_model_mp_0.pt", ".pt", "/model/.metadata")
    paths = (Path(f"{place}{name}") for name in names)
    return next(path for path in paths if path.is_file())


def adapter_of(source: Path, family: str) -> dict[str, Any]:
    """Recipe of the adapter in a file; {} without one."""
    opened = open_checkpoint(source)
    package = import_module(f"worldline.families.{family}.weights")
    down, _ = package.LORA.ends
    found = {
        name.removesuffix(down): entry
        for name, entry in opened.tensors.items()
        if name.removeprefix("model.").endswith(down) and "_ema" not in name.partition(".")[0]
    }
    if not found:
        return {}
    named = {name.removeprefix("model."): each for name, each in found.items()}
    ours = (package.KEYS.ours(f"{n}.weight") or package.KEYS.ours(f"{n}.0.weight") for n in named)
    ranks = {each.shape[0] for each in named.values()}
    [rank] = ranks
    return {"rank": rank, "targets": tuple(ours)}


def settings_of(place: Path, family: str) -> dict[str, Any]:
    """Optimizer and schedule of a training in a case, as sections of an experiment."""
    if family == "predict2_5":
        stored, group = facts(place / "scheduler"), facts(place / "optim")
        group = {name.rpartition(".")[2]: each for name, each in group.items()}
    else:
        files = (*place.parent.glob(f"{place.name}_scheduler*.pt"), weights_of(place))
        stored = torch.load(files[0], weights_only=True)
        stored = stored.get("scheduler", stored)
        files = (*place.parent.glob(f"{place.name}_optim_mp_0.pt"), weights_of(place))
        group = torch.load(files[0], weights_only=True)
        [group] = group.get("optimizer", group).get("param_groups", [{}])
    if family == "diffusion":  # omegaconf is in the file
        found = contents(place.with_name(f"{place.name}_optim.pt"))
        rates = {name.rpartition(".")[2]: each for name, each in found.items() if "groups" in name}
        stored = {"base_lrs": [rates["initial_lr"]], "_last_lr": [rates["lr"]]}
    names = ("betas", "eps", "weight_decay")
    peak, rate = (float(stored[name][0]) for name in ("base_lrs", "_last_lr"))
    optimizer = {"lr": peak, **{name: group[name] for name in names if name in group}}
    schedule = {"kind": "linear", "top": rate / peak, "end": rate / peak}
    if "warmup_iters" in stored:
        schedule = {"kind": "cosine", "warmup": stored["warmup_iters"]}
        schedule |= {"decay": stored["lr_decay_iters"], "end": stored["min_lr"] / peak}
    return {"optimizer": optimizer, "scheduler": schedule}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # of `facts`
@pytest.mark.parametrize("case", CASES, ids=str)
def test_trainings_are_read_and_written(case: Case, tmp_path: Path) -> None:
    """A run takes all of a trainer's files, and what it writes then has every tensor of them."""
    places = runs(case)
    assert len(places) > 1
    for number, (family, place) in enumerate(places):
        folder, source = tmp_path / str(number), weights_of(place)
        adapted = adapter_of(source, family)
        inside = contents(source.parent if source.name == ".metadata" else source)
        averaged = place.with_name(f"{place.name}_ema_model.pt").is_file()
        averaged |= any(name.startswith(("ema.", "net_ema.")) for name in inside)
        stated = {
            "average": {"enabled": averaged},
            "checkpoint": {"format": "reference"},
            **settings_of(place, family),
        }
        step, training = trained(family, source, folder, stated, adapted)
        config = LoopConfig(steps=9, rate=float, average=Power(0.1) if averaged else None)
        run = Run(step, Objective(draw=Any, loss=Any), config, folder, ALONE.world, None)  # type: ignore[arg-type]
        files = _checkpoints(training, step, {}, adapted.get("targets", ()))
        stored, done = restored(files, training, source, run)
        assert stored.step == done == int(place.name.partition("_")[2])
        count = len([*place.parent.glob(f"{place.name}_optim_mp_*.pt")]) or 1
        for rank in range(count):
            write(files, run, done, Axis(rank, count))
        files.name(done)
        same_files(folder, place)
        latest = place.parent / "latest_checkpoint.txt"
        assert (folder / "latest_checkpoint.txt").read_text() == latest.read_text()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_loss_is_weighed_by_what_was_trained(case: Case, tmp_path: Path) -> None:
    """Averages that a folder is opened by have features that nothing was trained on."""
    places = [place for family, place in runs(case) if family == "diffusion"]
    averages = [Path(f"{place}_ema_model.pt") for place in places]
    if not (averages := [path for path in averages if path.is_file()]):
        pytest.skip("of the other families")
    for path in averages:
        step, training = trained("diffusion", path.parent, tmp_path, {}, {})
        assert training.network.path == path
        wanted = contents(path.with_name(path.name.replace("ema", "reg")))
        assert not torch.equal(contents(path)["logvar.0.freqs"], wanted["logvar.0.freqs"].float())
        found = step.uncertainty
        for tensor, key in (
            (found.frequencies, "0.freqs"),
            (found.phases, "0.phases"),
            (found.weight, "1.weight"),
        ):
            assert torch.equal(tensor, wanted[f"logvar.{key}"].float()), key


@pytest.mark.parametrize("case", LORA, ids=str)
def test_adapters_are_read_and_written(case: Case, tmp_path: Path) -> None:
    """As the trainers save them; optimizers are not in these cases."""
    family = "diffusion" if case in cases("dit_lora_tiny") else "predict2_5"
    [source] = [*case.path.glob("train/**/iter_*_model.pt"), *case.path.glob("train/**/.metadata")]
    place = source.parents[1] if source.name == ".metadata" else source
    place = place.with_name("_".join(place.name.split("_")[:2]))
    adapted = adapter_of(source, family)
    assert adapted["rank"] == case.spec["lora"]["rank"]
    stated = {"average": {"enabled": True}, "checkpoint": {"format": "reference"}}
    step, training = trained(family, source, tmp_path, stated, adapted)
    config = LoopConfig(steps=9, rate=float, average=Power(0.1))
    run = Run(step, Objective(draw=Any, loss=Any), config, tmp_path, ALONE.world, None)  # type: ignore[arg-type]
    files = _checkpoints(training, step, {}, adapted["targets"])
    _, done = restored(files, training, source, run, ("weights", "average"))
    write(files, run, done, ALONE.tp)
    name = source.name if source.suffix else f"{place.name}/model"
    found, wanted = contents(tmp_path / name), contents(place.parent / name)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key], tensor), key


def restored(
    files: Checkpoints, training: Any, source: Path, run: Run, kinds: tuple[str, ...] = ()
) -> tuple[StoredState, int]:
    """The trainer's state, and the step after a run has taken it, or some kinds of it."""
    order = order_of(training.part("trainer"))
    names = sorted(map(files.tensors.released, run.parameters), key=order)
    stored = open_state(source, names)
    state = {key: each for key, each in run.state().items() if key.split("/")[0] in kinds}
    return stored, files.restore(stored, state if kinds else run.state())


def write(files: Checkpoints, run: Run, step: int, tp: Axis) -> None:
    """Write what one tensor-parallel process does."""
    names = [name for name, _ in run.module.named_parameters()]
    axes = {name: sharded_axes(files.tensors.released(name)) for name in names if tp.count > 1}
    cut = {name: axis[0] for name, axis in axes.items() if axis and axis[0] is not None}
    tensors = replace(files.tensors, tp=tp, cut=cut)
    [*_, form] = files.forms
    reference: Any = form
    form = replace(reference, tensors=tensors)
    replace(files, forms=(form,), tensors=tensors).gather(step, run.whole_tensors, True)()


def plain(value: Any) -> Any:
    """What a file holds beside tensors of weights, without the tensors of numbers."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items() if name != "video"}  # a counter
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else [*value.shape]
    return pytest.approx(value) if isinstance(value, float) else value


def same_files(folder: Path, place: Path) -> None:
    """Compare all files of a training with those that a case has of it."""
    theirs = {
        path.name: path
        for path in place.parent.iterdir()
        if path.name.startswith(place.name) and path.is_file()
    }
    # one is converted, and the optimizer of one is left out of a case
    theirs |= {f"{place.name}/{p.name}": p for p in place.glob("*") if p.suffix != ".pt"}
    written = {str(p.relative_to(folder)) for p in folder.glob("*.*")}
    written |= {str(p.parent.relative_to(folder)) for p in folder.glob("*/*/.metadata")}
    assert written - {"latest_checkpoint.txt", "config.json", f"{place.name}/optim"} == {
        *theirs
    } - {f"{place.name}/optim"}
    for name, path in theirs.items():
        if path.suffix == ".json":
            records = [json.loads(each.read_text()) for each in (folder / name, path)]
            assert plain(records[0]) == plain(records[1])
            continue
        found, wanted = contents(folder / name), contents(path)
        assert found.keys() == wanted.keys(), name
        ranks = [contents(each) for each in sorted(path.parent.glob(f"{name[:-4]}?.pt"))]
        for key, tensor in wanted.items():
            if "_mp_" in name and tensor.ndim == 1:  # of norms, whose moments drift apart
                tensor = torch.stack([rank[key] for rank in ranks]).mean(0)
            assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), (name, key)
            # the reference never sets these of averages; ours are those of the weights
            if name.endswith("_ema_model.pt") and key.startswith("logvar.0."):
                tensor = contents(weights_of(place))[key].float()
            assert torch.equal(found[key], tensor), (name, key)
        if path.is_dir():
            ours, others = facts(folder / name), facts(path)
            assert ours.keys() == others.keys()
            for key in ("iteration", "last_epoch", "_step_count", "base_lrs", "_last_lr"):
                assert ours.get(key) == pytest.approx(others.get(key)), key
        else:
            ours = torch.load(folder / name, weights_only=True)
            try:
                others = torch.load(path, weights_only=True)
            except pickle.UnpicklingError:  # those of omegaconf
                continue
            assert plain(ours) == plain(others)
