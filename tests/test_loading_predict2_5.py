"""Which files a name of Predict2.5 leads to, what is refused, and how much memory it needs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny.encoders import export_reason1, new_reason1
from worldline import machine
from worldline.catalog import ENTRIES, FLOW_MODELS, FLOW_TOKENIZER
from worldline.choices import FLOW_OFFLOAD_FLAGS
from worldline.loading import check_frames, fit_entry, memory
from worldline.loading.predict2_5 import (
    FlowFiles,
    FlowParts,
    FlowRules,
    find_predict2_5,
    load_predict2_5,
    plan_predict2_5,
    rules_of,
)
from worldline.machine import Memory

from tiny.export import draw_weights, wan_settings
from worldline import machine
from worldline.catalog import ENTRIES, FLOW_MODELS, FLOW_TOKENIZER
from worldline.errors import CheckpointError, InputError, InsufficientMemoryError
from worldline.families.predict2_5.model import PRESETS, FlowDiT
from worldline.report import Recorder
from worldline.shapes import VideoShape
from worldline.text.reason1 import NUM_PARAMETERS, RELEASED
from worldline.tokenizers.wan.model import WanTokenizer, WanTokenizerConfig
from worldline.tokenizers.wan.weights import key_map
from worldline.weights.write import save

from .diffusers_layout import diffusers_config, diffusers_tensors
from .tiny_predict2_5 import CONFIG, POST, PRE, TEXT_LENGTH, TOKENIZER, write_tokenizer

CPU = torch.device("cpu")
SMALL = VideoShape(9, 32, 48)


def find(name: str | Path, folder: str | Path, **options: Any) -> FlowFiles:
    return find_predict2_5(name, folder, **options)


def repository(folder: Path) -> Path:
    return folder / Path(POST.repository).name


def load(files: FlowFiles, **options: Any) -> FlowParts:
    return load_predict2_5(files, CPU, torch.float32, Recorder(CPU), video=SMALL, **options)


def test_released_names(tiny_predict2_5: Path) -> None:
    for model in (POST, PRE):
        files = find(model.name, tiny_predict2_5)
        assert files.dit.source.path == repository(tiny_predict2_5) / model.file
        assert files.rules == FlowRules(model.schedule, model.known_timestep)
        assert files.config == CONFIG
        assert files.tokenizer_config == TOKENIZER
        assert files.text is not None
        assert files.context_length == TEXT_LENGTH
        assert files.defaults.video == VideoShape(93, 704, 1280)
        assert not files.bundled


def test_what_the_names_stand_for() -> None:
    """The table of the released command: only `2B/post-trained` goes by Karras' schedule."""
    assert {model.name for model in FLOW_MODELS} == {
        f"{size}/{kind}-trained" for size in ("2B", "14B") for kind in ("pre", "post")
    }
    assert POST.name == "2B/post-trained"
    for model in FLOW_MODELS:
        assert rules_of(model.schedule).known_timestep == model.known_timestep
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
        files = find(PRE.name, own_predict2_5)
        assert files.dit.source.path == other / PRE.file
        assert files.tokenizer.source.path == other / "tokenizer.pth"
        root = other


def test_by_path_by_folder_and_by_file(own_predict2_5: Path) -> None:
    root = repository(own_predict2_5)
    for name in (root, root.name, root / POST.file, (root / POST.file).parent):
        files = find(name, own_predict2_5)
        assert files.dit.source.path == root / POST.file
        assert files.rules.schedule == "karras"
    # the tokenizer is found around the model, wherever --checkpoint_dir points
    assert find(root / PRE.file, "nowhere").tokenizer.source.path == root / "tokenizer.pth"
    shutil.rmtree((root / POST.file).parent)
    assert find(root, own_predict2_5).dit.source.path == root / PRE.file


def test_files_of_other_names(own_predict2_5: Path, tmp_path: Path) -> None:
    """The schedule is by the file's name or its folder's, as told, or that of the base model."""
    root = repository(own_predict2_5)
    identifier = Path(POST.file).name.partition("_")[0]
    kept = root / "base" / "post-trained" / identifier / "model_ema_bf16.pt"
    kept.parent.mkdir()
    (root / POST.file).rename(kept)
    assert find(kept, own_predict2_5).rules == rules_of("karras")

    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copy(kept, mine / "model.pt")
    assert find(mine, own_predict2_5).rules == rules_of("shifted")
    assert find(mine, own_predict2_5, schedule="karras").rules == rules_of("karras")
    said = {"schedule": "karras", "num_video_frames": 9, "height": 32, "width": 48, "fps": 8}
    (mine / "config.json").write_text(json.dumps(said))
    files = find(mine, own_predict2_5)
    assert files.rules == rules_of("karras")
    assert files.defaults.video == SMALL
    assert files.defaults.fps == 8
    assert find(PRE.name, own_predict2_5, schedule="karras").rules == rules_of("karras")
    for wrong in ({"schedule": "linear"}, {"fps": "8"}, {"height": -1}):
        (mine / "config.json").write_text(json.dumps({**said, **wrong}))
        with pytest.raises(CheckpointError, match=rf"config.json: {next(iter(wrong))} is"):
            find(mine, own_predict2_5)
    with pytest.raises(InputError, match="schedule is 'linear'; it must be karras or shifted"):
        find(POST.name, own_predict2_5, schedule="linear")


