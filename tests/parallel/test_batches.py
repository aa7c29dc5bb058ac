"""Groups of processes make different videos of a batch, each as one process makes it, and once."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import worldline
from tests.cli.conftest import WITHOUT_PARTS, run_words
from tests.cli.results import (
    check_mentions,
    check_refused,
    files_in,
    report_of,
    videos,
    write_lines,
)
from tests.conftest import MODEL
from tests.offloading import stand_for_a_gpu
from tests.ranks import Together
from tests.tiny_guards import GUARDRAILS, REFUSED_WORD, SAFE, add_guardrails
from tests.tiny_predict2_5 import POST, SMALL, make_tiny_predict2_5
from worldline import memory
from worldline.errors import Error, NonFiniteError
from worldline.memory import Memory
from worldline.parallel import job
from worldline.parallel.mesh import Axis
from worldline.text.encoder import TextEncoder
from worldline.weights.networks import Network
from worldline.world import World

pytestmark = pytest.mark.slow

PROMPT = f"a green wheel turns beside a {SAFE}"
NAMES = "abcde"
FLOW = ("predict2.5", "--resolution", "32,32", "--num_output_frames", 5, "--num_steps", 2)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world with guardrails."""
    root = tmp_path_factory.mktemp("guarded") / "checkpoints"
    make_tiny_predict2_5(root)
    add_guardrails(root, unknown_is_safe=True)
    return root


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """A file of five samples, a to e."""
    samples = [
        {"name": n, "inference_type": "text2world", "prompt": f"{PROMPT} {n}", "seed": 7 * k}
        for k, n in enumerate(NAMES)
    ]
    return write_lines(tmp_path / "in.jsonl", *samples)


class Run(NamedTuple):
    """A command in one of the processes; prompts that it made videos of, and that it encoded."""

    status: int
    out: str
    err: str
    made: list[str]
    encoded: list[str]


def command(world: Axis, words: Sequence[object], broken: str = "") -> Run:
    """Run a command in a process that outlives it; videos fail whose prompt holds `broken`."""
    made: list[str] = []
    encoded: list[str] = []
    run_batch, embed = World.run_batch, TextEncoder.embed

    def run(self: World, jobs: Any) -> Any:
        made.append(jobs[0].request.prompt or "")
        if broken and broken in made[-1]:
            raise Error(f"{broken} breaks")
        return run_batch(self, jobs)

    def encode(self: TextEncoder, prompts: Sequence[str]) -> Any:
        encoded.extend(prompts)
        return embed(self, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "leave", lambda: None)
        patch.setattr(job, "end", sys.exit)
        patch.setattr(job, "settle", lambda error, status, message: (status, message))
        patch.setattr(World, "run_batch", run)
        patch.setattr(TextEncoder, "embed", encode)
        result = run_words(words)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return Run(result.exit_code, result.stdout, result.stderr, made, encoded)


def hashes(folder: Path, names: str = NAMES) -> dict[str, str]:
    return {name: report_of(folder, name)["frames_sha256"] for name in names}


def test_each_line_is_made_once_and_as_alone(
    two: Together, guarded: Path, lines: Path, tmp_path: Path
) -> None:
    words = (*FLOW, "--checkpoint_dir", guarded, "-i", lines)
    alone = run_words([*words, "-o", tmp_path / "alone" / "out"])
    assert alone.exit_code == 0, alone.stderr
    words = (*words, "--data_parallel", "auto", "-o", tmp_path / "out")
    first, second = two(command, words)
    assert (first.status, second.status) == (0, 0), first.err
    assert second.out == second.err == ""
    assert "2 processes: data parallel 2" in first.err
    assert sorted(first.made + second.made) == [f"{PROMPT} {name}" for name in NAMES]
    assert first.made
    assert second.made
    assert all(f"{name}.mp4: 5 frames" in first.out for name in NAMES)
    assert files_in(tmp_path / "out") == videos(*NAMES)
    assert hashes(tmp_path) == hashes(tmp_path / "alone")

    for name in "bd":
        (tmp_path / "out" / f"{name}.mp4").unlink()
    first, second = two(command, (*words, "--resume"))
    assert sorted(first.made + second.made) == [f"{PROMPT} b", f"{PROMPT} d"]
    assert "5 of 5 videos" in first.out
    assert "2 made now, 3 there before" in first.out
    assert hashes(tmp_path) == hashes(tmp_path / "alone")


