"""Train vision transformers that scale sideways (HSViT) and down (Scala) with one DeepSpeed engine."""

__version__ = "0.1.0"
