"""The released guides' command lines, as they stand there except for the program, do their work.

They run on worlds with made-up weights under the released names; guardrails and prompt upsamplers
run where the command does not disable them. Downloads come from a hub on this machine. Those of
torchrun run on two processes in place of eight. What trains, shards or merges has its own tests.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import worldline.downloads
from worldline.catalog import FLOW_MODELS
from worldline.downloads import sources
from worldline.video.read import probe
from worldline.video.write import write_video

from .cli.conftest import run_words
from .conftest import MODEL, moving
from .fake_hub import FakeHub, serving
from .guardrails.test_load import put
from .tiny_decoder import DECODER, OLD_DECODER
from .tiny_decoder import VIDEO2WORLD as AR_VIDEO2WORLD
from .tiny_diffusion import CONTINUOUS, TEXT2WORLD, VIDEO2WORLD
from .tiny_guards import add_aegis, add_guardrails, add_upsampler
from .tiny_predict2_5 import SMALL, write_transformer

# what stands for the program of each script
PROGRAMS = {
    "cosmos_predict1/autoregressive/inference/base.py": "autoregressive base",
    "cosmos_predict1/autoregressive/inference/video2world.py": "autoregressive video2world",
    "cosmos_predict1/diffusion/inference/text2world.py": "diffusion text2world",
    "cosmos_predict1/diffusion/inference/video2world.py": "diffusion video2world",
    "cosmos1/models/autoregressive/inference/base.py": "autoregressive base",
    "cosmos1/models/autoregressive/inference/video2world.py": "autoregressive video2world",
    "scripts/download_autoregressive_checkpoints.py": "checkpoints download",
    "scripts/download_diffusion_checkpoints.py": "checkpoints download",
    "cosmos1/scripts/download_autoregressive.py": "checkpoints download --cosmos_version 1.0",
    "examples/inference.py": "predict2.5",
    "scripts/shard_autoregressive_base_checkpoints.py": "checkpoints shard",
    "scripts/merge_autoregressive_tp_checkpoints.py": "checkpoints merge",
}
# of scripts of the guides that are no business of this file
ELSEWHERE = {"cosmos_predict1/autoregressive/train.py"}

MOVING_CAR = (
    "A video recorded from a moving vehicle's perspective, capturing roads, buildings, landscapes, "
    "and changing weather and lighting conditions."
)

# guide -> name of the example -> its command
GENERATE: dict[str, dict[str, str]] = {
    "inference_autoregressive_base": {
        "single": """
            cosmos_predict1/autoregressive/inference/base.py --checkpoint_dir checkpoints
            --ar_model_dir Cosmos-Predict1-4B --input_type video --input_image_or_video_path
            assets/autoregressive/input.mp4 --top_p 0.8 --temperature 1.0
            --offload_diffusion_decoder --offload_tokenizer --video_save_name autoregressive-4b""",
        "batch": """
            cosmos_predict1/autoregressive/inference/base.py --checkpoint_dir checkpoints
            --ar_model_dir Cosmos-Predict1-4B --batch_input_path
            assets/autoregressive/batch_inputs/base.jsonl --top_p 0.8 --temperature 1.0
            --offload_diffusion_decoder --offload_tokenizer --video_save_folder
            autoregressive-4b-batch""",
    },
    "inference_autoregressive_video2world": {
        "single": f"""
            cosmos_predict1/autoregressive/inference/video2world.py --checkpoint_dir checkpoints
            --ar_model_dir Cosmos-Predict1-5B-Video2World --input_type text_and_video
            --input_image_or_video_path assets/autoregressive/input.mp4 --prompt "{MOVING_CAR}"
            --top_p 0.7 --temperature 1.0 --offload_diffusion_decoder --offload_tokenizer
            --video_save_name autoregressive-video2world-5b""",
    },
    "inference_diffusion_video2world": {
        "single": """
            cosmos_predict1/diffusion/inference/video2world.py --checkpoint_dir checkpoints
            --diffusion_transformer_dir Cosmos-Predict1-7B-Video2World --input_image_or_video_path
            assets/diffusion/video2world_input0.jpg --num_input_frames 1 --offload_prompt_upsampler
            --video_save_name diffusion-video2world-7b""",
        "offloaded": """
            cosmos_predict1/diffusion/inference/video2world.py --checkpoint_dir checkpoints
            --diffusion_transformer_dir Cosmos-Predict1-14B-Video2World --input_image_or_video_path
            assets/diffusion/video2world_input0.jpg --num_input_frames 1 --offload_tokenizer
            --offload_diffusion_transformer --offload_text_encoder_model --offload_prompt_upsampler
            --offload_guardrail_models --video_save_name diffusion-video2world-14b""",
        "batch": """
            cosmos_predict1/diffusion/inference/video2world.py --checkpoint_dir checkpoints
            --diffusion_transformer_dir Cosmos-Predict1-7B-Video2World --batch_input_path
            assets/diffusion/batch_inputs/video2world_ps.jsonl --num_input_frames 9
            --offload_prompt_upsampler --video_save_folder diffusion-video2world-7b-batch""",
        "batch without upsampler": """
            cosmos_predict1/diffusion/inference/video2world.py --checkpoint_dir checkpoints
            --diffusion_transformer_dir Cosmos-Predict1-7B-Video2World --batch_input_path
            assets/diffusion/batch_inputs/video2world_wo_ps.jsonl --num_input_frames 9
            --disable_prompt_upsampler --video_save_folder diffusion-video2world-7b-batch-wo-ps""",
        "post-trained": """
            cosmos_predict1/diffusion/inference/video2world.py --checkpoint_dir checkpoints
            --diffusion_transformer_dir Cosmos-Predict1-7B-Video2World_post-trained
            --input_image_or_video_path assets/diffusion/video2world_input0.jpg --num_input_frames 1
            --offload_prompt_upsampler --video_save_name diffusion-video2world-7b-post-trained""",
    },
    "inference_diffusion_text2world": {
        "single": """
            cosmos_predict1/diffusion/inference/text2world.py --checkpoint_dir checkpoints
            --diffusion_transformer_dir Cosmos-Predict1-7B-Text2World --prompt "A sleek, humanoid
            robot stands in a vast warehouse." --offload_prompt_upsampler --video_save_name
            diffusion-text2world-7b""",
    },
    "Cosmos 1.0 autoregressive": {
        "base 4B": """
            cosmos1/models/autoregressive/inference/base.py --input_type=video
            --input_image_or_video_path=cosmos1/models/autoregressive/assets/v1p0/input.mp4
            --video_save_name=Cosmos-1.0-Autoregressive-4B
            --ar_model_dir=Cosmos-1.0-Autoregressive-4B --top_p=0.8 --temperature=1.0""",
        "base 12B, offloaded": """
            cosmos1/models/autoregressive/inference/base.py --input_type=video
            --input_image_or_video_path=cosmos1/models/autoregressive/assets/v1p0/input.mp4
            --video_save_name=Cosmos-1.0-Autoregressive-12B
            --ar_model_dir=Cosmos-1.0-Autoregressive-12B --top_p=0.9 --temperature=1.0
            --offload_guardrail_models --offload_diffusion_decoder --offload_ar_model
            --offload_tokenizer""",
        "base 12B, batch": """
            cosmos1/models/autoregressive/inference/base.py --input_type=video
            --batch_input_path=cosmos1/models/autoregressive/assets/v1p0/batch_inputs/base.jsonl
            --video_save_folder=outputs/Cosmos-1.0-Autoregressive-12B
            --ar_model_dir=Cosmos-1.0-Autoregressive-12B --top_p=0.9 --temperature=1.0""",
        "video2world 5B": f"""
            cosmos1/models/autoregressive/inference/video2world.py --input_type=text_and_video
            --input_image_or_video_path=cosmos1/models/autoregressive/assets/v1p0/input.mp4
            --prompt="{MOVING_CAR}" --video_save_name=Cosmos-1.0-Autoregressive-5B-Video2World
            --ar_model_dir=Cosmos-1.0-Autoregressive-5B-Video2World --top_p=0.7
            --temperature=1.0""",
        "video2world 13B, offloaded": f"""
            cosmos1/models/autoregressive/inference/video2world.py --input_type=text_and_video
            --input_image_or_video_path=cosmos1/models/autoregressive/assets/v1p0/input.mp4
            --prompt="{MOVING_CAR}" --video_save_name=Cosmos-1.0-Autoregressive-13B-Video2World
            --ar_model_dir=Cosmos-1.0-Autoregressive-13B-Video2World --top_p=0.8 --temperature=1.0
            --offload_guardrail_models --offload_diffusion_decoder --offload_ar_model
            --offload_tokenizer --offload_text_encoder_model""",
        "video2world 13B, batch": """
            cosmos1/models/autoregressive/inference/video2world.py --input_type=text_and_video
            --batch_input_path=cosmos1/models/autoregressive/assets/v1p0/batch_inputs/video2world.jsonl
            --video_save_folder=outputs/Cosmos-1.0-Autoregressive-13B-Video2World
            --ar_model_dir=Cosmos-1.0-Autoregressive-13B-Video2World --top_p=0.8 --temperature=1.0
            --offload_guardrail_models""",
    },
}
POURING, LONG, WELDING = "robot_pouring", "bus_terminal_long", "robot_welding"
# of Predict2.5: command -> what it makes, and from what
SAMPLES: dict[str, dict[str, str]] = {
    "examples/inference.py -i assets/base/robot_pouring.json -o outputs/base_video2world "
    "--inference-type=video2world": {POURING: "video2world"},
    "examples/inference.py -i assets/base/robot_pouring.json -o outputs/base_text2world "
    "--inference-type=text2world": {POURING: "text2world"},
    "examples/inference.py -i assets/base/robot_pouring.json -o outputs/base_image2world "
    "--inference-type=image2world": {POURING: "image2world"},
    "examples/inference.py -i assets/base/bus_terminal_long.json -o outputs/autoregressive": {
        LONG: "video2world"
    },
    "examples/inference.py -i assets/base/*.json -o outputs/base": {
        POURING: "video2world",
        LONG: "video2world",
        WELDING: "image2world",
    },
    "examples/inference.py -i assets/base/robot_pouring.json -o outputs/base_video2world "
    "--model=14B/post-trained": {POURING: "video2world"},
    # of the first release
    "examples/inference.py assets/base/image2world.json outputs/image2world": {
        WELDING: "image2world"
    },
}
# what torchrun runs -> videos below the working directory
SEVERAL: dict[str, tuple[str, ...]] = {
    """cosmos_predict1/diffusion/inference/text2world.py --num_gpus 2 --checkpoint_dir checkpoints
    --diffusion_transformer_dir Cosmos-Predict1-7B-Text2World --prompt "A sleek, humanoid robot."
    --offload_prompt_upsampler --video_save_name diffusion-text2world-7b""": (
        "outputs/diffusion-text2world-7b",
    ),
    """cosmos_predict1/diffusion/inference/video2world.py --num_gpus 2 --checkpoint_dir checkpoints
    --diffusion_transformer_dir Cosmos-Predict1-7B-Video2World --input_image_or_video_path
    assets/diffusion/video2world_input0.jpg --num_input_frames 1 --offload_prompt_upsampler
    --video_save_name diffusion-video2world-7b""": ("outputs/diffusion-video2world-7b",),
    """cosmos_predict1/autoregressive/inference/base.py --num_gpus 2 --checkpoint_dir checkpoints
    --ar_model_dir Cosmos-Predict1-4B --batch_input_path
    assets/autoregressive/batch_inputs/base.jsonl --top_p 0.8 --temperature 1.0
    --offload_diffusion_decoder --offload_tokenizer --video_save_folder ar-4b-batch""": (
        *("ar-4b-batch/0", "ar-4b-batch/1"),
    ),
    f"""cosmos_predict1/autoregressive/inference/video2world.py --num_gpus 2
    --checkpoint_dir checkpoints --ar_model_dir Cosmos-Predict1-5B-Video2World
    --input_type text_and_video --input_image_or_video_path assets/autoregressive/input.mp4
    --prompt "{MOVING_CAR}" --top_p 0.7 --temperature 1.0 --offload_diffusion_decoder
    --offload_tokenizer --video_save_name ar-5b""": ("outputs/ar-5b",),
    "examples/inference.py -i assets/base/robot_pouring.json -o outputs/base "
    "--inference-type=video2world": ("outputs/base/robot_pouring",),
    "examples/inference.py -i assets/base/*.json -o outputs/groups --context-parallel-size=1": (
        *("outputs/groups/robot_pouring", "outputs/groups/bus_terminal_long"),
        "outputs/groups/robot_welding",
    ),
}
# command -> folders that must be there
DOWNLOAD: dict[str, tuple[str, ...]] = {
    "scripts/download_autoregressive_checkpoints.py --model_sizes 4B 12B "
    "--checkpoint_dir checkpoints": ("Cosmos-Predict1-4B", "Cosmos-Predict1-12B"),
    "scripts/download_autoregressive_checkpoints.py --model_sizes 5B 13B "
    "--checkpoint_dir checkpoints": (
        *("Cosmos-Predict1-5B-Video2World", "google-t5/t5-11b", "meta-llama/Llama-Guard-3-8B"),
    ),
    "scripts/download_autoregressive_checkpoints.py --model_sizes 4B": ("Cosmos-Predict1-4B",),
    "scripts/download_diffusion_checkpoints.py --model_sizes 7B 14B --model_types Video2World "
    "--checkpoint_dir checkpoints": (
        *("Cosmos-Predict1-7B-Video2World", "Cosmos-Predict1-14B-Video2World", "Pixtral-12B"),
    ),
    "cosmos1/scripts/download_autoregressive.py --model_sizes 4B 5B 12B 13B": (
        *("Cosmos-1.0-Autoregressive-4B", "Cosmos-1.0-Autoregressive-13B-Video2World"),
        *("Cosmos-1.0-Tokenizer-DV8x16x16", OLD_DECODER, "Cosmos-1.0-Guardrail"),
    ),
}
# before and behind a training on several GPUs, here two, whose last parts the first ones stand for
PARTS = (
    """scripts/shard_autoregressive_base_checkpoints.py --checkpoint_path
    checkpoints/Cosmos-Predict1-4B/model.pt --tensor_parallel_size 2 --model_size 4b""",
    """scripts/merge_autoregressive_tp_checkpoints.py --checkpoint_path
    checkpoints/Cosmos-Predict1-4B/model.pt --output_path
    checkpoints/Cosmos-Predict1-4B-Base_post-trained/model.pt --model_size 4b
    --tensor_parallel_size 2""",
    """cosmos_predict1/autoregressive/inference/base.py --checkpoint_dir checkpoints --ar_model_dir
    Cosmos-Predict1-4B-Base_post-trained --input_type video --input_image_or_video_path
    assets/autoregressive/input.mp4 --top_p 0.8 --temperature 1.0 --offload_diffusion_decoder
    --offload_tokenizer --video_save_name post-trained-4b""",
)


def words_of(command: str) -> list[str]:
    """Words of a command line, `worldline`'s in place of the program's."""
    script, *words = shlex.split(" ".join(command.split()))
    return [*PROGRAMS[script].split(), *words]


def add_predict2_5(place: Path, made: Path) -> None:
    """Add models of Predict2.5 that make small videos, and samples in the guide's form."""
    root = place / "checkpoints"
    shutil.copytree(made, root, dirs_exist_ok=True)
    small, large = FLOW_MODELS[0], FLOW_MODELS[2]
    for model in (small, large):
        file = root / Path(model.repository).name / model.file
        if model is large:
            write_transformer(file)
        (file.parent / "config.json").write_text(json.dumps({**SMALL, "num_steps": 1}))
    folder = place / "assets" / "base"
    folder.mkdir()
    shutil.copy(place / "assets" / "autoregressive" / "input.mp4", folder / "robot_pouring.mp4")
    for name, more in (
        (POURING, {}),
        (LONG, {"enable_autoregressive": True, "num_output_frames": 20}),
    ):
        lines = json.dumps(
            {
                "inference_type": "video2world",
                "name": name,
                "prompt": MOVING_CAR,
                "input_path": "robot_pouring.mp4",
                **more,
            },
            indent=2,
        )
        commented = lines.replace('  "name"', '  // Sample name\n  "name"')
        (folder / f"{name}.json").write_text(commented)
    sample = {"prompt": MOVING_CAR, "input_path": "../diffusion/video2world_input0.jpg"}
    (folder / "image2world.json").write_text(
        json.dumps({"inference_type": "image2world", "samples": {WELDING: sample}})
    )


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    whole_world: Path,
    tiny_diffusion: Path,
    tiny_predict2_5: Path,
) -> Path:
    """A folder with checkpoints and assets under the released names."""
    place = tmp_path_factory.mktemp("released")
    root = place / "checkpoints"
    shutil.copytree(whole_world, root)
    shutil.copytree(tiny_diffusion, root, dirs_exist_ok=True)
    same = {
        "Cosmos-Predict1-12B": MODEL,
        "Cosmos-1.0-Autoregressive-4B": MODEL,
        "Cosmos-1.0-Autoregressive-12B": MODEL,
        "Cosmos-1.0-Autoregressive-5B-Video2World": AR_VIDEO2WORLD,
        "Cosmos-1.0-Autoregressive-13B-Video2World": AR_VIDEO2WORLD,
        "Cosmos-1.0-Tokenizer-DV8x16x16": "Cosmos-Tokenize1-DV8x16x16-720p",
        "Cosmos-1.0-Tokenizer-CV8x8x8": CONTINUOUS,
        OLD_DECODER: DECODER,
        "Cosmos-Predict1-14B-Video2World": VIDEO2WORLD,
        "Cosmos-Predict1-7B-Video2World_post-trained": VIDEO2WORLD,
        "Cosmos-Predict1-14B-Text2World": TEXT2WORLD,
    }
    for name, other in same.items():
        (root / name).symlink_to(root / other)
    folder = add_guardrails(root, unknown_is_safe=True)
    put(folder, root / "Cosmos-1.0-Guardrail")
    add_aegis(root / "Cosmos-1.0-Guardrail", "safe")
    for describes in (False, True):
        add_upsampler(root, describes=describes)

    clip = place / "assets" / "autoregressive" / "input.mp4"
    write_video(moving(), clip, 25)
    from PIL import Image

    (place / "assets" / "diffusion" / "batch_inputs").mkdir(parents=True)
    Image.fromarray(moving(1)[0]).save(place / "assets" / "diffusion" / "video2world_input0.jpg")
    for kind, name, prompt in (
        ("autoregressive", "base", None),
        ("autoregressive", "video2world", MOVING_CAR),
        ("diffusion", "video2world_ps", None),
        ("diffusion", "video2world_wo_ps", MOVING_CAR),
    ):
        line = {"visual_input": "assets/autoregressive/input.mp4"}
        if prompt is not None:
            line["prompt"] = prompt
        lines = place / "assets" / kind / "batch_inputs" / f"{name}.jsonl"
        lines.parent.mkdir(parents=True, exist_ok=True)
        lines.write_text(f"{json.dumps(line)}\n" * 2)
    (place / "assets" / "diffusion" / "batch_inputs" / "text2world.jsonl").write_text(
        json.dumps({"prompt": MOVING_CAR}) + "\n"
    )
    add_predict2_5(place, tiny_predict2_5)
    old = place / "cosmos1" / "models" / "autoregressive" / "assets"
    old.mkdir(parents=True)
    (old / "v1p0").symlink_to(place / "assets" / "autoregressive")
    return place


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work there; what is made is gone afterwards."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_CACHE", str(place / "no-cache"))
    before = {path.name for path in place.iterdir()}
    yield place
    for path in place.iterdir():
        if path.name not in before:
            shutil.rmtree(path)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, id=f"{guide}: {name}")
        for guide, examples in GENERATE.items()
        for name, command in examples.items()
    ],
)
def test_generate(command: str, here: Path) -> None:
    words = words_of(command)
    result = run_words(words)
    assert result.exit_code == 0, result.stderr
    given = dict(
        word.lstrip("-").split("=", 1) for word in words if word.startswith("--") and "=" in word
    )
    for word, following in pairwise(words):
        if word.startswith("--") and "=" not in word and not following.startswith("--"):
            given[word.lstrip("-")] = following
    folder = here / given.get("video_save_folder", "outputs")
    batch = "batch_input_path" in given
    names = ["0", "1"] if batch else [given.get("video_save_name", "output")]
    for name in names:
        video = folder / f"{name}.mp4"
        assert probe(video).frames > 1
        report = json.loads(video.with_suffix(".json").read_text())
        old = "cosmos1" in command.split()[0]
        assert report["guardrail"] == ("1.0" if old else "Predict1")
        assert [check["guard"] for check in report["guardrail_checks"]][-2:] == [
            *("video_content_safety_filter", "face_blur_filter"),
        ]
        upsamples = "diffusion" in words and "--disable_prompt_upsampler" not in words
        assert report.get("prompt_upsampler_ran", False) == upsamples
    assert len([*folder.glob("*.mp4")]) == len(names)


