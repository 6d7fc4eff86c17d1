"""Fused operations for vision transformers that scale sideways (HSViT) and down (Scala).

Needs torch and triton only. Every operation is an ordinary function with autograd.
"""

from . import random, reference
from .cases import Case, listing
from .dispatch import CHOICES, force
from .findings import Findings, Verdict
from .first_use import prepare
from .grouped_attention import grouped_attention
from .random import Draw
from .sliced_linear import sliced_linear
from .step_state import StepState

__version__ = "0.1.0"
__all__ = [
    "CHOICES",
    "Case",
    "Draw",
    "Findings",
    "StepState",
    "Verdict",
    "force",
    "grouped_attention",
    "listing",
    "prepare",
    "random",
    "reference",
    "sliced_linear",
]
