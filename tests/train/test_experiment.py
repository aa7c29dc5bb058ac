"""Experiments: released names, keys and figures; wrong ones are named with the nearest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from worldline.catalog import ENTRIES
from worldline.errors import InputError
from worldline.train.experiment import (
    EXPERIMENTS,
    RELEASED_KEYS,
    Experiment,
    differences,
    keys,
    our_key,
    read,
    released,
    short_form,
)

TEALROBOT = "base_4b_example_tealrobotsmall_tp1"


@pytest.mark.parametrize("name", [*released()])
def test_every_experiment_is_whole(name: str) -> None:
    """Its model is a released one; written out and read again it is the same."""
    experiment = read(name, ["data.num_workers=3"])
    folders = {folder for entry in ENTRIES for folder in (entry.name, *entry.folders)}
    assert experiment.model.partition("/")[0] in folders
    assert experiment.data.dataset_dir
    assert experiment.data.num_workers == 3
    assert experiment.job.name


def test_each_has_a_line() -> None:
    lines = released()
    assert all(line.endswith(".") and len(line) < 90 for line in lines.values())
    bases = {path.stem for path in EXPERIMENTS.glob("*.yaml")} - {*released()}
    assert bases == {"autoregressive", "diffusion", "predict2.5"}


def test_the_released_figures() -> None:
    small, large = read(TEALROBOT), read("base_4b_example_tealrobot_tp4")
    assert small.data.video_size == (384, 640)
    assert large.data.video_size == (640, 848)
    assert large.parallel.tensor_model_parallel_size == 4
    assert small.optimizer.lr == large.optimizer.lr == 1e-3
    assert small.optimizer.lr * small.scheduler.end == pytest.approx(1e-8)
    flow = read("predict2_video2world_training_14b_groot_gr1_480")
    assert flow.optimizer.lr == 2**-15.5
    assert (flow.data.num_frames, flow.objective["high_share"]) == (45, 0.05)
    assert flow.job.name == "14b_groot_gr1_480"
    adapter = read("video2world_7b_lora_example_cosmos_nemo_assets")
    assert (adapter.lora.rank, adapter.lora.targets) == (8, ("to_q", "to_v"))
    assert adapter.objective["most_conditioning"] == 2
    assert read("text2world_7b_example_hdvila").trainer.grad_accum_iter == 2


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("trainer.max_iter=17", "trainer.max_iter", 17),
        ("dataloader_train.dataset.config.dataset_dir=clips", "data.dataset_dir", "clips"),
        ("dataloader_train.dataset.video_size=[192,320]", "data.video_size", (192, 320)),
        ("dataloader_train.batch_size=2", "data.batch_size", 2),
        ("optimizer.lr=2e-5", "optimizer.lr", 2e-5),
        ("scheduler.warmup_iters=100", "scheduler.warmup", 100),
        ("trainer.callbacks.vid_sampling_tf.every_n=0", "trainer.sample_iter", 0),
        ("model_parallel.tensor_model_parallel_size=2", "parallel.tensor_model_parallel_size", 2),
        ("model.ema.enabled=true", "average.enabled", True),
        ("checkpoint.load_path=a/model.pt", "checkpoint.load_path", "a/model.pt"),
        ("trainer.activation_checkpointing=on", "trainer.activation_checkpointing", "on"),
        ("data.caption=a robot = arm", "data.caption", "a robot = arm"),
        ("trainer.callbacks.vid_sampling_tf.every_n=7", "trainer.sample_iter", 7),
    ],
)
def test_released_keys_are_ours(word: str, key: str, value: object) -> None:
    found: object = read(TEALROBOT, [word])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_released_keys_lead_to_keys() -> None:
    every = [*keys(), "objective.scale"]
    for ours in RELEASED_KEYS.values():
        assert any(one == ours or one.startswith(ours.removesuffix("*")) for one in every), ours
    assert our_key("dataloader_train.sampler.dataset.config.num_frames") == "data.num_frames"


def test_the_guide_names_keys() -> None:
    text = (Path(__file__).parents[2] / "docs" / "post_training.md").read_text()
    sections = "|".join({key.partition(".")[0] for key in keys() if "." in key})
    named = re.findall(rf"(?<![\w./-])((?:{sections})\.[a-z_.]+)", text)
    assert len(named) > 20
    assert {*map(our_key, named)} <= {*keys()}  # released ones, too


def test_the_two_copies_of_a_released_key_agree() -> None:
    words = ["dataloader_train.dataset.config.dataset_dir=a"]
    twice = [*words, "dataloader_train.sampler.dataset.config.dataset_dir=a"]
    assert read(TEALROBOT, twice).data.dataset_dir == "a"
    with pytest.raises(InputError, match=r"sampler.*is 'b', but .*is 'a'"):
        read(TEALROBOT, [*words, "dataloader_train.sampler.dataset.config.dataset_dir=b"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["trainer.max_itr=5"], ("trainer.max_itr", "trainer.max_iter")),
        (["trainer.max_iter=0"], ("trainer.max_iter is 0", "1")),
        (["trainer.max_iter=many"], ("trainer.max_iter is 'many'", "integer")),
        (["data.video_size=[1]"], ("data.video_size",)),
        (["optimizer.lr=.nan"], ("optimizer.lr", "finite")),
        (["trainer.max_iter"], ("trainer.max_iter", "key.path=value")),
        (["data.fit=squeeze"], ("data.fit is 'squeeze'", "crop", "stretch")),
        (["optimizer.lr=[1"], ("optimizer.lr", "no value")),
        (["optimizer=3"], ("optimizer", "optimizer.KEY=VALUE")),
        (["optimizer.betas=3"], ("optimizer.betas is 3", "[a,b]")),
        (["optimizer.betas=[0.1,0.2,0.3]"], ("optimizer.betas", "2 values")),
        (["optimizer=3", "optimizer.lr.x=2"], ("optimizer",)),
        (["checkpoint.format=nemo"], ("checkpoint.format is 'nemo'", "reference")),
        (["checkpoint.load_training_state=true"], ("load_training_state", "checkpoint.load_path")),
        (["scheduler.f_max=0.5"], ("scheduler.f_max", "scheduler.kind=cosine")),
        (["scheduler.kind=linear", "scheduler.decay=7"], ("scheduler.decay", "kind=linear")),
        (["lora.targets=[to_q]"], ("lora.targets", "lora.rank=0")),
        (["optimizer.lr=0", "trainer.seed=-1"], ("optimizer.lr is 0", "trainer.seed is -1")),
    ],
)
def test_wrong_keys_and_values_are_named(words: list[str], named: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as caught:
        read(TEALROBOT, words)
    for text in named:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("base_4b_example_tealrobotsmall_tp4", "base_4b_example_tealrobot_tp4"),
        ("video2world_7b_example_hdvil", "video2world_7b_example_hdvila"),
        ("something else", "--list"),
    ],
)
def test_unknown_experiments(name: str, nearest: str) -> None:
    with pytest.raises(InputError, match=nearest):
        read(name)


def test_an_experiment_of_ones_own(tmp_path: Path) -> None:
    """It builds on a released one; what it does not state is that one's."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"like: {TEALROBOT}\ndata: {{video_size: [192, 320]}}\n")
    found, theirs = read(str(path)), read(TEALROBOT)
    assert found.job.name == "mine"
    assert found.data.video_size == (192, 320)
    assert found.data.dataset_dir == theirs.data.dataset_dir
    again = tmp_path / "config.yaml"
    again.write_text(found.to_yaml())
    assert read(str(again)) == found
    path.write_text("- a\n")
    with pytest.raises(InputError, match="no experiment"):
        read(str(path))
    path.write_text("a: b: c\n")
    with pytest.raises(InputError, match="not valid YAML"):
        read(str(path))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("like: base_4b_example_tealrobot_tp5\n", "base_4b_example_tealrobot_tp4"),
        ("like: other\n", "builds on itself"),
        ("job: 3\n", "job is 3"),
        ("data: [a]\n", "data is"),
    ],
)
def test_files_that_are_no_experiments(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "other.yaml").write_text("like: mine\n")
    with pytest.raises(InputError, match=named):
        read(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("family", "words", "rise"),
    [
        ("autoregressive", [], 50),
        ("autoregressive", ["trainer.max_iter=40"], 2),
        ("autoregressive", ["trainer.max_iter=19"], 0),
        ("diffusion", ["trainer.max_iter=100000"], 50),
        ("diffusion", ["trainer.max_iter=40", "scheduler.warm_up_steps=7"], 7),
    ],
)
def test_the_rise_of_a_short_run(family: str, words: list[str], rise: int) -> None:
    """A twentieth of the run, however long it was made, unless it is stated; few steps have none.

    The first step of a rise has a rate of 0.
    """
    assert short_form(family, {"model": "x"}, words).scheduler.warmup == rise


