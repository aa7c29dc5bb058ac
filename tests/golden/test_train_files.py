"""Files of checkpoints against those of the reference's own trainers, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.cases import Case, cases
from worldline.parallel.mesh import ALONE
from worldline.shapes import LatentShape
from worldline.train.experiment import Experiment
from worldline.train.training import _checkpoints

CASES = [*cases("ar_ckpt_layouts"), *cases("train_ckpt_layouts")]
# family -> files of the reference that have all weights, and the name of ours of the same
FILES = {
    "autoregressive": ("autoregressive_base/*_tp1/checkpoints/iter_*.pt", "iter_000000007.pt"),
    "diffusion": ("diffusion_*/*/checkpoints/iter_*_reg_model.pt", "iter_000000007_reg_model.pt"),
    "predict2_5": (
        "cosmos_predict_v2p5/video2world/*/checkpoints/iter_*/model_ema_bf16.pt",
        "iter_000000007/model_ema_bf16.pt",
    ),
}
# of a network so narrow that no released one states it
SETTINGS: dict[str, Any] = {"diffusion": {"settings": {"rope_ratio": [1.0, 1.0, 1.0]}}}


def load(path: Path) -> dict[str, Tensor]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    tensors: dict[str, Tensor] = found.get("model", found)
    # counters of the reference alone are left out
    return {name: one for name, one in tensors.items() if not name.startswith("net.accum_")}


@pytest.mark.parametrize("family", FILES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_files_are_those_of_the_reference(case: Case, family: str, tmp_path: Path) -> None:
    """Names, precision and values, of weights that no step has changed."""
    pattern, name = FILES[family]
    sources = [*case.path.rglob(pattern)]
    if not sources:
        pytest.skip("of the other families")
    package = f"worldline.families.{family}"
    module = import_module(f"{package}.objective")
    for source in sources:
        network = import_module(f"{package}.weights").open_network(
            source, **SETTINGS.get(family, {})
        )
        model = network.read("cpu", torch.float32).requires_grad_(True)
        step = module.make_step(model, module.TrainingStep.RECIPE(), LatentShape(1, 4, 4), network)
        training: Any = SimpleNamespace(
            network=network,
            module=module,
            mesh=ALONE,
            folder=tmp_path,
            experiment=Experiment.model_validate({"average": {"enabled": True}}),
        )

        def weights(_: str, step: Any = step) -> Iterator[tuple[str, Tensor]]:
            yield from step.named_parameters()

        _checkpoints(training, step, {}).gather(7, weights, True)()
        found, wanted = load(tmp_path / name), load(source)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert torch.equal(found[key].to(tensor.dtype), tensor), key
        latest = source.parents["/" in name] / "latest_checkpoint.txt"
        ours = (tmp_path / "latest_checkpoint.txt").read_text()
        assert ours == latest.read_text().replace("2", "7")
