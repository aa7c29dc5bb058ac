"""Every flag of every released script that has a command here is taken, and means the same.

The flags are given as words, in both spellings, and what the command makes of them is compared;
what a flag left out means is compared with the released default, or named here with its reason.
`tests/cli` compares how single options are declared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from worldline.cli.main import main

SCRIPTS = json.loads((Path(__file__).parent / "data" / "cli_parity.json").read_text())["scripts"]
# end of a script's path -> its command
COMMANDS = {
    "autoregressive/inference/base.py": "autoregressive base",
    "autoregressive/inference/video2world.py": "autoregressive video2world",
    "diffusion/inference/text2world.py": "diffusion text2world",
    "diffusion/inference/video2world.py": "diffusion video2world",
    "scripts/download_autoregressive.py": "checkpoints download",
    "scripts/download_autoregressive_checkpoints.py": "checkpoints download",
    "scripts/download_diffusion.py": "checkpoints download",
    "scripts/download_diffusion_checkpoints.py": "checkpoints download",
    "scripts/download_tokenizer_checkpoints.py": "checkpoints download",
    "cosmos_predict1/tokenizer/inference/video_cli.py": "tokenize reconstruct",
    "examples/inference.py": "predict2.5",
}
# parts of paths of scripts that this version does not stand in for
WITHOUT = (
    *("guardrail/", "prompt_upsampler/", "image_cli.py", "cosmos1/models/tokenizer/"),
    *("multiview", "video2world_action.py", "world_interpolator.py", "_conditioned.py"),
    *("train.py", "jit_cli.py", "shard_autoregressive", "merge_autoregressive"),
    *("convert_", "example_data.py", "get_t5_", "test_environment.py", "prepare_", "create_"),
    "extract_images",
)
# flags whose default is another one here; docs/migrating.md says why
CHANGED = {
    "checkpoints download": {"model_sizes", "model_types", "tokenizer_types", "cosmos_version"},
    "tokenize reconstruct": {
        *("video_pattern", "mode", "temporal_window", "dtype", "device", "output_fps"),
    },
    "predict2.5": {"config_file", "keep_going", "offload_guardrail_models"},
}
# flags that name a checkpoint of the release's own generation
OF_A_GENERATION = {
    *("ar_model_dir", "diffusion_transformer_dir", "tokenizer_dir", "prompt_upsampler_dir"),
}
NEWEST = "2025-06-17"


def command_of(path: str) -> str | None:
    found = [command for end, command in COMMANDS.items() if path.endswith(end)]
    assert len(found) < 2
    return found[0] if found else None


def find(words: str) -> click.Command:
    command: click.Command = main
    for word in words.split():
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), word)
        assert found is not None, words
        command = found
    return command


RELEASES = [
    pytest.param(command, variant, id=f"{script['path']}-{variant['releases'][-1][:10]}")
    for script in SCRIPTS
    if (command := command_of(script["path"]))
    for variant in script["variants"]
]


def test_every_script_has_its_command_or_none() -> None:
    for script in SCRIPTS:
        path = script["path"]
        left_out = any(part in path for part in WITHOUT)
        assert left_out != (command_of(path) is not None), path


def flags_of(variant: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what may stand on the command line by its name."""
    named = (flag for flag in variant["args"] if not flag["positional"])
    return [flag for flag in named if flag.get("group") != "file-only"]


def value_of(flag: dict[str, Any]) -> str | None:
    """Return a word that the flag takes, not its default if it can be; None where it takes none."""
    if flag["type"] in ("flag", "bool"):
        return None
    if flag["choices"]:
        return min(map(str, flag["choices"]), key=lambda choice: choice == str(flag["default"]))
    if flag["dest"] == "dtype":  # whose words the script checks where it uses them
        return "float32"
    return "3" if flag["type"].startswith(("int", "float")) else "word"


def parsed(name: str, words: list[str]) -> dict[str, Any]:
    """Return what a command is called with."""
    above = main.make_context("worldline", [], resilient_parsing=True)
    return find(name).make_context(name, words, above, resilient_parsing=not words).params


@pytest.mark.parametrize(("name", "variant"), RELEASES)
def test_every_flag_is_taken_in_both_spellings(name: str, variant: dict[str, Any]) -> None:
    for flag in flags_of(variant):
        value = value_of(flag)
        for given in (flag["name"], *flag["aliases"]):
            bare = given.lstrip("-")
            dashes = given.removesuffix(bare)
            for spelled in (bare.replace("_", "-"), bare.replace("-", "_")):
                words = [dashes + spelled] + ([] if value is None else [value])
                found = parsed(name, words)[flag["dest"]]
                if isinstance(found, tuple):
                    (found,) = found
                wanted: object = not spelled.startswith(("no_", "no-"))
                if value is not None:
                    wanted = type(found)(value)
                assert found == wanted, words


@pytest.mark.parametrize(("name", "variant"), RELEASES)
def test_what_is_left_out_means_the_same(name: str, variant: dict[str, Any]) -> None:
    ours = parsed(name, [])
    newest = NEWEST in variant["releases"][-1]
    for flag in flags_of(variant):
        dest, default = flag["dest"], flag["default"]
        left_out = flag["required"] or dest in CHANGED.get(name, ())
        if left_out or (dest in OF_A_GENERATION and not newest):
            continue
        assert ours[dest] == default, dest


@pytest.mark.parametrize(("name", "variant"), RELEASES)
def test_words_are_no_numbers(name: str, variant: dict[str, Any]) -> None:
    for flag in flags_of(variant):
        if flag["choices"] is None and flag["type"].startswith(("int", "float")):
            with pytest.raises(click.BadParameter):
                parsed(name, [flag["name"], "word"])