@pytest.mark.parametrize("command", SAMPLES)
def test_predict2_5(command: str, here: Path) -> None:
    words = words_of(command)
    result = run_words(words)
    assert result.exit_code == 0, result.stderr
    folder = here / next(word for word in words if word.startswith("outputs/"))
    assert {video.stem for video in folder.glob("*.mp4")} == SAMPLES[command].keys()
    for name, kind in SAMPLES[command].items():
        report = json.loads((folder / f"{name}.json").read_text())
        assert report["sample"]["inference_type"] == kind
        assert report["model"] == ("14B" if "14B" in command else "2B") + "/post-trained"
        assert report["request"]["num_video_frames"] == probe(folder / f"{name}.mp4").frames
        assert report["guardrail"] == "predict2.5"
        assert [check["guard"] for check in report["guardrail_checks"]] == [
            *("blocklist", "qwen3guard", "video_content_safety_filter", "face_blur_filter"),
        ]


def test_parts_of_a_model(here: Path) -> None:
    for command in PARTS:
        result = run_words(words_of(command))
        assert result.exit_code == 0, result.stderr
    assert probe(here / "outputs" / "post-trained-4b.mp4").frames


@pytest.mark.slow
@pytest.mark.parametrize("form", ["worldline", "reference"])
def test_post_training(form: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's steps from a training to a video, of the file as it is and of merged parts."""
    monkeypatch.setenv("OUTPUT_ROOT", "outputs/runs")
    experiment = "base_4b_example_tealrobotsmall_tp1"
    write_video(moving(17), here / "outputs" / "clips" / "a.mp4", 25)
    words = f"""--config=cosmos_predict1/autoregressive/configs/config.py --device cpu --
        experiment={experiment} dataloader_train.dataset.config.dataset_dir=outputs/clips
        dataloader_train.dataset.config.video_size=[32,48] data.num_frames=17 trainer.max_iter=2
        trainer.precision=float32 data.num_workers=0 checkpoint.format={form}
        optimizer.lr=0.1 scheduler.warmup=1"""
    result = run_words(["train", *words.split()])
    assert result.exit_code == 0, result.stderr
    checkpoints = Path("outputs/runs/posttraining/autoregressive_base", experiment, "checkpoints")
    file = checkpoints / "iter_000000002.pt"
    target = Path("outputs/models/Cosmos-Predict1-4B-Base_post-trained")
    target.mkdir(parents=True)
    for name in ("Cosmos-Tokenize1-DV8x16x16-720p", DECODER, "Cosmos-Tokenize1-CV8x8x8-720p"):
        (target.parent / name).symlink_to(here / "checkpoints" / name)
    last = words_of(
        PARTS[-1].replace("--checkpoint_dir checkpoints", "--checkpoint_dir outputs/models")
    )
    frames = []
    for turn in ("copied", "merged"):
        if turn == "copied":
            shutil.copy(file, target / "model.pt")
            shutil.copy(checkpoints / "config.json", target)
        else:
            scripts = (
                f"scripts/shard_autoregressive_base_checkpoints.py -c {file} -t 2 -s 4b",
                f"scripts/merge_autoregressive_tp_checkpoints.py -c {file} -t 2 -s 4b "
                f"-o {target / 'model.pt'}",
            )
            for script in scripts:
                result = run_words(words_of(script))
                assert result.exit_code == 0, result.stderr
        result = run_words([*last, "--seed", "1", "--disable_guardrail"])
        assert result.exit_code == 0, result.stderr
        report = json.loads(Path("outputs/post-trained-4b.json").read_text())
        frames.append(report["frames_sha256"])
    assert frames[0] == frames[1]


@pytest.mark.slow
@pytest.mark.ranks
def test_torchrun(here: Path) -> None:
    """One torchrun for all command lines, which saves the start of its processes."""
    program = "import json, sys\nfrom worldline.cli.main import main\nfor line in sys.argv[1:]:\n"
    program += "    try: main(json.loads(line))\n    except SystemExit as end: assert not end.code"
    (here / "outputs").mkdir()
    (here / "outputs" / "program.py").write_text(program)
    lines = [json.dumps([*words_of(command), "--device", "cpu"]) for command in SEVERAL]
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *words, "outputs/program.py", *lines],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    videos = [name for names in SEVERAL.values() for name in names]
    lines = [line.partition(".mp4: ")[0] for line in done.stdout.splitlines() if ".mp4" in line]
    assert sorted(lines) == sorted(videos)  # each once, by the first process
    for name in videos:
        report = json.loads((here / f"{name}.json").read_text())
        assert probe(here / f"{name}.mp4").frames == report["request"]["num_video_frames"]
        assert report["guardrail_checks"]


