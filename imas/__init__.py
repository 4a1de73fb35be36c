"""iMAS: instance-specific and model-adaptive supervision for semi-supervised semantic segmentation (CVPR 2023)."""

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
