"""Fused operations for vision transformers that scale sideways (HSViT) and down (Scala).

Needs torch and triton only. Every operation is an ordinary function with autograd.
"""

from . import random, reference
from .dispatch import CHOICES, force
from .grouped_attention import grouped_attention
from .sliced_linear import StepState, sliced_linear

__version__ = "0.1.0"
__all__ = ["CHOICES", "StepState", "force", "grouped_attention", "random", "reference", "sliced_linear"]