def test_a_rate_of_another_kind() -> None:
    """It falls to its own end, not to that of the kind before; the rise stays."""
    before = short_form("diffusion", {}, ["scheduler.warmup=3"]).scheduler
    cosine = short_form("diffusion", {}, ["scheduler.warmup=3", "scheduler.kind=cosine"]).scheduler
    assert (before.kind, before.last) == ("linear", 1)
    assert (cosine.kind, cosine.last, cosine.warmup) == ("cosine", 1e-5, 3)
    stated = short_form("predict2.5", {}, ["scheduler.end=0.1", "scheduler.kind=cosine"])
    assert stated.scheduler.last == 0.1
    line = read(TEALROBOT, ["scheduler.kind=linear"]).scheduler
    assert (line.last, line.top) == (1, 1)


def test_what_makes_another_run() -> None:
    """Rates and sizes do; workers, folders and reports do not."""
    before = read(TEALROBOT).to_json()
    free = ["data.num_workers=5", "trainer.logging_iter=3", "checkpoint.save_iter=7", "job.name=x"]
    assert differences(before, read(TEALROBOT, free)) == []
    assert differences(before, read(TEALROBOT, ["trainer.max_iter=3", "scheduler.warmup=1"])) == []
    fixed = ["optimizer.lr=0.5", "data.video_size=[64,96]", "scheduler.warmup=1"]
    fixed += ["trainer.grad_accum_iter=2", "trainer.reference_state=true"]
    fixed += ["checkpoint.format=reference"]
    lines = differences(before, read(TEALROBOT, fixed))
    assert [line.split()[0] for line in lines] == [
        *("data.video_size", "optimizer.lr", "scheduler.warmup"),
        *("trainer.grad_accum_iter", "trainer.reference_state", "checkpoint.format"),
    ]
    assert "was 0.001 and is 0.5" in lines[1]