def test_a_failure_and_a_refusal_of_any_group_are_those_of_all(
    two: Together, guarded: Path, lines: Path, tmp_path: Path
) -> None:
    samples = lines.read_text().splitlines()
    lines.write_text("\n".join([*samples[:3], samples[3].replace("wheel", REFUSED_WORD)]))
    words = (*FLOW, "--checkpoint_dir", guarded, "-i", lines, "-o", tmp_path / "out")
    words = (*words, "--data_parallel", 2)
    first, second = two(command, words)
    assert first.status == second.status == 3
    assert "1 of 4 inputs were refused, by prompt" in first.err
    assert REFUSED_WORD not in first.err
    assert files_in(tmp_path / "out") == videos(*"abc")
    (tmp_path / "out" / "b.mp4").unlink()
    first, second = two(command, (*words, "--resume"), f"{PROMPT} b")
    assert first.status == second.status == 1
    assert "breaks" in first.err
    assert "1 of 4 inputs failed" in first.err
    assert second.err.count("\n") == 1  # its exit, which the job settles


def test_a_group_of_two_encodes_and_checks_in_one(
    two: Together, guarded: Path, lines: Path, tmp_path: Path
) -> None:
    lines.write_text("\n".join(lines.read_text().splitlines()[:2]))
    words = (*FLOW, "--checkpoint_dir", guarded, "-i", lines, "-o", tmp_path / "out")
    for size, made in ((2, "ab"), (1, "ab")):
        first, second = two(command, (*words, "--context_parallel_size", size))
        assert first.status == second.status == 0, first.err
        assert len(first.made + second.made) == 2 * size  # by both together, or by either
        assert bool(second.encoded) == (size == 1)
        assert files_in(tmp_path / "out") == videos(*made)
        assert len(report_of(tmp_path, "a")["peaks_gb"]) == size
    lines.write_text(lines.read_text().replace("wheel", REFUSED_WORD))
    first, second = two(command, (*words, "--context_parallel_size", 2))
    assert first.status == second.status == 3
    assert first.err.count("refused the prompt") == 2


@pytest.mark.parametrize(
    ("flags", "numbers"),
    [
        (("--data_parallel", 3), "data_parallel 3 2"),
        (("--context_parallel_size", 4), "context_parallel_size 4 2"),
        (("--context_parallel_size", 2, "--data_parallel", 2), "data_parallel 2 parallel_size 2"),
    ],
)
def test_groups_that_processes_do_not_make(
    two: Together,
    flags: tuple[object, ...],
    numbers: str,
    guarded: Path,
    lines: Path,
    tmp_path: Path,
) -> None:
    words = (*FLOW, "--checkpoint_dir", guarded, "-i", lines, "-o", tmp_path / "out", *flags)
    first, second = two(command, words)
    assert first.status == second.status == 2
    check_mentions(first.err, numbers)


