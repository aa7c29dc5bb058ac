"""Fields of clients to fields of worlds."""

from __future__ import annotations

import re
import tracemalloc
from typing import Any

import pytest

from worldline.serve.errors import ApiError
from worldline.serve.forms import FormText, parse_json
from worldline.serve.objects import model_object, video_object
from worldline.serve.records import Facts, Job
from worldline.serve.schema import as_written, choose_model, flattened, read_fields
from worldline.serve.settings import AppSettings
from worldline.serve.values import convert

_INTEGER = {"type": "integer", "minimum": 1, "maximum": 1000}
FACTS = Facts(
    name="world",
    family="predict2.5",
    inputs=("none", "image"),
    fields={
        "prompt": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "seed": {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**32},
        "num_steps": _INTEGER,
        "num_video_frames": {"type": "integer", "minimum": 1, "maximum": 1 << 20},
        "guidance": {"type": "number", "minimum": 0, "maximum": 100},
        "fps": {"type": "number", "minimum": 1, "maximum": 240},
        "width": _INTEGER,
        "height": _INTEGER,
        "fit": {"enum": ["crop", "pad"]},
        "lossless": {"type": "boolean"},
    },
    limits={"frames_multiple": 4, "max_frames": 93, "prompt": "optional"},
    defaults={"num_frames": 93, "height": 128, "width": 192, "fps": 16.0},
    guardrails=False,
    previews=True,
    max_batch_size=1,
    load_seconds=1.0,
)
FIXED = Facts(**{**vars(FACTS), "fields": {"seed": FACTS.fields["seed"]}})


def stated(facts: Facts = FACTS, **values: Any) -> Any:
    return read_fields(flattened(values), facts).stated


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"steps": 3, "frames": 9}, {"num_steps": 3, "num_video_frames": 9}),
        ({"steps": FormText("3"), "guidance": FormText("2.5")}, {"num_steps": 3, "guidance": 2.5}),
        ({"num_steps": 3, "num_inference_steps": FormText("3")}, {"num_steps": 3}),
        ({"size": "96x64"}, {"width": 96, "height": 64}),
        ({"size": "96x64", "width": 96}, {"width": 96, "height": 64}),
        ({"seconds": "4"}, {"num_video_frames": 65}),
        ({"seconds": 0.001}, {"num_video_frames": 1}),
        ({"seconds": "9999"}, {"num_video_frames": 93}),
        ({"seconds": 1, "fps": 8}, {"num_video_frames": 9, "fps": 8}),
        ({"seconds": 1, "frames": 17}, {"num_video_frames": 17}),
        ({"extra_params": '{"steps": 2}'}, {"num_steps": 2}),
        ({"extra_body": {"steps": 2}, "user": "me", "quality": "high"}, {"num_steps": 2}),
        ({"fit": FormText("pad"), "lossless": FormText("true")}, {"fit": "pad", "lossless": True}),
        ({"seed": 5.0}, {"seed": 5}),
        ({"seed": None, "num_steps": FormText("")}, {}),
        ({"preview_every": 0}, {}),
        ({"prompt": "é 🎈\n"}, {"prompt": "é 🎈\n"}),
    ],
)
def test_fields(values: dict[str, Any], expected: dict[str, Any]) -> None:
    assert stated(**values) == expected


