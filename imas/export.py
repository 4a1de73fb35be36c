"""Write a network of a checkpoint as a program that runs without this package, by ``torch.export``.

    python -m imas.export exps/shapes_imas/checkpoints/ckpt_best.pth shapes.pt2

The program maps normalised images, (B, 3, H, W) float32, to logits, (B, C, H, W) float32, as one window as large as the
image. B, H and W are free, except that both sides need more pixels than the output stride (8, 16 or 32). Before the
file gets its name, it is loaded again and compared with the network at two sizes that the export has not seen.

    program = torch.export.load("shapes.pt2", extra_files=(more := {"recipe.yaml": ""})).module()
    classes = program(images).argmax(dim=1)

Then ``more["recipe.yaml"]`` is the recipe, whose ``dataset.mean`` and ``dataset.std`` tell how images are normalised:
(pixels / 255 - mean) / std. The program is for the CPU; ``torch.export.passes.move_to_device_pass`` moves it to another
device. A torch that is older than the one that wrote it may not read it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn
from torch.export import Dim

from .errors import UserError, run_script
from .files import replacing
from .library import load_checkpoint
from .schema import Config

_EXAMPLE = (2, 96, 128)  # B, H, W: all different, and none of them 1, which torch would take for a constant
_CHECKED = ((1, 131, 97), (3, 64, 200))
_TOLERANCE = 1e-4  # of the largest logit


class _Logits(nn.Module):
    """A network without its auxiliary head."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


def export(network: nn.Module, recipe: Config, path: Path) -> None:
    """Write ``path``: see the module.

    Args:
        network: in eval mode, on the CPU. It loses ``channels_last``, which torch's archive does not keep.

    Raises:
        UserError: the program gives other logits than the network.
    """
    logits = _Logits(network).to(memory_format=torch.contiguous_format)
    sides = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    program = torch.export.export(logits, (_images(*_EXAMPLE),), dynamic_shapes=(sides,), strict=False)
    # Until 2.11 at least, pooling's rounding makes torch refuse sides that are not odd or even as the example's are.
    getattr(program, "_guards_code", []).clear()
    more = {"recipe.yaml": yaml.safe_dump(recipe.to_dict(), sort_keys=False)}
    with replacing(path) as temporary:
        with open(temporary, "wb") as file:
            torch.export.save(program, file, extra_files=more)
        with open(temporary, "rb") as file:
            loaded = torch.export.load(file).module()
        for size in _CHECKED:
            images = _images(*size)
            with torch.no_grad():
                expected, got = logits(images), loaded(images)
            if not (got - expected).abs().max() <= _TOLERANCE * expected.abs().max():
                raise UserError(f"{path}: not written, since at the size {size} the program differs from the network")


def _images(batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m imas.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="a file written by training")
    parser.add_argument("out", metavar="OUT.pt2", type=Path, help="the program")
    parser.add_argument("--network", metavar="NAME", help="default: the one that selected the best checkpoint")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Load, export, compare."""
    options = parse(arguments)
    if options.out.suffix != ".pt2" or not options.out.absolute().parent.is_dir():
        raise UserError(f"{options.out}: expected a name that ends in .pt2, in a folder that exists")
    export(*load_checkpoint(options.checkpoint, options.network), options.out)
    sizes = " and ".join("{} × 3 × {} × {}".format(*size) for size in _CHECKED)
    print(f"written: {options.out}; compared with the network on {sizes}")


if __name__ == "__main__":
    run_script(main)
