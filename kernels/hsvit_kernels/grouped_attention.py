"""Grouped multi-head attention: every attention layer of every group of every image in one launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from . import attention_cuda, attention_triton, mask, reference
from . import attention_kernels as kernels
from .cases import Case, is_listing, note, stand_in
from .configurations import Place
from .dispatch import choose, forced, launch, low_dtype
from .random import Draw, threshold

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INPUTS = (
    "tokens", "cls", "positions", "norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "out_weight", "out_bias"
)  # fmt: skip


def grouped_attention(
    tokens: Tensor,
    cls: Tensor,
    positions: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    heads: int,
    dropout: float = 0.0,
    draw: Draw | None = None,
    first_group: int = 0,
    eps: float = 1e-5,
    all_tokens: bool = False,
) -> Tensor:
    """Run A pre-LN attention layers x <- x + MHA(LN(x)) in G independent groups; return their CLS vectors.

    HSViT, arXiv 2404.05196, steps 3 to 6: group g owns tokens [g K/G, (g+1) K/G), its CLS and positions are added
    here, there is no MLP and no final LayerNorm. The key bias cancels in the softmax, is left out and gets an exact
    zero gradient.

    In Triton one launch for the weights, one forward and three backward, for D <= 64 with T <= 65 and D <= 128 with
    T <= 33, which save every layer's input and nothing quadratic; where `dispatch` decides so, the batched reference.
    Under autocast the products are computed in its dtype, whatever the weights' own; weights' gradients are fp32 sums.

    Args:
        tokens: [B, K, D], any strides; K a multiple of G; fp32, fp16 or bf16 (fp64 in the reference).
        cls: [G, D]. positions: [G, T, D] with T = K/G + 1, CLS first.
        norm_weight, norm_bias: [G, A, D].
        qkv_weight: [G, A, 3D, D], rows q, k, v, heads contiguous. qkv_bias: [G, A, 3D].
        out_weight: [G, A, D, D]. out_bias: [G, A, D].
        heads: attention heads, a divisor of D; scores are scaled by (D / heads) ** -0.5.
        dropout: probability of dropping an attention weight, rounded to a multiple of 1/256.
        draw: the pass's randomness; None means no dropout.
        first_group: global index of group 0 here, so that masks do not depend on where a group is computed.
        all_tokens: return what every token has become, to look at; the last layer is then computed for all of them.

    Returns:
        [B, G, D], the CLS vectors; [B, G, T, D] with `all_tokens`, CLS first.

    Raises:
        ValueError: a shape, dtype or device that does not fit, with its name, value and what is needed.
    """
    inputs = (tokens, cls, positions, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias)
    tensors = dict(zip(INPUTS, inputs, strict=True))
    _check(tensors, heads)
    if draw is None or not threshold(dropout):
        dropout, draw = 0.0, None
    return _attention(tensors, heads, dropout, draw, first_group, eps, all_tokens)


def _attention(
    tensors: dict[str, Tensor],
    heads: int,
    dropout: float,
    draw: Draw | None,
    first_group: int,
    eps: float,
    all_tokens: bool,
) -> Tensor:
    """By the kernel or the reference, as `dispatch` decides; or only noted, while cases are listed."""
    tokens, cls, positions = tensors["tokens"], tensors["cls"], tensors["positions"]
    low = low_dtype(tokens)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values())
    case = _case(tensors, low, heads, draw is not None, save, all_tokens)
    why_not = _why_not(tensors, low, all_tokens, save)
    if is_listing():
        if not why_not:
            note(case, len(tokens), len(cls))
        return stand_in(tokens, _out_shape(tokens, positions, all_tokens), low, save)
    kernel = choose(case, tokens.device, why_not)
    if kernel == "cuda" and forced() == "cuda" and not attention_cuda.fits(case, tokens.device):
        kernel = "triton"
    if kernel == "reference":
        return reference.grouped_attention(
            **tensors,
            heads=heads,
            dropout=dropout,
            draw=draw,
            first_group=first_group,
            eps=eps,
            all_tokens=all_tokens,
        )
    key, image = (None, None) if draw is None else (draw.key, draw.image)
    rest = [tensor for name, tensor in tensors.items() if name != "tokens"]
    numbers = (heads, threshold(dropout), first_group, eps)
    out: Tensor = _forward(tokens.to(low), *rest, key, image, *numbers, all_tokens, save, kernel == "cuda")[0]
    return out


def dropout_mask(
    draw: Draw, probability: float, *, layer: int, heads: int, group: int, tokens: int, tile: tuple[int, int] = (32, 32)
) -> Tensor:
    """Which attention weights of a layer and global group survive: bool [B, heads, T, T], CLS first.

    What the kernels draw, in tiles of a size that must not matter; of the reference where that is forced.
    """
    device = draw.key.device
    if forced() == "reference":
        keep = mask.Keep(draw, probability, layer, heads, range(group, group + 1), tokens, tokens)
        return keep.mask(slice(0, len(draw.image)))[:, 0]
    out = torch.zeros(len(draw.image), heads, tokens, tokens, dtype=torch.int8, device=device)
    grid = (len(draw.image) * heads, triton.cdiv(tokens, tile[0]), triton.cdiv(tokens, tile[1]))
    launch(
        kernels.dropout_mask, grid, out, draw.key, draw.image, out, group, layer, threshold(probability), tokens,
        HEADS=heads, BITS=mask.definition(tokens) == mask.MASK, ROWS=tile[0], COLUMNS=tile[1],
    )  # fmt: skip
    return out.bool()


def _check(tensors: dict[str, Tensor], heads: int) -> None:
    """Refuse what does not fit, by name, before anything is computed."""
    tokens = tensors["tokens"]
    if tensors["qkv_weight"].dim() != 4:
        raise ValueError(f"qkv_weight has shape {tuple(tensors['qkv_weight'].shape)}: must be [G, A, 3D, D]")
    groups, depth, _, width = tensors["qkv_weight"].shape
    if tokens.dim() != 3 or tokens.shape[2] != width:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}: must be [B, K, {width}]")
    if tokens.shape[1] % groups:
        raise ValueError(f"tokens: K = {tokens.shape[1]} is not divisible by {groups} groups")
    if width % heads:
        raise ValueError(f"heads = {heads} does not divide the embedding width {width}")
    length = tokens.shape[1] // groups + 1
    if length > 256:
        raise ValueError(f"tokens: {length} tokens a group with CLS: at most 256 are supported")
    expected = {
        "cls": (groups, width),
        "positions": (groups, length, width),
        "norm_weight": (groups, depth, width),
        "norm_bias": (groups, depth, width),
        "qkv_weight": (groups, depth, 3 * width, width),
        "qkv_bias": (groups, depth, 3 * width),
        "out_weight": (groups, depth, width, width),
        "out_bias": (groups, depth, width),
    }
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}: must be {shape}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}: must be floating point")
        if tensor.device != tokens.device:
            raise ValueError(f"{name} is on {tensor.device}: must be on {tokens.device}, as tokens is")


def _case(
    tensors: dict[str, Tensor], low: torch.dtype, heads: int, dropout: bool, training: bool, all_tokens: bool
) -> Case:
    weight = tensors["qkv_weight"]
    groups, depth, _, width = weight.shape
    sizes = (tensors["tokens"].shape[1] // groups + 1, width, heads, depth, int(dropout), int(training))
    return Case("grouped_attention", low, weight.dtype, (*sizes, int(all_tokens)))


def _why_not(tensors: dict[str, Tensor], low: torch.dtype, all_tokens: bool, training: bool) -> str:
    """Why the kernels cannot compute this in dtype `low`, empty where they can."""
    tokens, weight = tensors["tokens"], tensors["qkv_weight"]
    groups, depth, _, width = weight.shape
    length = tokens.shape[1] // groups + 1
    if not tokens.numel() or not depth:
        return "nothing to compute"
    if low not in DTYPES:
        return f"dtype {low}"
    if not (width <= 64 and length <= 65) and not (width <= 128 and length <= 33):
        return f"D = {width} with T = {length}: fused are D <= 64 with T <= 65 and D <= 128 with T <= 33"
    if all_tokens and training:
        return "gradients with all_tokens"
    return ""


def places(case: Case) -> list[Place]:
    """The entries of the table that a case is launched with."""
    shape = attention_triton.constants(case.size("T") - 1, case.size("D"), case.size("heads"))
    kernels = ("forward", "backward", "products") if case.size("training") else ("forward",)
    return [attention_triton.place(f"attention_{kernel}", shape) for kernel in kernels]


@torch.library.custom_op("hsvit_kernels::grouped_attention", mutates_args=())
def _forward(
    tokens: Tensor,
    cls: Tensor,
    positions: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    key: Tensor | None,
    image: Tensor | None,
    heads: int,
    drop: int,
    first_group: int,
    eps: float,
    all_tokens: bool,
    save: bool,
    cuda: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, and for the backward the layers' inputs [G, A, B, T, D], empty without `save`, and the weights and
    biases as the kernels want them. drop: in 1/256."""
    out, saved, folded, biases = _results(tokens, positions, qkv_weight, heads, all_tokens, save, cuda)
    depth = qkv_weight.shape[1]
    weights = [norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight]
    if cuda:
        attention_cuda.fold(folded, [cls, positions, *weights, out_bias], drop)
        attention_cuda.forward(tokens, folded, key, image, out, saved, depth, drop, first_group, eps)
        return out, saved, folded, biases
    shape = attention_triton.constants(tokens.shape[1] // len(cls), tokens.shape[2], heads)
    attention_triton.fold(folded, biases, weights, shape)
    attention_triton.forward(
        tokens, cls, positions, folded, biases, out_bias, key, image, out, saved, shape,
        drop, first_group, eps, all_tokens,
    )  # fmt: skip
    return out, saved, folded, biases


@_forward.register_fake
def _forward_fake(tokens: Tensor, cls: Tensor, positions: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results(tokens, positions, rest[2], rest[8], *rest[-3:])


def _results(
    tokens: Tensor, positions: Tensor, qkv_weight: Tensor, heads: int, all_tokens: bool, save: bool, cuda: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (groups, length, width), depth = positions.shape, qkv_weight.shape[1]
    out = tokens.new_empty(_out_shape(tokens, positions, all_tokens))
    saved = tokens.new_empty((groups, depth, len(tokens), length, width) if save else (0,))
    if cuda:
        size = attention_cuda.folded_size(groups, depth)
        return out, saved, tokens.new_empty((size,), dtype=torch.int16), tokens.new_empty((0,), dtype=torch.float32)
    shape = attention_triton.constants(length - 1, width, heads)
    return out, saved, *attention_triton.folded(groups, depth, shape, tokens)


def _out_shape(tokens: Tensor, positions: Tensor, all_tokens: bool) -> tuple[int, ...]:
    groups, length, width = positions.shape
    return (len(tokens), groups, length, width) if all_tokens else (len(tokens), groups, width)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, cls, positions, *weights = inputs[:9]
    key, image, ctx.heads, ctx.drop, ctx.first_group, ctx.eps, *_ = inputs[9:]
    ctx.save_for_backward(tokens, cls, positions, *weights, key, image, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 18
    gradients = _backward(dout, *ctx.saved_tensors, ctx.heads, ctx.drop, ctx.first_group, ctx.eps)
    return *gradients, *(None,) * 9


_forward.register_autograd(_gradients, setup_context=_remember)


@torch.library.custom_op("hsvit_kernels::grouped_attention_backward", mutates_args=())
def _backward(
    dout: Tensor,
    tokens: Tensor,
    cls: Tensor,
    positions: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    key: Tensor | None,
    image: Tensor | None,
    saved: Tensor,
    folded: Tensor,
    biases: Tensor,
    heads: int,
    drop: int,
    first_group: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first nine inputs of the forward, in their dtypes."""
    shape = attention_triton.constants(tokens.shape[1] // len(cls), tokens.shape[2], heads)
    weight = qkv_weight.contiguous()
    if folded.dtype == torch.int16:
        found = attention_cuda.backward(dout, saved, folded, key, image, drop, first_group, eps)
    else:
        weight = weight.to(tokens.dtype)
        found = attention_triton.backward(
            dout, saved, folded, biases, norm_weight, weight, key, image, shape, drop, first_group, eps
        )
    inputs = [cls, positions, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias]
    gradients = attention_triton.weight_gradients(found, inputs, weight, shape, len(tokens))
    return found[0], *gradients  # type: ignore[return-value]


@_backward.register_fake
def _backward_fake(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in args[:9])
