"""The golden figures: outputs of the authors' implementation, and how their inputs are rebuilt from seeds."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "golden"


def read(name: str) -> Any:
    """The content of ``tests/golden/NAME.json``."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed))


def rand(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=_generator(seed))


def randint(seed: int, high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=_generator(seed))


def made(recipe: str, **names: Any) -> Tensor:
    """The tensor that a recipe of the golden files describes, such as ``randn(7, 1, 3, 65, 81) * 2``."""
    recipe, _, where = recipe.partition(" with 255 where ")
    known = {"randn": randn, "rand": rand, "randint": randint, **names}
    tensor = eval(recipe, known)
    if where:
        tensor[eval(where, known)] = 255
    return tensor


@torch.no_grad()
def fill(model: nn.Module, salt: str = "", gain: float = 0.12) -> nn.Module:
    """Overwrite every weight by numbers that follow from its name; those of the last layer times ``gain``."""
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        r = torch.randn(tensor.shape, generator=_generator(zlib.crc32((salt + name).encode())))
        if tensor.ndim == 4:
            r = r * math.sqrt(2 / math.prod(tensor.shape[1:]))
        elif name.endswith("running_var"):
            r = 1 + 0.1 * r.abs()
        elif name.endswith("weight"):
            r = 1 + 0.1 * r
        else:
            r = 0.1 * r
        tensor.copy_(r)
    if "decoder.classifier.6.weight" in state:
        state["decoder.classifier.6.weight"].mul_(gain)
    return model


def assert_recorded(tensor: Tensor, record: dict, tolerance: float) -> None:
    """A tensor against its record: shape, sum of magnitudes, and values relative to their largest."""
    assert list(tensor.shape) == record["shape"]
    magnitude = tensor.double().abs().sum().item()
    assert math.isclose(magnitude, record["abs_sum"], rel_tol=tolerance), (magnitude, record["abs_sum"])
    values = tensor.detach().flatten()[torch.tensor(record["index"])].float()
    expected = torch.tensor(record["value"])
    difference = (values - expected).abs().max().item()
    assert difference <= tolerance * expected.abs().max().item(), (difference, values, expected)


def network(name: str) -> dict:
    """The ``net`` section of a golden model."""
    return next(model["net"] for model in read("models") if model["name"] == name)
