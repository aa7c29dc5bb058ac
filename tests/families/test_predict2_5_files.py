"""Files of Predict2.5: released names, repositories, schedules, diffusers folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tiny.encoders import export_reason1, new_reason1
from tiny.export import draw_weights
from worldline.catalog import ENTRIES, FLOW_MODELS, FLOW_TOKENIZER
from worldline.errors import CheckpointError
from worldline.families.predict2_5.model import FlowDiT
from worldline.family import Opened
from worldline.text.reason1 import RELEASED
from worldline.weights.checkpoint import save

from ..diffusers_layout import diffusers_config, diffusers_tensors
from ..tiny_predict2_5 import CONFIG, POST, PRE, TEXT_LENGTH, TOKENIZER, write_tokenizer
from .worlds import open_named

KNOWN_TIMESTEP = {"karras": 0.1, "shifted": None}


def repository(folder: Path) -> Path:
    return folder / Path(POST.repository).name


def schedule_of(opened: Opened) -> str:
    network = opened["transformer"]
    assert network.known_timestep == KNOWN_TIMESTEP[network.schedule]
    return str(network.schedule)


def test_released_names(tiny_predict2_5: Path) -> None:
    for model in (POST, PRE):
        opened = open_named(model.name, tiny_predict2_5)
        assert opened.name == model.name
        assert opened["transformer"].path == repository(tiny_predict2_5) / model.file
        assert schedule_of(opened) == model.schedule
        assert opened["tokenizer"].config == TOKENIZER
        assert opened["text"].max_length == TEXT_LENGTH
        assert opened.defaults == {}


def test_what_the_names_stand_for() -> None:
    """The table of the released command: only `2B/post-trained` goes by Karras' schedule."""
    assert {model.name for model in FLOW_MODELS} == {
        f"{size}/{kind}-trained" for size in ("2B", "14B") for kind in ("pre", "post")
    }
    assert POST.name == "2B/post-trained"
    for model in FLOW_MODELS:
        assert KNOWN_TIMESTEP[model.schedule] == model.known_timestep
        assert (model.schedule == "karras") == (model is POST)
        [entry] = [entry for entry in ENTRIES if model.repository in entry.folders]
        assert model.file in [file.name for file in entry.files]


def test_folders_of_a_repository(own_predict2_5: Path) -> None:
    """Below the checkpoint folder, with its owner's name, and in a hub cache."""
    root, snapshots = repository(own_predict2_5), "models--nvidia--Cosmos-Predict2.5-2B/snapshots"
    for place in (POST.repository, f"{snapshots}/{POST.revision}"):
        other = own_predict2_5 / place
        other.parent.mkdir(parents=True, exist_ok=True)
        root.rename(other)
        opened = open_named(PRE.name, own_predict2_5)
        assert opened["transformer"].path == other / PRE.file
        assert opened["tokenizer"].files == [other / "tokenizer.pth"]
        root = other


def test_a_repository_as_a_path(own_predict2_5: Path) -> None:
    root = repository(own_predict2_5)
    for name in (root, root.name, root / POST.file, (root / POST.file).parent):
        opened = open_named(name, own_predict2_5)
        assert opened["transformer"].path == root / POST.file
        assert schedule_of(opened) == "karras"
    # the tokenizer is found around the model, wherever --checkpoint_dir points
    assert open_named(root / PRE.file, "nowhere")["tokenizer"].files == [root / "tokenizer.pth"]
    shutil.rmtree((root / POST.file).parent)
    assert open_named(root, own_predict2_5)["transformer"].path == root / PRE.file