def take_own_shard(world: Axis, words: Sequence[object]) -> Run:
    """Run a command in a job whose processes are tasks of Slurm, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_PROCID", str(world.rank))
        patch.setenv("SLURM_NTASKS", str(world.count + 4))
        return command(world, (*words, "--shard", "auto"))


@pytest.mark.parametrize("count", [1, 2])
def test_processes_that_take_different_shards(
    two: Together, count: int, guarded: Path, lines: Path, tmp_path: Path
) -> None:
    lines.write_text("\n".join(lines.read_text().splitlines()[:count]))
    words = (*FLOW, "--checkpoint_dir", guarded, "-i", lines, "-o", tmp_path / "out")
    first, second = two(take_own_shard, (*words, "--data_parallel", 2))
    assert first.status == second.status == 2
    check_mentions(first.err, "different inputs --shard")
    assert not (tmp_path / "out").exists()


def fail_in_step(world: Axis, words: Sequence[object]) -> Run:
    """Run a command in which several videos at once fail."""
    run_batch = World.run_batch

    def run(self: World, jobs: Any) -> Any:
        if len(jobs) > 1:
            raise Error("clips in step fail")
        return run_batch(self, jobs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "run_batch", run)
        return command(world, words)


def test_videos_that_fail_in_step_are_made_one_by_one(
    two: Together, small_world: Path, clip: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copy(clip, tmp_path / "other.mp4"))
    batch = write_lines(tmp_path / "in.jsonl", *({"visual_input": str(x)} for x in (clip, other)))
    words = ("autoregressive", "base", "--checkpoint_dir", small_world, "--ar_model_dir", MODEL)
    words = (*words, *WITHOUT_PARTS, "--batch_input_path", batch, "--batch_size", 2)
    first, second = two(fail_in_step, (*words, "--video_save_folder", tmp_path / "out"))
    assert first.status == second.status == 0, first.err
    assert "clips in step fail; made one by one" in first.err
    assert len(first.made) == len(second.made) == 3
    assert files_in(tmp_path / "out") == {"0.mp4", "0.json", "1.mp4", "1.json"}


def test_one_process_is_one_group(guarded: Path, lines: Path, tmp_path: Path) -> None:
    words = (*FLOW, "--checkpoint_dir", guarded, "-i", lines, "-o", tmp_path / "out")
    check_refused(run_words((*words, "--data_parallel", 3)), "data_parallel 3 1", tmp_path)


def test_one_video_takes_all_processes(
    two: Together, guarded: Path, lines: Path, tmp_path: Path
) -> None:
    lines.write_text(lines.read_text().splitlines()[0])
    words = (*FLOW, "--checkpoint_dir", guarded, "-i", lines, "-o", tmp_path / "out")
    first, second = two(command, (*words, "--data_parallel", 2))
    assert first.status == second.status == 0
    assert "--data_parallel has no effect: there is one input" in first.err
    assert len(first.made + second.made) == 2


def test_a_dry_run_prints_the_plan_and_makes_nothing(
    two: Together,
    guarded: Path,
    lines: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = (*FLOW, "--checkpoint_dir", guarded, "-i", lines, "-o", tmp_path / "out", "--dry_run")
    alone = run_words(words)
    assert alone.exit_code == 0, alone.stderr
    check_mentions(alone.stdout, "guardrail text encode denoise decode GB 5")
    first, second = two(command, (*words, "--offload_text_encoder"))
    assert (first.status, second.status) == (0, 0), first.err
    assert "memory of the first of 2 processes on cpu: " in first.out
    [other] = (line for line in first.out.splitlines() if line.startswith("memory of each other"))
    assert "text" not in other
    assert "guardrail" not in other
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Network, "read", None)  # no weights are read
    monkeypatch.setattr(memory, "host_memory", lambda: Memory(10**6, 10**9))
    small = run_words(words)
    assert small.exit_code == 2
    assert "0.0 of 1.0 GB are free" in small.stdout
    check_mentions(small.stderr, "GB 0.0 1.0")
    (guarded / GUARDRAILS / "blocklist").rename(guarded / "hidden")
    absent = run_words(words)
    (guarded / "hidden").rename(guarded / GUARDRAILS / "blocklist")
    assert absent.exit_code == 2, absent.stdout


def offload(axis: Axis, name: str, root: Path, flags: Sequence[str], request: Any) -> Any:
    """Frames of a world whose parts wait in host memory, and the parts that came to the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLDLINE_CACHE", str(root / f"embeddings-{axis.rank}-{len(flags)}"))
        visits = stand_for_a_gpu(patch) if flags else []
        options = dict.fromkeys((*flags, "disable_guardrail"), True)
        if name == MODEL:
            options["disable_diffusion_decoder"] = True
        world = worldline.load(name, checkpoint_dir=root, device="cpu", **options)
        return world.generate(**request).frames, visits