@pytest.mark.parametrize(
    ("values", "code", "param", "words"),
    [
        ({"guidence": 1}, "unknown_parameter", "guidence", "did you mean guidance"),
        ({"temperature": 1}, "unknown_parameter", "temperature", "autoregressive"),
        ({"output_path": "/tmp/x"}, "unknown_parameter", "output_path", "no such field"),
        ({"prompt_embeddings": "x"}, "unknown_parameter", "prompt_embeddings", "no such field"),
        ({"preview_every": 3}, "unknown_parameter", "preview_every", ""),
        ({"steps": 3, "num_steps": 4}, "conflicting_parameters", "num_steps", "3"),
        ({"seconds": 1, "frames": 33}, "conflicting_parameters", "seconds", "33"),
        ({"size": "96x64", "width": 97}, "conflicting_parameters", "width", "97"),
        ({"extra_params": {"seed": 1}, "seed": 2}, "conflicting_parameters", "seed", ""),
        ({"extra_params": {"extra_body": {}}}, "invalid_value", "extra_params", ""),
        ({"extra_params": "[1]"}, "invalid_value", "extra_params", "object"),
        ({"extra_params": "{"}, "invalid_json", None, ""),
        ({"size": "big"}, "invalid_value", "size", "WIDTHxHEIGHT"),
        ({"size": "999999x1"}, "invalid_value", "width", ""),
        ({"seconds": 1e308}, "invalid_value", "seconds", ""),
        ({"seconds": "nan"}, "invalid_value", "seconds", ""),
        ({"seconds": -1}, "invalid_value", "seconds", "above 0"),
        ({"seed": -1}, "invalid_value", "seed", "0"),
        ({"seed": 2**32}, "invalid_value", "seed", "4,294,967,296"),
        ({"seed": True}, "invalid_value", "seed", "whole number"),
        ({"seed": "7"}, "invalid_value", "seed", "whole number"),
        ({"seed": [7]}, "invalid_value", "seed", "whole number"),
        ({"seed": FormText("🎈")}, "invalid_value", "seed", "whole number"),
        ({"guidance": FormText("1e999")}, "invalid_value", "guidance", "number"),
        ({"prompt": 5}, "invalid_value", "prompt", "text"),
        ({"prompt": "  "}, "invalid_value", "prompt", "empty"),
        ({"prompt": "x" * 8001}, "invalid_value", "prompt", "8,000"),
        ({"fit": "stretch"}, "invalid_value", "fit", "crop or pad"),
        ({"metadata": {"a": 1}}, "invalid_value", "metadata", "strings"),
        ({"metadata": {str(n): "" for n in range(17)}}, "invalid_value", "metadata", "16"),
        ({"user": 3}, "invalid_value", "user", "text"),
    ],
)
def test_refusals(values: dict[str, Any], code: str, param: str | None, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        stated(**values)
    assert (caught.value.code, words in caught.value.message) == (code, True), caught.value.message
    assert param is None or caught.value.param in (param, *values)


def test_a_world_of_one_size_and_rate() -> None:
    assert stated(FIXED, size="192x128", fps=16) == {}
    for values in ({"size": "96x64"}, {"height": 64}, {"fps": 24}, {"prompt": "a ball"}):
        with pytest.raises(ApiError) as caught:
            stated(FIXED, **values)
        assert caught.value.param in values


def test_a_required_prompt() -> None:
    facts = Facts(**{**vars(FACTS), "limits": {"prompt": "required"}})
    with pytest.raises(ApiError) as caught:
        stated(facts)
    assert (caught.value.code, caught.value.param) == ("missing_parameter", "prompt")


def test_models() -> None:
    assert choose_model(None, ["a"]) == "a"
    for model, code in (
        (None, "missing_parameter"),
        (3, "invalid_value"),
        ("../../etc", "model_not_found"),
    ):
        with pytest.raises(ApiError) as caught:
            choose_model(model, ["a", "b"])
        assert (caught.value.code, caught.value.param) == (code, "model")


def test_long_names_are_neither_searched_nor_kept() -> None:
    names = [str(number) * 1_000_000 for number in range(9)]

    def refuse(name: str) -> None:
        with pytest.raises(ApiError):
            choose_model(name, ["fake"])
        with pytest.raises(ApiError):
            stated(**{name: 1})

    refuse("before")  # what is imported counts no more
    tracemalloc.start()
    for name in names:
        refuse(name + "x")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1_500_000  # the last one at most
    assert peak < 12_000_000


def test_numbers_in_forms() -> None:
    schema = {"type": "integer"}
    assert convert("n", FormText(" 12 "), schema) == 12
    assert convert("n", FormText("4.0"), schema) == 4
    for text in ("1_000", "٣", "1e3", "0x10", "9" * 40, "--1"):
        with pytest.raises(ApiError):
            convert("n", FormText(text), schema)


@pytest.mark.parametrize(
    "text",
    ["", "{", "NaN", "[" * 100_000, '{"a": 1, "a": 2}', b"\xff", '{"a": ' + "9" * 5000 + "}"],
)
def test_invalid_json(text: Any) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json(text)
    assert caught.value.status == 400


def test_objects_of_clients() -> None:
    request = {"prompt": "a ball", "seed": 3, "chunk_size": None, "prompt_embeddings": None}
    shape = {"num_frames": 33, "height": 128, "width": 192, "fps": 25.0}
    job = Job("video_0", "world", request, shape, input_kind="image", created_at=1.5)
    video = video_object(job, 2, 3.14159)
    assert (video["seconds"], video["size"], video["queue_position"]) == ("1.32", "192x128", 2)
    assert (video["eta_s"], video["created_at"], video["error"]) == (3.1, 1, None)
    assert video["request"] == {
        "model": "world",
        "prompt": "a ball",
        "seed": 3,
        "input_reference": {"input_of": "video_0"},
    }
    settings = AppSettings.parse({"max_frames": 33})
    world = model_object("world", FACTS, 1.0, settings)["worldline"]
    assert world["limits"]["max_frames"] == 33
    assert world["sizes"] == ["192x128"]
    one = {"default": "192x128", "multiple": None, "max_width": 192, "max_height": 128}
    assert world["size"] == one
    limits = {**FACTS.limits, "size_multiple": 16, "max_width": 1920, "max_height": 1088}
    wide = model_object("world", Facts(**{**vars(FACTS), "limits": limits}), 1.0, settings)
    assert wide["worldline"]["size"] == {
        **one,
        "multiple": 16,
        "max_width": 1920,
        "max_height": 1088,
    }
    assert model_object("world", None, 1.0, settings)["worldline"] == {"state": "loading"}


def test_errors_name_what_was_written() -> None:
    limits = {"size_multiple": 16, "max_width": 1920, "max_height": 1088}
    fields = {**FACTS.fields, "width": {}, "height": {}}
    changed = {"fields": fields, "limits": {**FACTS.limits, **limits}}
    facts = Facts(**{**vars(FACTS), **changed})
    for values, param, written, numbers in (
        ({"num_frames": 10}, "num_video_frames", "num_frames", "10"),
        ({"steps": 3}, "num_steps", "steps", "3"),
        ({"size": "1900x1080"}, "height", "size", "1904x1088"),
        ({"size": "9000x4"}, "width", "size", "1920x16"),
        ({"width": 100}, "width", "width", "100"),
    ):
        wanted = read_fields(values, facts)
        with pytest.raises(ApiError) as caught, as_written(wanted, facts):
            raise ApiError("invalid_value", f"{param} is {wanted.stated[param]}; no", param)
        assert caught.value.param == written
        assert re.match(rf"{written}\b", caught.value.message)
        assert numbers in caught.value.message
        assert param == written or param not in caught.value.message