def test_schedules(own_predict2_5: Path, tmp_path: Path) -> None:
    """By the file's name or its folder's, as chosen or stated, or that of the base model."""
    root = repository(own_predict2_5)
    identifier = Path(POST.file).name.partition("_")[0]
    kept = root / "base" / "post-trained" / identifier / "model_ema_bf16.pt"
    kept.parent.mkdir()
    (root / POST.file).rename(kept)
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copy(kept, mine / "model.pt")
    for name, chosen, schedule in (
        (kept, None, "karras"),
        (mine, None, "shifted"),
        (mine, "karras", "karras"),
        (PRE.name, None, "shifted"),
        (PRE.name, "karras", "karras"),
    ):
        assert schedule_of(open_named(name, own_predict2_5, schedule=chosen)) == schedule
    settings = {"schedule": "karras", "num_video_frames": 9, "height": 32, "width": 48, "fps": 8}
    (mine / "config.json").write_text(json.dumps(settings))
    opened = open_named(mine, own_predict2_5)
    assert schedule_of(opened) == "karras"
    assert opened.defaults == {name: settings[name] for name in settings if name != "schedule"}
    for wrong in ({"schedule": "linear"}, {"fps": "8"}, {"height": -1}):
        (mine / "config.json").write_text(json.dumps({**settings, **wrong}))
        with pytest.raises(CheckpointError, match=rf"config.json: {next(iter(wrong))} is"):
            open_named(mine, own_predict2_5)


@pytest.mark.parametrize("karras", [True, False])
def test_a_folder_of_diffusers(karras: bool, own_predict2_5: Path) -> None:
    model = FlowDiT(CONFIG)
    draw_weights(model)
    folder = own_predict2_5 / "exported"
    (folder / "transformer").mkdir(parents=True)
    save(diffusers_tensors(model), folder / "transformer/diffusion_pytorch_model.safetensors")
    (folder / "transformer/config.json").write_text(json.dumps(diffusers_config(CONFIG)))
    for named in (folder, folder / "transformer"):
        assert schedule_of(open_named(named, own_predict2_5)) == "shifted"
    (folder / "scheduler").mkdir()
    settings = json.dumps({"use_karras_sigmas": karras})
    (folder / "scheduler/scheduler_config.json").write_text(settings)
    opened = open_named(folder, own_predict2_5)
    assert schedule_of(opened) == ("karras" if karras else "shifted")
    assert opened["transformer"].config == CONFIG
    # a repository that holds nothing else is the model that was released so
    shutil.rmtree(repository(own_predict2_5) / "base")
    (folder / "transformer").rename(repository(own_predict2_5) / "transformer")
    assert schedule_of(open_named(POST.name, own_predict2_5)) == "karras"
    with pytest.raises(CheckpointError, match="no 2B/pre-trained"):
        open_named(PRE.name, own_predict2_5)


def test_missing_parts(own_predict2_5: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no 14B/post-trained: there is no base/post-"):
        open_named("14B/post-trained", own_predict2_5)
    shutil.rmtree(own_predict2_5 / RELEASED)
    assert RELEASED in open_named(POST.name, own_predict2_5).missing["text"]
    (repository(own_predict2_5) / "tokenizer.pth").unlink()
    with pytest.raises(CheckpointError, match=rf"no tokenizer .*{FLOW_TOKENIZER[0]}"):
        open_named(POST.name, own_predict2_5)


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ("2B/distilled", [model.name for model in FLOW_MODELS if model.name.startswith("2B/")]),
        ("14B", ["14B/pre-trained", "14B/post-trained"]),
        ("tiny-Cosmos-Predict2.5-2", ["tiny-Cosmos-Predict2.5-2B"]),
        ("Cosmos-Predict2.5-14", ["did you mean Cosmos-Predict2.5-14B"]),
        ("photograph", []),
    ],
)
def test_names_that_are_nearly_right(wrong: str, names: list[str], own_predict2_5: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        open_named(wrong, own_predict2_5)
    for name in (wrong, *names):
        assert name in str(error.value)


def test_other_parts(own_predict2_5: Path) -> None:
    write_tokenizer(own_predict2_5 / "other" / "tokenizer.pth", channels=8)
    opened = open_named(POST.name, own_predict2_5, tokenizer_dir="other")
    assert opened["tokenizer"].config.channels == 8
    export_reason1(new_reason1(), own_predict2_5 / "wide")
    with pytest.raises(CheckpointError, match=r"wide has width 128, .* 32"):
        open_named(POST.name, own_predict2_5, text_encoder_dir="wide")