@pytest.mark.parametrize("name", [POST.name, MODEL])
def test_offloaded_parts_of_several_processes(
    two: Together, name: str, tiny_predict2_5: Path, own_world: Path, clip: Path, tmp_path: Path
) -> None:
    if name == MODEL:
        root, flags = own_world, ["offload_ar_model", "offload_tokenizer"]
        request: dict[str, Any] = {"input": clip, "seed": 3}
        visits = ["CosmosTokenizer", "ARTransformer", "CosmosTokenizer"]
    else:
        root = shutil.copytree(tiny_predict2_5, tmp_path / "root")
        flags = ["offload_text_encoder", "offload_tokenizer", "offload_diffusion_model"]
        request = {"prompt": PROMPT, "num_steps": 2, **SMALL}
        visits = ["Reason1Encoder", "FlowDiT", "WanTokenizer"]
    resident = two(offload, name, root, [], request)[0][0]
    first, second = two(offload, name, root, flags, request)
    assert first[1] == visits
    assert second[1] == [visit for visit in visits if "Reason1" not in visit]
    for frames, _ in (first, second):
        assert np.array_equal(frames, resident)


def use_python(axis: Axis, root: Path, clip: Path) -> dict[str, Any]:
    """What a program sees in each process, where one meets errors that the others do not."""
    options = {"num_steps": 2, **SMALL}
    world = worldline.load(
        POST.name,
        checkpoint_dir=root,
        device="cpu",
        disable_guardrail=True,
        guidance_parallel="off",
    )
    seen: dict[str, Any] = {"video": world.generate(prompt=PROMPT, **options).frames}
    steps = [*world.stream(prompt=PROMPT, preview_every=1, **options)]
    seen["kinds"] = {step.kind for step in steps}
    seen["frames"] = any(step.frames is not None for step in steps)
    seen["previews"] = sum(step.preview is not None for step in steps)
    for name, input in (("absent", clip if axis.first else "absent.mp4"), ("steps", None)):
        wrong = {**options, "num_steps": 2 if input or axis.first else 0}
        with pytest.raises(worldline.InputError) as caught:
            world.generate(input, prompt=PROMPT, **wrong)
        seen[name] = str(caught.value)
    for name, value in (("prompt", f"{PROMPT} {axis.rank}"), ("seed", axis.rank)):
        with pytest.raises(worldline.InputError) as caught:
            world.generate(**{"prompt": PROMPT, **options, name: value})
        seen[name] = str(caught.value)

    def vanish(*_: Any, guarded: bool = True) -> str:
        if not (axis.first or guarded):
            raise FileNotFoundError("its clip has vanished")
        return ""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worldline.world, "fingerprint", vanish)
        with pytest.raises(FileNotFoundError) as lost:
            world.generate(prompt=PROMPT, **options)
    seen["clip"] = str(lost.value)
    network = world.parts.transformer.module
    hook = network.register_forward_hook(lambda *_: torch.full_like(_[2], torch.nan))
    with pytest.raises(NonFiniteError):
        world.generate(prompt=PROMPT, **options)
    hook.remove()
    seen["again"] = np.array_equal(world.generate(prompt=PROMPT, **options).frames, seen["video"])
    return seen


def test_a_program_on_two_processes(two: Together, tiny_predict2_5: Path, clip: Path) -> None:
    first, second = two(use_python, tiny_predict2_5, clip)
    assert np.array_equal(first["video"], second["video"])
    assert first["frames"]
    assert not second["frames"]
    assert (first["previews"], second["previews"]) == (3, 0)
    assert first["kinds"] >= {"text", "denoise", "decode", "done"}
    assert second["kinds"] >= {"text", "denoise"}
    for name, word in (
        ("absent", "absent.mp4"),
        ("steps", "num_steps"),
        ("prompt", "different requests"),
        ("seed", "different requests"),
        ("clip", "vanished"),
    ):
        assert first[name] == second[name]
        assert word in first[name]
    assert first["again"]
    assert second["again"]
