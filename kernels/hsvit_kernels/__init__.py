"""Fused operations for vision transformers that scale sideways (HSViT) and down (Scala).

Needs torch and triton only. Every operation is an ordinary function with autograd.
"""

from . import random, reference
from .grouped_attention import grouped_attention

__version__ = "0.1.0"
__all__ = ["grouped_attention", "random", "reference"]