def test_the_batch_of_the_guide_that_has_no_videos(here: Path) -> None:
    """The guide of the base models names a file of prompts alone, with which its script fails."""
    command = GENERATE["inference_autoregressive_base"]["batch"].replace(
        "assets/autoregressive/batch_inputs/base.jsonl",
        "assets/diffusion/batch_inputs/text2world.jsonl",
    )
    result = run_words(words_of(command))
    assert result.exit_code == 2
    assert 'line 1 (0.mp4): no "visual_input"' in result.stderr


@pytest.mark.parametrize("script", sorted(PROGRAMS))
def test_help(script: str) -> None:
    result = run_words([*PROGRAMS[script].split(), "--help"])
    assert result.exit_code == 0
    assert "--checkpoint_" in result.stdout


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub of every repository that the guides' downloads need, with a little in each file."""
    names = {folder for folders in DOWNLOAD.values() for folder in folders}
    names |= {"Cosmos-Predict1-13B-Video2World", "Cosmos-1.0-Autoregressive-5B-Video2World"}
    names |= {"Cosmos-1.0-Autoregressive-12B"}
    repositories = {}
    for source in sources(sorted(names)):
        files = [pattern.replace("*", "x") for pattern in (*source.fetch[0], "config.json")]
        repositories[source.repository] = {name: name.encode() for name in files}
    monkeypatch.setattr(worldline.downloads, "PAUSE", 0.0)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving(FakeHub(repositories)) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.address)
        yield found


@pytest.mark.parametrize("command", DOWNLOAD)
def test_download(
    command: str, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run_words(words_of(command))
    assert result.exit_code == 0, result.stderr
    for folder in DOWNLOAD[command]:
        assert [*(tmp_path / "checkpoints" / folder).iterdir()], folder
    assert not [*tmp_path.rglob("*.incomplete")]


def test_every_script_of_the_guides_has_its_command() -> None:
    table = json.loads((Path(__file__).parent / "data" / "cli_parity.json").read_text())
    scripts = {script["path"] for script in table["scripts"] if script["seed_docs"]}
    assert scripts <= {*PROGRAMS, *ELSEWHERE}
    commands = [c for examples in GENERATE.values() for c in examples.values()]
    every = (*commands, *SAMPLES, *DOWNLOAD, *PARTS)
    assert {command.split()[0] for command in every} == {*PROGRAMS}
