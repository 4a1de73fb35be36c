"""iMAS: instance-specific and model-adaptive supervision for semi-supervised semantic segmentation (CVPR 2023).

A student and an EMA teacher train on a few labeled images and many unlabeled ones. How well the two agree on an
unlabeled image is its score, 1 easy and 0 hard; it decides how strongly the image is augmented and how much its loss
counts.

To train, run ``train_semi.py`` with a YAML file; ``python -m imas`` lists the commands. What is here is the library
below them, each name with shapes, ranges and source in its own docstring::

    config = load_config("exps/shapes_imas/config.yaml")
    network = build_model(config.net).eval()
    logits, aux_logits = network(torch.randn(2, 3, 64, 64))

An experiment and its network: ``load_config``, ``Config``, ``build_model``. The paper's mathematics:
``hardness_scores`` (section 3.2) and its result ``Hardness``, ``adaptive_blend`` and ``cutmix_partners`` (section 3.3),
``consistency_loss``, ``ohem_cross_entropy``, ``teacher_decay``, ``poly_lr``. The evaluation: ``predict_sliding``,
``ConfusionMatrix``. The rest of the package is read from ``imas.methods.imas`` on, which is one training step.
"""

from .build import build_model
from .config import load_config
from .engine.evaluate import predict_sliding
from .engine.optim import poly_lr
from .models.ema import teacher_decay
from .ops.hardness import Hardness, hardness_scores
from .ops.losses import consistency_loss, ohem_cross_entropy
from .ops.metrics import ConfusionMatrix
from .ops.mixing import adaptive_blend, cutmix_partners
from .schema import Config

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ConfusionMatrix",
    "Hardness",
    "adaptive_blend",
    "build_model",
    "consistency_loss",
    "cutmix_partners",
    "hardness_scores",
    "load_config",
    "ohem_cross_entropy",
    "poly_lr",
    "predict_sliding",
    "teacher_decay",
]
