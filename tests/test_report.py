"""A recorder of stages that take turns."""

import torch

from worldline.report import Recorder


def test_stages_of_one_name_add_up() -> None:
    recorder = Recorder(torch.device("cpu"))
    for name in ("encode", "tokens", "decode", "tokens", "decode"):
        with recorder.stage(name):
            pass
    assert [stage.name for stage in recorder.stages] == ["encode", "tokens", "decode"]
    tokens = recorder.stages[1]
    with recorder.stage("tokens"):
        sum(range(100_000))
    assert recorder.stages[1].seconds > tokens.seconds
    assert recorder.stages[1].ended >= tokens.ended


def test_one_recorder_after_another() -> None:
    shared, own = (Recorder(torch.device("cpu")) for _ in range(2))
    with shared.stage("tokens"):
        pass
    shared.facts["decoder"] = "plain modules"
    with own.stage("decode"):
        pass
    joined = shared.followed_by(own)
    assert [stage.name for stage in joined.stages] == ["tokens", "decode"]
    assert joined.facts == {"decoder": "plain modules"}
    assert [stage.name for stage in shared.stages] == ["tokens"]