def test_states_from_before_a_key() -> None:
    """It was at its default then, in sections and in the recipe, where tuples are lists."""
    recipe = {"scale": 1.0, "conditioning": (0.5, 0.25)}
    defaults = Experiment(objective=recipe)
    now = read(TEALROBOT).model_copy(update={"objective": {**recipe, "noise": 2.0}})
    before = now.to_json()
    before["objective"] = {"noise": 2.0}
    del before["trainer"]["reference_state"], before["lora"]
    assert differences(before, now, defaults) == []
    del before["data"]["prompt_type"]
    before["trainer"]["compile"] = False  # which had no other value than these
    before["scheduler"]["warmup"] = 1  # of short forms of less than 20 steps
    none = {"scheduler": now.scheduler.model_copy(update={"warmup": 0})}
    assert differences(before, now.model_copy(update=none), defaults) == []
    before["scheduler"]["warmup"] = now.scheduler.warmup
    trainer = now.trainer.model_copy(update={"reference_state": True})
    other = {"trainer": trainer, "objective": {**recipe, "scale": 10.0, "noise": 2.0}}
    assert differences(before, now.model_copy(update=other), defaults) == [
        "objective.scale was 1.0 and is 10.0",
        "trainer.reference_state was False and is True",
    ]


def test_where_files_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUTPUT_ROOT", raising=False)
    folder = read(TEALROBOT).folder
    assert folder == Path("checkpoints/posttraining/autoregressive_base") / TEALROBOT
    monkeypatch.setenv("OUTPUT_ROOT", "runs")
    assert read(TEALROBOT, ["job.name=x"]).folder == Path("runs/posttraining/autoregressive_base/x")
