"""No option of a released script, or of 7f4d740, is lost, retyped or has another default.

`tests/freeze/cli_options.py` wrote the options of 7f4d740. Flags have no defaults of their own: the
help names those of a command's requests, in brackets.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest

from worldline.cli.main import main
from worldline.request import NEGATIVE_PROMPT, VideoRequest

from .freeze.cli_options import commands, default_of, describe

DATA = Path(__file__).parent / "data"
FROZEN = json.loads((DATA / "cli_options.json").read_text())
SCRIPTS = json.loads((DATA / "cli_parity.json").read_text())["scripts"]
COMMANDS = dict(commands(main))
GIVEN_UP = {
    "demo": {"--kind"},  # one world a family by default, all by --all
    "diffusion text2world": {"--input_image_or_video_path"},  # was hidden, and refused
}
WIDER = {("integer", "float")}  # frame rates
# end of a released script's path -> its command
RELEASED = {
    "autoregressive/inference/base.py": "autoregressive base",
    "autoregressive/inference/video2world.py": "autoregressive video2world",
    "diffusion/inference/text2world.py": "diffusion text2world",
    "diffusion/inference/video2world.py": "diffusion video2world",
    "scripts/download_autoregressive.py": "checkpoints download",
    "scripts/download_autoregressive_checkpoints.py": "checkpoints download",
    "scripts/download_diffusion.py": "checkpoints download",
    "scripts/download_diffusion_checkpoints.py": "checkpoints download",
    "scripts/download_tokenizer_checkpoints.py": "checkpoints download",
    "scripts/shard_autoregressive_base_checkpoints.py": "checkpoints shard",
    "scripts/merge_autoregressive_tp_checkpoints.py": "checkpoints merge",
    "cosmos_predict1/tokenizer/inference/video_cli.py": "tokenize reconstruct",
    "examples/inference.py": "predict2.5",
}
# parts of paths of scripts that this version does not stand in for
WITHOUT = (
    *("guardrail/", "prompt_upsampler/", "image_cli.py", "cosmos1/models/tokenizer/"),
    *("multiview", "video2world_action.py", "world_interpolator.py", "_conditioned.py"),
    *("train.py", "jit_cli.py"),
    *("convert_", "example_data.py", "get_t5_", "test_environment.py", "prepare_", "create_"),
    "extract_images",
)
# flags whose default is another one here; docs/migrating.md says why
CHANGED = {
    "checkpoints shard": {"checkpoint_path"},  # which the script requires, for all its default
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
TYPES = {"str": "text", "int": "integer", "float": "float"}
NEWEST = "2025-06-17"


def command_of(path: str) -> str | None:
    found = [command for end, command in RELEASED.items() if path.endswith(end)]
    assert len(found) < 2
    return found[0] if found else None


def options_of(name: str) -> dict[str, click.Parameter]:
    return {spelling: p for p in COMMANDS[name].params for spelling in p.opts}


def check_default(name: str, released: Any, option: click.Parameter) -> None:
    """A number or a single word stays as it is; sentences are tested elsewhere."""
    found = default_of(option)
    if released in (None, "") or " " in str(released):
        return
    if isinstance(released, bool):
        assert released == (str(found) == "True"), name
        return
    words = [number_or_word(word) for word in re.split("[;, ]+", str(found))]
    assert number_or_word(released) in words, f"{name}: {released} was the default, now {found}"


def number_or_word(value: object) -> float | str:
    try:
        return float(str(value))
    except ValueError:
        return str(value).rstrip("/")


# --- of 7f4d740


@pytest.mark.parametrize("command", FROZEN)
def test_options_are_kept(command: str) -> None:
    options = options_of(command)
    negated = {name for option in options.values() for name in option.secondary_opts}
    for frozen in (one for one in FROZEN[command] if not one["argument"]):
        assert negated.issuperset(frozen["off"])
        for name in set(frozen["names"]) - GIVEN_UP.get(command, set()):
            found = describe(options[name])
            for key in ("is_flag", "multiple", "nargs", "required"):
                assert found[key] == frozen[key], name
            types = frozen["type"], found["type"]
            assert types[0] == types[1] or types in WIDER, name
            assert set(found["choices"]) >= set(frozen["choices"]), name
            check_default(name, frozen["default"], options[name])


@pytest.mark.parametrize("command", FROZEN)
def test_arguments_are_kept(command: str) -> None:
    current = [describe(p) for p in COMMANDS[command].params]
    frozen, found = (
        [(one["nargs"], one["required"]) for one in options if one["argument"]]
        for options in (FROZEN[command], current)
    )
    assert frozen == found


# --- of released scripts


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
    """Flags that may stand on the command line."""
    named = (flag for flag in variant["args"] if not flag["positional"])
    return [flag for flag in named if flag.get("group") != "file-only"]


def value_of(flag: dict[str, Any]) -> str | None:
    """A word that a flag takes, not its default if it can be; None where it takes none."""
    if flag["type"] in ("flag", "bool"):
        return None
    if flag["choices"]:
        return min(map(str, flag["choices"]), key=lambda choice: choice == str(flag["default"]))
    if flag["dest"] == "dtype":  # whose words the script checks where it uses them
        return "float32"
    return "3" if flag["type"].startswith(("int", "float")) else "word"


def parsed(name: str, *words: str) -> dict[str, Any]:
    """What a command is called with."""
    above = main.make_context("worldline", [], resilient_parsing=True)
    context = COMMANDS[name].make_context(name, list(words), above, resilient_parsing=not words)
    return context.params


@pytest.mark.parametrize(("name", "variant"), RELEASES)
def test_every_flag_is_taken_in_both_spellings(name: str, variant: dict[str, Any]) -> None:
    for flag in flags_of(variant):
        value = value_of(flag)
        for given in (flag["name"], *flag["aliases"]):
            bare = given.lstrip("-")
            dashes = given.removesuffix(bare)
            for spelled in (bare.replace("_", "-"), bare.replace("-", "_")):
                words = [dashes + spelled, *([] if value is None else [value])]
                found = parsed(name, *words)[flag["dest"]]
                if isinstance(found, tuple):
                    (found,) = found
                wanted: object = not spelled.startswith(("no_", "no-"))
                if value is not None:
                    wanted = type(found)(value)
                assert found == wanted, words


@pytest.mark.parametrize(("name", "variant"), RELEASES)
def test_types_and_defaults_are_the_released_ones(name: str, variant: dict[str, Any]) -> None:
    newest = NEWEST in variant["releases"][-1]
    by_dest = {option.name: option for option in COMMANDS[name].params}
    for flag in flags_of(variant):
        option, dest = by_dest[flag["dest"]], flag["dest"]
        kind, choices = describe(option), set(map(str, flag["choices"] or ()))
        assert kind["multiple"] == (flag["nargs"] in ("*", "+"))
        assert kind["is_flag"] == (flag["type"] == "flag") or flag["type"] == "bool"
        if kind["choices"]:
            assert choices <= set(kind["choices"]) or not choices
        elif (wanted := TYPES.get(flag["type"])) is not None:
            assert wanted == kind["type"] or (wanted, kind["type"]) in WIDER, dest
            if wanted != "text":
                with pytest.raises(click.BadParameter):
                    parsed(name, flag["name"], "word")
        left_out = flag["required"] or dest in CHANGED.get(name, ())
        if not left_out and (newest or dest not in OF_A_GENERATION):
            check_default(dest, flag["default"], option)
        if dest == "negative_prompt" and flag["default"] is not None:
            assert VideoRequest.model_fields[dest].default == NEGATIVE_PROMPT == flag["default"]
