"""iMAS: instance-specific and model-adaptive supervision for semi-supervised semantic segmentation (CVPR 2023).

A student and an EMA teacher train on a few labeled images and many unlabeled ones. How well the two agree on an
unlabeled image is its score, 1 easy and 0 hard; it decides how strongly the image is augmented and how much its loss
counts.

To train, run ``train_semi.py`` with a YAML file; ``python -m imas`` lists the commands. What is here is the library
below them, each name with shapes, ranges and source in its own docstring; docs/library.md has examples::

    network, recipe = load_checkpoint("exps/shapes_imas/checkpoints/ckpt_best.pth")
    classes = predict(network, image)

Trained networks: ``load_checkpoint``, ``predict``. An experiment and its network: ``load_config``, ``Config``,
``build_model``, ``Normalise``. The paper's mathematics, for a training loop of one's own: ``hardness_scores`` (section
3.2) and its result ``Hardness``, ``pseudo_labels``, ``adaptive_blend``, ``cutmix_partners``, ``cutmix_mask`` and
``paste`` (section 3.3), ``cross_entropy``, ``ohem_cross_entropy``, ``consistency_loss``, ``make_teacher``,
``teacher_decay``, ``update_teacher``, ``poly_lr``. The evaluation: ``predict_sliding``, ``ConfusionMatrix``. The rest
of the package is read from ``imas.methods.imas`` on, which is one training step.
"""

from .build import build_model
from .config import load_config
from .data.normalise import Normalise
from .engine.evaluate import predict_sliding
from .engine.optim import poly_lr
from .library import load_checkpoint, predict
from .models.ema import make_teacher, teacher_decay, update_teacher
from .ops.hardness import Hardness, hardness_scores
from .ops.losses import consistency_loss, cross_entropy, ohem_cross_entropy
from .ops.metrics import ConfusionMatrix
from .ops.mixing import adaptive_blend, cutmix_mask, cutmix_partners, paste
from .ops.pseudo import predict as pseudo_labels
from .schema import Config

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ConfusionMatrix",
    "Hardness",
    "Normalise",
    "adaptive_blend",
    "build_model",
    "consistency_loss",
    "cross_entropy",
    "cutmix_mask",
    "cutmix_partners",
    "hardness_scores",
    "load_checkpoint",
    "load_config",
    "make_teacher",
    "ohem_cross_entropy",
    "paste",
    "poly_lr",
    "predict",
    "predict_sliding",
    "pseudo_labels",
    "teacher_decay",
    "update_teacher",
]
