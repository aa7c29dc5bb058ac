"""One description of a request: values are checked at the door, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from worldline.errors import InputError
from worldline.families.autoregressive.request import AROptions, ARRequest
from worldline.families.diffusion.request import DiffusionOptions, DiffusionRequest
from worldline.families.predict2_5.request import FlowOptions, FlowRequest
from worldline.family import FAMILIES, requests_of
from worldline.request import NEGATIVE_PROMPT, LoadOptions, Options, Request, VideoRequest


@pytest.mark.parametrize("kind", [ARRequest, DiffusionRequest, FlowRequest])
def test_without_arguments_a_request_is_the_default(kind: type[Request]) -> None:
    assert dict(kind.parse({})) == {n: f.default for n, f in kind.model_fields.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": ""}, "prompt: it is empty"),
        ({"prompt": " \n"}, "prompt: it is empty"),
        ({"prompt": 3}, "prompt is 3; .* string"),
        ({"negative_prompt": b"x"}, "negative_prompt is b'x'; .* string"),
        ({"prompt": "a \udcff"}, "prompt is .* unicode"),
        ({"num_steps": 0}, "num_steps is 0; .* 1$"),
        ({"num_steps": 1001}, "num_steps is 1001; .* 1000"),
        ({"num_steps": 2.5}, "num_steps is 2.5; .* integer"),
        ({"num_steps": True}, "num_steps is True; .* integer"),
        ({"guidance": -1}, "guidance is -1"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": float("inf")}, "guidance is inf"),
        ({"guidance": "7"}, "guidance is '7'; .* number"),
        ({"guidance": True}, "guidance is True; .* number"),
        ({"guidance": None}, "guidance is None; .* number"),
        ({"seed": -1}, "seed is -1; .* 0$"),
        ({"seed": 2**32}, "seed is 4294967296; .* 4294967296"),
        ({"fps": 0}, "fps is 0"),
        ({"height": 0}, "height is 0"),
        ({"num_video_frames": -3}, "num_video_frames is -3"),
        ({"preview_every": -1}, "preview_every is -1"),
    ],
)
@pytest.mark.parametrize("kind", [DiffusionRequest, FlowRequest])
def test_wrong_values(kind: type[Request], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind.parse(options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (DiffusionRequest, {"num_input_frames": 2}, "num_input_frames is 2; .* 0, 1 or 9"),
        (DiffusionRequest, {"sampler": "heun"}, "sampler is 'heun'; .* 'edm_euler', 'res_2ab'"),
        (DiffusionRequest, {"reinsertion": "april"}, "reinsertion is 'april'; .* 'corrected'"),
        (DiffusionRequest, {"rotary_precision": "float64"}, "rotary_precision is 'float64'"),
        (DiffusionRequest, {"augment_sigma": -0.1}, "augment_sigma is -0.1"),
        (FlowRequest, {"num_input_frames": 2}, r"num_input_frames.* 2; give 1 \+ 4k"),
        (FlowRequest, {"num_input_frames": -3}, "num_input_frames"),
        (FlowRequest, {"chunk_size": 77, "chunk_overlap": 2}, "chunk_overlap.* 2; .* as 1$"),
        (FlowRequest, {"chunk_size": 77, "chunk_overlap": 4}, "chunk_overlap.* 4; .* as 5$"),
        (FlowRequest, {"chunk_size": 77, "chunk_overlap": 0}, "chunk_overlap is 0"),
        (FlowRequest, {"chunk_size": 5, "chunk_overlap": 5}, "chunk_size is 5, .* 5 "),
        (FlowRequest, {"chunk_size": 4, "num_input_frames": 5}, "chunk_size is 4, .* 5 "),
        (FlowRequest, {"chunk_size": 7.5}, "chunk_size is 7.5"),
        (FlowRequest, {"chunk_overlap": 5}, "chunk_overlap is 5.* give chunk_size"),
        (ARRequest, {"temperature": -1}, "temperature is -1"),
        (ARRequest, {"temperature": float("nan")}, "temperature is nan"),
        (ARRequest, {"temperature": "1"}, "temperature is '1'; .* number"),
        (ARRequest, {"top_p": 0}, "top_p is 0"),
        (ARRequest, {"top_p": None}, "top_p is None; .* number"),
        (ARRequest, {"num_input_frames": 5}, "num_input_frames is 5; .* 1 or 9"),
        (ARRequest, {"num_input_frames": "9"}, "num_input_frames is '9'"),
        (ARRequest, {"num_video_frames": 0}, "num_video_frames is 0"),
        (ARRequest, {"decoder_seam": "y"}, "decoder_seam is 'y'; .* 'corrected' or 'as_released'"),
        (ARRequest, {"rollout": "x"}, "rollout is 'x'; .* 'tokens' or 'pixels'"),
        (LoadOptions, {"dtype": torch.int8}, "dtype is 'int8'; .* 'bfloat16'"),
        (LoadOptions, {"checkpoint_dir": " "}, "checkpoint_dir: it is empty"),
        (LoadOptions, {"num_gpus": 0}, "num_gpus is 0; .* 1 or .*'auto'"),
        (LoadOptions, {"num_gpus": "2"}, "num_gpus is '2'; .* integer or .*'auto'"),
        (LoadOptions, {"data_parallel": True}, "data_parallel is True; .* integer"),
        (AROptions, {"batch_size": 0}, "batch_size"),
        (DiffusionOptions, {"generation": "2"}, "generation is '2'; .* '1.0' or 'Predict1'"),
        (
            DiffusionOptions,
            {"text_encoder_dtype": torch.float16},
            "text_encoder_dtype is 'float16'",
        ),
        (FlowOptions, {"schedule": "linear"}, "schedule is 'linear'; .* 'karras' or 'shifted'"),
    ],
)
def test_wrong_values_of_a_family(
    kind: type[Options], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        kind.parse(options)


def test_each_problem_has_its_line_and_the_name_that_the_user_wrote() -> None:
    with pytest.raises(InputError) as error:
        FlowRequest.parse({"guidance": "x", "seed": 1.5, "steps": 3}, "--{}".format)
    guidance, seed, steps = sorted(str(error.value).splitlines())
    assert guidance.startswith("--guidance is 'x'")
    assert seed.startswith("--seed is 1.5")
    assert steps == "--steps: no such option; did you mean num_steps?"
    with pytest.raises(InputError, match=r"sampler: no such option; there are: prompt, .*seed"):
        FlowRequest.parse({"sampler": "res_2ab"})
    # an option is known by the name of its flag
    with pytest.raises(InputError, match="did you mean disable_guardrails"):
        FlowOptions.parse({"disable_guardrailz": True})


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (AROptions, ("tokenizer_dir", "generation", "schedule", "disable_prompt_upsampler")),
        (DiffusionOptions, ("offload_ar_model", "disable_diffusion_decoder", "schedule")),
        (
            FlowOptions,
            ("offload_ar_model", "offload_text_encoder_model", "generation", "text_encoder_dtype"),
        ),
    ],
)
def test_options_of_other_families(kind: type[Options], options: tuple[str, ...]) -> None:
    for name in options:
        with pytest.raises(InputError, match=f"{name}: no such option"):
            kind.parse({name: None})


def test_plain_values_of_numpy_torch_and_pathlib() -> None:
    request = ARRequest.parse(
        {"seed": np.int64(3), "temperature": np.float32(0.5), "num_input_frames": np.int8(9)}
    )
    assert (request.seed, request.temperature, request.num_input_frames) == (3, 0.5, 9)
    assert type(request.seed) is int
    options = DiffusionOptions.parse(
        {"device": torch.device("cpu"), "text_encoder_dtype": torch.bfloat16, "dtype": "float32"}
        | {"tokenizer_dir": Path("a") / "b"}
    )
    assert (options.device, options.text_encoder_dtype) == ("cpu", "bfloat16")
    assert (options.dtype, options.tokenizer_dir) == ("float32", "a/b")


def test_stated_wins_over_the_model_s_over_the_class_s() -> None:
    made = VideoRequest.make({"height": 64}, {"height": 32, "width": 48}, None)
    assert (made.height, made.width, made.num_video_frames) == (64, 48, 93)
    assert made.negative_prompt == NEGATIVE_PROMPT


@pytest.mark.parametrize(
    ("kind", "of_image", "of_video"),
    [(ARRequest, 1, 9), (DiffusionRequest, 1, 1), (FlowRequest, 1, 5)],
)
def test_frames_of_an_input(kind: type[Request], of_image: int, of_video: int) -> None:
    assert kind.make({}, {}, "image").num_input_frames == of_image
    assert kind.make({}, {}, "video").num_input_frames == of_video


@pytest.mark.parametrize(
    ("stated", "input", "message"),
    [
        ({"num_input_frames": 1}, None, "num_input_frames is 1, but there is no input"),
        ({"num_input_frames": 0}, "image", "num_input_frames is 0, but there is an input"),
        ({"num_input_frames": 5}, "image", "num_input_frames is 5, but an image has 1 frame"),
    ],
)
def test_frames_without_an_input(stated: dict[str, Any], input: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        FlowRequest.make(stated, {}, input)


def test_effective_values_are_those_that_decide_the_frames() -> None:
    request = FlowRequest.parse({"preview_every": 3, "guidance": 0})
    unused = {"negative_prompt", "negative_prompt_embeddings"}
    assert request.unused().keys() == unused
    effective = request.effective(unused).keys()
    assert effective == FlowRequest.model_fields.keys() - unused - {"preview_every"}
    other = FlowRequest.parse({"guidance": 0, "negative_prompt": "fog"})
    assert other.effective(other.unused()) == request.effective(request.unused())
    assert FlowRequest.parse({"guidance": 1}).effective({}) != request.effective(request.unused())


def test_offloaded_parts() -> None:
    assert AROptions.parse({}).offloaded == frozenset()
    options = AROptions.parse({"offload_ar_model": True, "offload_tokenizer": True})
    assert options.offloaded == {"offload_ar_model", "offload_tokenizer"}


def test_every_field_is_described() -> None:
    for name in FAMILIES:
        for kind in (requests_of(name).REQUEST, requests_of(name).OPTIONS):
            for line in kind.describe():
                field, _, text = line.partition(": ")
                assert field
                assert text, f"{kind.__name__}.{field}"


def test_a_choice_of_types_is_one_line() -> None:
    with pytest.raises(InputError, match=r"batch_size is '0'; .*'auto' or .* 1$") as raised:
        AROptions.parse({"batch_size": "0"})
    assert str(raised.value).count("\n") == 0
