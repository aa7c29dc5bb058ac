"""Files of checkpoints: their names, what is removed of them, and bf16 states."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import SMALL_TRANSFORMER
from worldline.errors import CheckpointError
from worldline.families.autoregressive.model import ARTransformer
from worldline.families.diffusion.objective import read_uncertainty
from worldline.files import temporary_name
from worldline.parallel.mesh import ALONE, Axis
from worldline.shapes import LatentShape
from worldline.train.experiment import Experiment
from worldline.train.files import Checkpoints, ModelFile, Names, ReferenceFiles, named_step
from worldline.train.optim import make_optimizer
from worldline.train.training import _checkpoints, order_of
from worldline.weights.checkpoint import open_checkpoint, save
from worldline.weights.trainings import open_state, steps_of

FAMILIES = ("autoregressive", "diffusion", "predict2_5")
# one released name of each family
NAMES = {
    "autoregressive": "model.layers.3.attention.wq.weight",
    "diffusion": "net.final_layer.linear.weight",
    "predict2_5": "net.blocks.5.self_attn.q_proj.weight",
}


def tensors(kind: str) -> Iterator[tuple[str, Tensor]]:
    """One parameter of two rows, of other numbers in each kind."""
    kinds = ("weights", "average", "exp_avg", "exp_avg_sq")
    yield "a", torch.full((2, 3), 1.0 + kinds.index(kind))


def checkpoints(
    folder: Path, family: str, tp: Axis = ALONE.tp, adapter: bool = False, form: str = "reference"
) -> Any:
    """All that a family's trainer writes of one parameter, or what ours does."""
    package = f"worldline.families.{family}"
    trainer, objective = (import_module(f"{package}.{name}") for name in ("trainer", "objective"))
    cut = {"a": 0} if tp.count > 1 else {}
    names = Names(lambda name: NAMES[family], tp, cut, {})

    def settings(step: int) -> dict[str, Any]:
        rates = {"lr": 0.5, "initial_lr": 1.0, "betas": (0.9, 0.99)}
        return {"optimizer": rates, "adapter": adapter}

    kinds = trainer.files, order_of(trainer), trainer.MOMENTS_DTYPE
    forms: list[Any] = [ReferenceFiles(*kinds, names, ("a",), settings, True)]
    if form != "reference":
        forms = [ModelFile(*each, names) for each in objective.MODEL_FILES]  # type: ignore[call-arg]
    return Checkpoints(folder, tuple(forms), objective.NEWEST, names, {"a": 1})