@pytest.mark.parametrize("karras", [True, False])
def test_a_folder_of_diffusers(karras: bool, own_predict2_5: Path) -> None:
    model = FlowDiT(CONFIG)
    draw_weights(model)
    folder = own_predict2_5 / "exported"
    (folder / "transformer").mkdir(parents=True)
    save(diffusers_tensors(model), folder / "transformer/diffusion_pytorch_model.safetensors")
    (folder / "transformer/config.json").write_text(json.dumps(diffusers_config(CONFIG)))
    for named in (folder, folder / "transformer"):
        assert find(named, own_predict2_5).rules == rules_of("shifted")
    (folder / "scheduler").mkdir()
    said = json.dumps({"use_karras_sigmas": karras})
    (folder / "scheduler/scheduler_config.json").write_text(said)
    files = find(folder, own_predict2_5)
    assert files.rules == rules_of("karras" if karras else "shifted")
    assert files.config == CONFIG
    # a repository that holds nothing else is the model that was released so
    shutil.rmtree(repository(own_predict2_5) / "base")
    (folder / "transformer").rename(repository(own_predict2_5) / "transformer")
    assert find(POST.name, own_predict2_5).rules == rules_of("karras")
    with pytest.raises(CheckpointError, match="no 2B/pre-trained"):
        find(PRE.name, own_predict2_5)


