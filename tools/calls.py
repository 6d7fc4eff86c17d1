"""What the operations of hsvit_kernels can be asked for: every shape class, dtype and flag, to see what they launch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hsvit_kernels import StepState, configurations, grouped_attention, sliced_linear
from hsvit_kernels.attention_triton import constants, place
from hsvit_kernels.grouped_attention import dropout_mask
from hsvit_kernels.random import Draw
from tools.benchmarks.attention_baselines import ATTENTION

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Call:
    """Of an operation, to see what it launches. shape: of the class, as in the table, or a problem's."""

    operation: str
    shape: str
    sizes: tuple[int, ...]
    dtype: str
    weights: str
    flags: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        return " ".join([self.dtype, *([] if self.weights == self.dtype else [f"weights-{self.weights}"]), *self.flags])


def attention_shapes() -> Iterator[tuple[str, tuple[int, int, int]]]:
    """A name, and features of a group, width and heads, for each class of the table and what the recipes train."""
    for kernel, shape in configurations.TABLE:
        if kernel == "attention_forward":
            tile, padded, full = shape
            width, heads = (padded, padded // 8) if full else (padded - 8, 8)
            yield "x".join(map(str, shape)), (tile, width, heads)
    for problem in ATTENTION:
        yield f"T{problem.tokens} D{problem.width}", (problem.tokens - 1, problem.width, problem.heads)
    yield from (("T33 D16", (32, 16, 4)), ("T25 D16", (24, 16, 4)))  # imagenette/hybrid_resnet18, digits/hybrid


def all_attention_shapes() -> Iterator[tuple[str, tuple[int, int, int]]]:
    """One of every group of shapes whose kernels differ in more than their numbers."""
    met = set()
    for width in range(1, 129):
        for heads in (h for h in range(1, width + 1) if width % h == 0):
            for features in range(1, 65 if width <= 64 else 33):
                s = constants(features, width, heads)
                full = s["HPS"] * width // heads == s["SW"] and heads % s["HPS"] == 0
                kind = (s["NP"], features == s["NP"], s["DP"], width == s["DP"], s["HPS"], s["SW"], full)
                if kind not in met:
                    met.add(kind)
                    yield "x".join(map(str, place("attention_forward", s)[1])), (features, width, heads)


def calls(shapes: Iterable[tuple[str, tuple[int, int, int]]]) -> Iterator[Call]:
    """Of every operation, for all dtypes and flags."""
    precisions = [("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp16", "fp16"), ("fp32", "fp32")]
    for shape, sizes in dict.fromkeys(shapes):
        for dtype, weights in precisions:
            for dropout in ((), ("dropout",)):
                for mode in ((), ("training",), ("all_tokens",), ("training", "channels-last")):
                    yield Call("grouped_attention", shape, sizes, dtype, weights, (*mode, *dropout))
    yield Call("dropout_mask", "any", (), "int8", "int8")
    for shape, n, k in (("0", 96, 64), ("1", 512, 256)):
        for dtype in DTYPES:
            for rows in (64, 4096):  # the weight's gradient in one piece, or in several
                for bias in ((), ("bias",)):
                    for epilogue in ((), ("gelu",), ("residual",), ("gelu", "residual")):
                        for training in ((), ("training",)):
                            flags = (*bias, *epilogue, *training)
                            yield Call("sliced_linear", shape, (rows, n, k), dtype, "fp32", flags)


def is_training_in_bf16(call: Call) -> bool:
    """As the recipes train: autocast, dropout in attention, layers with a bias."""
    if call.operation == "grouped_attention":
        return (call.dtype, call.weights) == ("bf16", "fp32") and {"training", "dropout"} <= set(call.flags)
    return call.operation == "dropout_mask" or (call.dtype == "bf16" and {"bias", "training"} <= set(call.flags))


def run(call: Call) -> None:
    """Let an operation launch what it launches; nothing is computed."""
    flags = dict.fromkeys(call.flags, True)
    dtype, weights = (DTYPES.get(name, torch.int8) for name in (call.dtype, call.weights))
    training = "training" in flags
    if call.operation == "dropout_mask":
        dropout_mask(Draw.of(0, image=torch.arange(1)), 0.2, layer=0, heads=2, group=0, tokens=9)
    elif call.operation == "grouped_attention":
        features, width, heads = call.sizes
        shapes = {
            "tokens": (1, features, width), "cls": (1, width), "positions": (1, features + 1, width),
            "norm_weight": (1, 2, width), "norm_bias": (1, 2, width), "qkv_weight": (1, 2, 3 * width, width),
            "qkv_bias": (1, 2, 3 * width), "out_weight": (1, 2, width, width), "out_bias": (1, 2, width),
        }  # fmt: skip
        tensors: dict[str, Any] = {name: torch.zeros(shape, dtype=weights) for name, shape in shapes.items()}
        tokens = tensors["tokens"].to(dtype)
        tensors["tokens"] = tokens.mT.contiguous().mT if "channels-last" in flags else tokens
        for tensor in tensors.values():
            tensor.requires_grad_(training)
        draw = Draw.of(0, image=torch.arange(1)) if "dropout" in flags else None
        y = grouped_attention(
            **tensors,
            heads=heads,
            dropout=0.2,
            draw=draw,
            all_tokens="all_tokens" in flags,
        )
        if training:
            y.sum().backward()
    else:
        rows, n, k = call.sizes
        x = torch.zeros(rows, k, dtype=dtype, requires_grad=training)
        weight = torch.zeros(2 * n, 2 * k, requires_grad=training)
        bias = torch.zeros(2 * n, requires_grad=training) if "bias" in flags else None
        residual = torch.zeros(rows, n, dtype=dtype) if "residual" in flags else None
        y = sliced_linear(
            x, weight, bias, out_features=n, side="trailing", gelu="gelu" in flags, residual=residual, state=StepState()
        )
        if training:
            y.sum().backward()