@pytest.mark.parametrize(
    ("form", "adapter"), [("reference", False), ("reference", True), ("worldline", False)]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_files_of_a_step_are_removed_and_no_others(
    tmp_path: Path, family: str, form: str, adapter: bool
) -> None:
    files = checkpoints(tmp_path, family, adapter=adapter, form=form)
    for step in (3, 40):
        files.gather(step, tensors, True)()
    files.name(40)
    kept = {path for path in tmp_path.rglob("*") if "iter_000000040" in str(path)}
    assert {path for path in tmp_path.rglob("*") if "iter_000000003" in str(path)}
    files.remove(3)
    beside = {tmp_path / "latest_checkpoint.txt", tmp_path / "config.json"}
    assert {*tmp_path.rglob("*")} - beside == kept
    mine = tmp_path / "iter_000000040" / "mine.pt"
    mine.parent.mkdir(exist_ok=True)
    mine.touch()
    files.remove(40)
    assert {*tmp_path.rglob("*")} - beside - {mine.with_name("config.json")} == {mine.parent, mine}


@pytest.mark.parametrize(
    ("family", "adapter", "numbers"),
    [
        ("autoregressive", False, 20_000 + 4 * 700),
        ("diffusion", False, 60_000 + 8 * 700),
        ("diffusion", True, 20_000 + 12 * 700),  # averages of the adapter alone
        ("predict2_5", True, 60_000 + 4 * 700),
    ],
)
def test_room_for_files_of_a_trainer(
    tmp_path: Path, family: str, adapter: bool, numbers: int
) -> None:
    """Bytes, for 10,000 numbers of which 700 are trained: weights, averages and both moments."""
    files = checkpoints(tmp_path, family, adapter=adapter)
    [form] = files.forms
    names = replace(form.tensors, released=lambda name: f"net.{name}")
    form = replace(form, tensors=names, average=family != "autoregressive")
    assert form.nbytes({"a": 700, "b": 9300}) == pytest.approx(numbers, abs=64)  # settings beside


@pytest.mark.parametrize("form", ["reference", "worldline"])
@pytest.mark.parametrize("family", FAMILIES)
def test_leftovers_of_a_killed_save_go(tmp_path: Path, family: str, form: str) -> None:
    """Files of a step that has no state, and temporaries; what may be of another run stays."""
    files = checkpoints(tmp_path, family, form=form)
    for step in (3, 40):
        files.gather(step, tensors, True)()
    kept = {path for path in tmp_path.rglob("*") if "iter_000000040" not in str(path)}
    files.name(3)
    (tmp_path / "iter_000000040_mine.pt").touch()
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    ours = f".{os.getpid()}-"
    for place in ("iter_000000003_reg_model.pt", "iter_000000041/model.pt", "iter_000000007.state"):
        path = temporary_name(tmp_path / place)
        path = path.with_name(path.name.replace(ours, f".{killed.pid}-"))
        path.parent.mkdir(exist_ok=True)
        path.touch()
    files.sweep(None)
    assert not [*tmp_path.rglob(".*.tmp")]
    assert [*tmp_path.glob("iter_000000040*")] != [tmp_path / "iter_000000040_mine.pt"]
    files.sweep(3)
    beside = {"latest_checkpoint.txt", "iter_000000040_mine.pt"}
    beside |= {"iter_000000041"} if family != "predict2_5" else set()  # whose folders it is
    assert {*tmp_path.rglob("*")} == kept | {tmp_path / name for name in beside}


@pytest.mark.parametrize("before", [None, 3])
def test_a_run_killed_behind_its_state(tmp_path: Path, before: int | None) -> None:
    """The checkpoint of a whole state gets its name when the run goes on."""
    files = checkpoints(tmp_path, "diffusion", form="worldline")
    if before:
        files.name(before)
    files.sweep(40)
    assert named_step(tmp_path) == (before or 0)  # of no files
    files.gather(40, tensors, True)()
    files.sweep(40)
    assert named_step(tmp_path) == 40
    assert (tmp_path / "iter_000000040_ema_model.pt").exists()


def test_files_of_a_run_without_states_stay(tmp_path: Path) -> None:
    """It went on from a state that is older."""
    files = checkpoints(tmp_path, "diffusion", form="worldline")
    for step in (40, 50):
        files.gather(step, tensors, True)()
    files.name(40)
    files.sweep(3)
    names = {path.name for path in tmp_path.glob("iter_*")}
    assert names == {f"iter_000000040{end}" for end in (".pt", "_reg_model.pt", "_ema_model.pt")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_state_is_read_as_it_was_written(tmp_path: Path, family: str) -> None:
    """Moments as precise as the trainer keeps them, averages as float32, weights as bf16."""
    files = checkpoints(tmp_path, family)
    files.gather(12, tensors, True)()
    place = next(
        path for path in sorted(tmp_path.rglob("iter_000000012*")) if "ema" not in path.name
    )
    stored = open_state(place / "model" / ".metadata" if place.is_dir() else place, [NAMES[family]])
    kinds = ["weights", "exp_avg", "exp_avg_sq"] + ["average"] * (family != "autoregressive")
    state = {f"{kind}/a": torch.zeros(2, 3) for kind in kinds} | {"step/a": torch.zeros(())}
    assert files.restore(stored, state) == 12
    assert steps_of(stored.path) == 12
    for kind in kinds:
        assert torch.equal(state[f"{kind}/a"], next(tensors(kind))[1]), kind
    assert state["step/a"] == 12
    with pytest.raises(CheckpointError, match=r"of another there is no exp_avg;"):
        stored.read("exp_avg", "another")


def test_shards_hold_their_parts(tmp_path: Path) -> None:
    for rank in range(2):
        files = checkpoints(tmp_path, "autoregressive", Axis(rank, 2))
        files.gather(5, tensors, True)()
    names = {path.name for path in tmp_path.glob("iter*")}
    assert names == {
        "iter_000000005.pt",
        *(
            f"iter_000000005_{kind}_mp_{rank}.pt"
            for kind in ("model", "optim", "scheduler")
            for rank in range(2)
        ),
    }
    part = torch.load(tmp_path / "iter_000000005_optim_mp_1.pt", weights_only=True)
    assert part["state"][0]["exp_avg"].shape == (1, 3)
    whole = checkpoints(tmp_path, "autoregressive")
    state = {"exp_avg/a": torch.zeros(2, 3)}
    stored = open_state(tmp_path / "iter_000000005_model_mp_0.pt", [NAMES["autoregressive"]])
    whole.restore(stored, state)
    assert torch.equal(state["exp_avg/a"], next(tensors("exp_avg"))[1])
    files.remove(5)
    assert not [*tmp_path.glob("iter*")]


@pytest.mark.parametrize("form", ["worldline", "reference"])
@pytest.mark.parametrize("count", [1, 2])
def test_parts_of_more_processes_go(tmp_path: Path, form: str, count: int) -> None:
    """A run on fewer saves a step again, and removes others: no part of before stays among them."""

    def write(step: int, count: int) -> Checkpoints:
        for rank in reversed(range(count)):
            files: Checkpoints = checkpoints(
                tmp_path, "autoregressive", Axis(rank, count), form=form
            )
            files.tensors.cut.clear()  # type: ignore[attr-defined]
            files.gather(step, tensors, True)()
        return files

    for step in (5, 6):
        write(step, 3)
    files = write(5, count)
    left = {path.name for path in tmp_path.glob("iter_000000005*")}
    parts = {name for name in left if "_mp_" in name}
    kinds = ("model", "optim", "scheduler") if form == "reference" else ("model",)
    ranks = range(count) if count > 1 else ()
    assert parts == {f"iter_000000005_{kind}_mp_{n}.pt" for kind in kinds for n in ranks}
    files.remove(6)
    assert {path.name for path in tmp_path.glob("iter_*")} == left


def test_a_training_of_fewer_parameters_does_not_go_on(tmp_path: Path) -> None:
    """Numbers of its optimizer stand for other ones; shards that lack one have no state."""
    checkpoints(tmp_path, "autoregressive").gather(5, tensors, True)()
    with pytest.raises(CheckpointError, match="has not 0 parameters"):
        open_state(tmp_path / "iter_000000005.pt", [])
    for rank in range(2):
        checkpoints(tmp_path, "autoregressive", Axis(rank, 2)).gather(6, tensors, True)()
    (tmp_path / "iter_000000006_optim_mp_1.pt").unlink()
    name = NAMES["autoregressive"]
    stored = open_state(tmp_path / "iter_000000006_model_mp_0.pt", [name])
    assert stored.read("weights", name).shape == (2, 3)
    with pytest.raises(CheckpointError, match="there is no exp_avg_sq"):
        stored.read("exp_avg_sq", name)


def test_files_of_no_training_are_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt: .*iter_000000200\.pt"):
        open_state(tmp_path / "model.pt", [])


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_alone_are_no_training(tmp_path: Path, family: str) -> None:
    """They are what a run writes by default."""
    checkpoints(tmp_path, family, form="worldline").gather(12, tensors, True)()
    for path in tmp_path.rglob("*.pt"):
        with pytest.raises(CheckpointError, match=r"iter_000000012.*there is no"):
            open_state(path, [NAMES[family]]).read("exp_avg", NAMES[family])


def bf16_step(value: Tensor, rate: float, steps: int, gradient: Tensor | float) -> Any:
    """Parameter and state after steps of one gradient, bf16 as the reference keeps them."""
    parameter = nn.Parameter(value.to(torch.bfloat16, copy=True))
    optimizer = make_optimizer(
        {"a": parameter}, betas=(0.9, 0.999), weight_decay=0.05, decay_all=True
    )
    optimizer.defaults["lr"].fill_(rate)
    for _ in range(steps):
        parameter.grad = torch.zeros_like(parameter).add_(gradient)
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


@pytest.mark.parametrize(("rate", "share"), [(2e-6, 0.04), (2e-5, 0.30), (1e-4, 0.88), (1e-3, 1)])
def test_small_updates_are_lost_in_bf16(rate: float, share: float) -> None:
    """Shares of weights of deviation 0.02 that a step changes, as measured on the reference."""
    torch.manual_seed(1)
    before = (0.02 * torch.randn(40_000)).bfloat16()
    after, _ = bf16_step(before, rate, 1, torch.randn(40_000))
    assert (after != before).float().mean() == pytest.approx(share, abs=0.02)


def test_moments_in_bf16() -> None:
    """A norm's weight of one never moves; of a step all is computed in float32, rounded once."""
    one, state = bf16_step(torch.ones(4), 1e-3, 300, 0.5)
    assert (one == 1).all()
    assert {each.dtype for name, each in state.items() if name != "step"} == {torch.bfloat16}
    torch.manual_seed(2)
    before, gradient = torch.randn(999).bfloat16(), torch.randn(999).bfloat16()
    after, state = bf16_step(before, 0.01, 1, gradient)
    wide = gradient.float()
    first, second = 0.1 * wide, 0.001 * wide.square()
    exact = before.float() * (1 - 0.01 * 0.05)
    exact -= 0.01 * (first / 0.1) / ((second / 0.001).sqrt() + 1e-8)
    for found, expected in (
        (after, exact),
        (state["exp_avg"], first),
        (state["exp_avg_sq"], second),
    ):
        assert (found != expected.bfloat16()).float().mean() < 0.01


def test_features_of_averages_weigh_no_loss(tmp_path: Path) -> None:
    """The file of the weights beside them has those that its last layer was trained on."""
    kinds, files = ("freqs", "phases"), {}
    for kind in ("ema", "reg"):
        files[kind] = {f"logvar.0.{name}": torch.randn(16) for name in kinds}
        files[kind]["logvar.1.weight"] = torch.randn(1, 16)
        torch.save(files[kind], tmp_path / f"iter_000000031_{kind}_model.pt")
    averages = open_checkpoint(tmp_path / "iter_000000031_ema_model.pt")

    def found() -> list[Tensor]:
        uncertainty = read_uncertainty(averages)
        assert uncertainty is not None
        return [uncertainty.frequencies, uncertainty.phases, uncertainty.weight]

    assert all(map(torch.equal, found(), files["reg"].values()))
    (tmp_path / "iter_000000031_reg_model.pt").unlink()  # ours are right in both
    assert all(map(torch.equal, found(), files["ema"].values()))


@pytest.mark.parametrize("form", ["worldline", "reference"])
def test_averages_that_no_file_holds_are_named(
    form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are not gathered, and take no room."""
    objective, trainer, weights = (
        import_module(f"worldline.families.autoregressive.{name}")
        for name in ("objective", "trainer", "weights")
    )
    model = ARTransformer(SMALL_TRANSFORMER)
    stored = {weights.KEYS.released(name): each for name, each in model.state_dict().items()}
    save(stored, tmp_path / "model.safetensors")
    network = weights.open_network(tmp_path, {})
    step = objective.make_step(model, objective.NextTokenObjective(), LatentShape(1, 4, 4), network)
    asked, sizes = [], []

    def values(kind: str) -> Iterator[tuple[str, Tensor]]:
        asked.append(kind)
        yield from step.named_parameters()

    for average in (False, True):
        stated = {"average": {"enabled": average}, "checkpoint": {"format": form}}
        training: Any = SimpleNamespace(
            network=network,
            opened=SimpleNamespace(name="Some-4B", settings={}, config=network.config),
            module=objective,
            part={"trainer": trainer, "weights": weights}.__getitem__,
            mesh=ALONE,
            folder=tmp_path,
            experiment=Experiment.model_validate(stated),
        )
        caplog.clear()
        files = _checkpoints(training, step, {})
        assert ["average.enabled" in text and "Some-4B" in text for text in caplog.messages] == [
            True
        ] * average
        files.gather(5, values, True)
        sizes.append(files.nbytes({name: each.numel() for name, each in step.named_parameters()}))
    assert "weights" in asked
    assert "average" not in asked
    assert sizes[0] == sizes[1]