def test_what_is_absent(own_predict2_5: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no 14B/post-trained: there is no base/post-"):
        find("14B/post-trained", own_predict2_5)
    with pytest.raises(CheckpointError, match=r"2B/distilled.*released names are 2B/post-tr"):
        find("2B/distilled", own_predict2_5)
    for wrong, meant in (
        ("14B", "14B/post-trained"),
        ("2b/pre-traind", "2B/pre-trained"),
        ("tiny-Cosmos-Predict2.5-2", "tiny-Cosmos-Predict2.5-2B"),
        ("Cosmos-Predict2.5-14", "Cosmos-Predict2.5-14B"),
        ("photograph", ""),
    ):
        with pytest.raises(CheckpointError, match=f"there are: tiny|{wrong}; .*holds") as told:
            find(wrong, own_predict2_5)
        assert str(told.value).count("did you mean ") == bool(meant)
        assert f"did you mean {meant}?" in str(told.value) or not meant
    shutil.rmtree(own_predict2_5 / RELEASED)
    files = find(POST.name, own_predict2_5)
    assert files.text is None
    assert f"no folder {RELEASED}" in files.why_no_text
    (repository(own_predict2_5) / "tokenizer.pth").unlink()
    with pytest.raises(CheckpointError, match=rf"no tokenizer: .*{FLOW_TOKENIZER[0]}"):
        find(POST.name, own_predict2_5)


def test_other_parts(own_predict2_5: Path) -> None:
    write_tokenizer(own_predict2_5 / "other" / "tokenizer.pth", channels=8)
    files = find(POST.name, own_predict2_5, tokenizer_dir="other")
    assert files.tokenizer_config.channels == 8
    few: dict[str, Any] = {"latent_channels": 4, "mean": (0.0,) * 4, "std": (1.0,) * 4}
    tokenizer = WanTokenizer(replace(TOKENIZER, **few))
    draw_weights(tokenizer)
    (own_predict2_5 / "few").mkdir()
    said = json.dumps(wan_settings(tokenizer.config))
    (own_predict2_5 / "few" / "config.json").write_text(said)
    tensors = stored_tensors(tokenizer, key_map(tokenizer.config, True))
    save(tensors, own_predict2_5 / "few" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"latents of 4 channels.*do not belong together"):
        find(POST.name, own_predict2_5, tokenizer_dir="few")
    export_reason1(new_reason1(), own_predict2_5 / "wide")
    with pytest.raises(CheckpointError, match=r"wide has width 128, the world expects"):
        find(POST.name, own_predict2_5, text_encoder_dir="wide")


def test_identity(own_predict2_5: Path) -> None:
    files = find(POST.name, own_predict2_5)
    before = files.identity()
    assert set(before) == {"transformer", "tokenizer", "text_encoder"}
    write_tokenizer(repository(own_predict2_5) / "tokenizer.pth", channels=8)
    after = files.identity()
    assert [part for part in before if before[part] != after[part]] == ["tokenizer"]
    files.dit.source.path.unlink()
    with pytest.raises(CheckpointError, match="cannot be read any more"):
        files.identity()


def test_parts_are_as_stored(tiny_predict2_5: Path) -> None:
    files = find(POST.name, tiny_predict2_5)
    parts = load(files)
    for name, parameter in parts.transformer.module.named_parameters():
        stored = files.dit.source.read(files.dit.keys.released(name))
        assert torch.equal(parameter, stored.float())
        assert not parameter.requires_grad
    assert not parts.tokenizer.module.training


# --- memory


def test_the_plan_of_released_sizes() -> None:
    """Offloading is never worse, and what waits on the host is not on the device."""
    whole = VideoShape(93, 704, 1280)
    options: dict[str, Any] = {"video": whole, "dtype": torch.bfloat16, "text_bytes": 10**10}
    for config in PRESETS.values():
        plan = plan_predict2_5(config, WanTokenizerConfig(), **options)
        assert plan.denoise > memory.count_parameters(FlowDiT, config) * 2 + 10**10
        for count in range(1, 4):
            for flags in combinations(FLOW_OFFLOAD_FLAGS, count):
                less = plan_predict2_5(
                    config, WanTokenizerConfig(), **options, **dict.fromkeys(flags, True)
                )
                assert less.peak <= plan.peak
        light = plan_predict2_5(
            config, WanTokenizerConfig(), **options, **dict.fromkeys(FLOW_OFFLOAD_FLAGS, True)
        )
        weights = memory.count_parameters(FlowDiT, config) * 2
        assert plan.decode - light.decode == weights + 10**10
    large = plan_predict2_5(PRESETS["2B"], WanTokenizerConfig(), **{**options, "text_bytes": 0})
    small = {**options, "text_bytes": 0, "video": VideoShape(93, 352, 640)}
    assert plan_predict2_5(PRESETS["2B"], WanTokenizerConfig(), **small).peak < large.peak
    visited = plan_predict2_5(
        PRESETS["2B"], WanTokenizerConfig(), **options, visitor_bytes=10**11, offload_tokenizer=True
    )
    weights = memory.count_parameters(FlowDiT, PRESETS["2B"]) * 2 + 10**10
    assert visited.peak == visited.visit == weights + 10**11 + memory.workspace(torch.bfloat16)
    # the tokenizer works in pieces: a longer clip needs no more
    longer = {**options, "text_bytes": 0, "video": VideoShape(189, 704, 1280)}
    assert plan_predict2_5(PRESETS["2B"], WanTokenizerConfig(), **longer).decode == large.decode


def test_what_is_planned_for_released_worlds(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the whole encoder, of 28 layers, in bf16 on a GPU."""
    count = NUM_PARAMETERS
    monkeypatch.setattr("worldline.loading.fused", lambda _: True)
    for size in ("2B", "14B"):
        [entry] = [entry for entry in ENTRIES if entry.name == f"Cosmos-Predict2.5-{size}"]
        found = fit_entry(entry, torch.device("cuda"), None)
        assert found is not None
        whole: dict[str, Any] = {"video": VideoShape(93, 704, 1280), "dtype": torch.bfloat16}
        plan = plan_predict2_5(PRESETS[size], WanTokenizerConfig(), text_bytes=2 * count, **whole)
        assert (found.need, found.flags) == (plan.peak, ())
        # a device a little smaller needs a flag, and the plan says which
        less = Memory(plan.peak - 1, plan.peak)
        found = fit_entry(entry, torch.device("cuda"), less)
        assert found is not None
        assert found.fits
        assert found.flags == ("offload_text_encoder",)


def test_a_device_that_is_too_small(tiny_predict2_5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = find(POST.name, tiny_predict2_5)
    monkeypatch.setattr("worldline.loading.memory.device_memory", lambda _: Memory(1000, 1000))
    with pytest.raises(InsufficientMemoryError, match=r"needs about .* of host memory"):
        load(files)


def test_frames_that_find_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are held at last, beside what the world needs where that fits alone."""
    video = VideoShape(1000, 100, 100)
    whole = 3 * 1000 * 100 * 100
    for free, guarded, beside, fits in (
        (whole, False, 0, True),
        (whole - 1, False, 0, False),
        (2 * whole - 1, True, 0, False),
        (2 * whole, True, 0, True),
        (whole + 10, False, 10, True),
        (whole + 10, False, 11, False),
        (whole, False, whole + 1, True),  # no room for the world: told when it is loaded
    ):
        monkeypatch.setattr(machine, "host_memory", partial(Memory, free, 10**10))
        if fits:
            check_frames(video, guarded=guarded, beside=beside)
            continue
        with pytest.raises(InsufficientMemoryError, match=r"^num_video_frames is 1000: ") as told:
            check_frames(video, guarded=guarded, beside=beside)
        assert ("(twice, for the guardrails)" in str(told.value)) == guarded
    monkeypatch.setattr(machine, "host_memory", lambda: None)
    check_frames(video, guarded=True)
