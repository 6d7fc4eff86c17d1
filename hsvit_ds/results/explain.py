"""What a trained network looks at on an image: attention, feature maps, and what its parts alone would answer.

Attention weights are nowhere kept when a network computes. They are computed anew here from what its layers were given
and their weights, in eval mode, and `tests/results/test_explain.py` holds them to what the layers gave.

Shape letters: K channel tokens, h x w their map, M submodules, G groups, T tokens of a group with CLS, A layers, D
embedding width; of a ViT T tokens, n x n patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RefusedError
from ..models import Model, hsvit, vit
from ..models.slimmable import FULL
from .budget import Chosen, cost_of
from .predict import Answers, Predictor, open_predictor, predictor

TOP = 5
"""Classes of an answer."""


@dataclass(frozen=True)
class Groups:
    """The attention of an HSViT's groups. cls_rows: fp32 [A, G, T], what each CLS token attends to, mean over heads,
    itself first. vectors: [G, D], the CLS tokens that leave the last layer."""

    cls_rows: Tensor
    vectors: Tensor

    @property
    def channels(self) -> Tensor:
        """[K]: attention to each channel token, mean over the layers."""
        return self.cls_rows[..., 1:].mean(0).flatten()

    @property
    def agreement(self) -> Tensor:
        """[G, G]: cosine similarity of the groups' vectors."""
        unit = F.normalize(self.vectors, dim=-1)
        return unit @ unit.t()


@dataclass(frozen=True)
class Seen:
    """By one network on one image. network: "width 0.50". answers: who answers ("all", "submodule 2 alone"; "" for the
    network) and what."""

    network: str
    answers: dict[str, Answers]


@dataclass(frozen=True)
class SeenByHSViT(Seen):
    """tiles: along a side of the image, of which a submodule sees one. maps: [K, h, w], the last ones; None of a
    network whose tokens are colour planes. groups: None without attention."""

    submodules: int
    tiles: int
    maps: Tensor | None
    groups: Groups | None

    @property
    def looked(self) -> Tensor | None:
        """[M, h, w]: for each submodule the sum of its maps, weighted by the attention to them; of tiles [M, tiles x h,
        tiles x w], 0 where a submodule sees nothing."""
        if self.maps is None or self.groups is None:
            return None
        weighted = self.maps * self.groups.channels[:, None, None]
        own = weighted.unflatten(0, (self.submodules, -1)).sum(1)
        if self.tiles == 1:
            return own
        whole = own.new_zeros(self.submodules, self.tiles**2, *own.shape[1:])
        each = torch.arange(self.submodules)
        whole[each, each % self.tiles**2] = own
        return whole.unflatten(1, (self.tiles, self.tiles)).transpose(2, 3).flatten(3).flatten(1, 2)


@dataclass(frozen=True)
class SeenByViT(Seen):
    """rollout: [n, n], the share of each patch; what is missing from 1 is the CLS token's own."""

    rollout: Tensor


@dataclass(frozen=True)
class Image:
    """pixels: uint8 [S, S, 1 or 3], as the networks were given it; None where `wrong` says what is wrong with the
    file."""

    name: str
    pixels: Tensor | None
    seen: tuple[Seen, ...] = ()
    wrong: str = ""


def open_networks(path: Path, width: str, checkpoint: str, ema: bool, root: str) -> dict[str, Predictor]:
    """The networks to explain, by what they are called: those of some widths, "0.25,0.5" or "all", by default all of a
    ViT and the largest of an HSViT; an export's one.

    Raises:
        RefusedError: as of `open_predictor`; or a network of another kind.
    """
    if (path / "checkpoints").is_dir():
        from .saved import open_run  # here, as in `open_predictor`

        run = open_run(path, ema, root, checkpoint)
        _check(path, run.model)
        widths = run.widths(width or "all")
        if not width and isinstance(run.model, hsvit.HSViT):
            widths = widths[-1:]
        return {f"width {one}": predictor(run, Chosen(one, cost_of(run.model, one))) for one in widths}
    found = open_predictor(path, width, "", checkpoint, ema, root)
    _check(path, found.model)
    return {"the export": found}


def _check(path: Path, model: Model) -> None:
    if not isinstance(model, hsvit.HSViT | vit.ViT):
        kind = model.config.kind
        raise RefusedError(
            f'{path}: a model of kind "{kind}", whose layers are not known here; kinds "hsvit" and "vit" are explained,'
            " and hsvit predict says what this one answers"
        )


@torch.no_grad()
def explain(networks: Mapping[str, Predictor], name: str, content: Path | bytes) -> Image:
    """One image, its file or the content, as some networks of one run see it."""
    first = next(iter(networks.values()))
    read = first.read(content)
    if isinstance(read, str):
        return Image(name, None, wrong=read)
    mean, std = (torch.tensor(part)[:, None, None] for part in (first.preprocessing.mean, first.preprocessing.std))
    pixels = ((read * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    return Image(name, pixels, tuple(_seen(label, network, read[None]) for label, network in networks.items()))


def _seen(label: str, network: Predictor, image: Tensor) -> Seen:
    model = network.model
    x = image.to(next(model.parameters()).device)
    if isinstance(model, vit.ViT):
        (answer,) = network.best(network.probabilities(x), TOP)
        return SeenByViT(label, {"": answer}, rollout(model, x)[0].cpu())
    assert isinstance(model, hsvit.HSViT)
    maps, groups = groups_of(model, x)
    config = model.config
    return SeenByHSViT(label, _answers(network, model, x), config.submodules, config.tiles, maps, groups)


def _answers(network: Predictor, model: hsvit.HSViT, x: Tensor) -> dict[str, Answers]:
    """Of all submodules, and of each alone: the mean of its own CLS tokens goes into the head that all share."""
    submodules = model.config.submodules
    present = torch.eye(submodules, dtype=torch.bool, device=x.device)
    who = ["all", *(f"submodule {m} alone" for m in range(submodules))]
    if submodules == 1:
        present, who = present[:0], ["all"]
    sums = model.sums(x)
    logits = torch.cat([model.answer(sums), *(model.answer(sums, one[None]) for one in present)])
    return dict(zip(who, network.best(logits.float().softmax(-1).cpu(), TOP), strict=True))


def groups_of(model: hsvit.HSViT, image: Tensor) -> tuple[Tensor | None, Groups | None]:
    """([K, h, w], what the groups attend to) of an HSViT in eval mode for an image [1, C, S, S]; see `SeenByHSViT`."""
    given: list[Tensor] = []
    maps: list[Tensor] = []
    submodules = model.submodules
    hooks = [submodules.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))]
    source: nn.Module | None = model.backbone
    if source is None and model.config.convolution:
        source = submodules.trunk[-1]
    if source is not None:
        hooks.append(source.register_forward_hook(lambda _, inputs, output: maps.append(output)))
    try:
        model.sums(image)
    finally:
        for hook in hooks:
            hook.remove()
    found = maps[0][0].float().cpu() if maps else None
    if not model.config.depth:
        return found, None
    rows, vectors = grouped_attention(model, submodules.tokens(given[0]))
    return found, Groups(rows[:, 0].mean(2).float().cpu(), vectors[0].float().cpu())


def grouped_attention(model: hsvit.HSViT, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(attention of the CLS tokens [A, B, G, heads, T], their vectors [B, G, D]) for channel tokens [B, K, D]: what
    `hsvit_kernels.grouped_attention` computes, in plain sight."""
    own, heads = model.submodules, model.config.heads
    x = tokens.unflatten(1, (len(own.cls), -1))
    x = torch.cat((own.cls[None, :, None].expand(len(x), -1, -1, -1), x), 2) + own.positions
    rows = []
    for layer in range(model.config.depth):
        y = F.layer_norm(x, x.shape[-1:])
        y = y * own.norm_weight[:, None, layer] + own.norm_bias[:, None, layer]
        qkv = y @ own.qkv_weight[:, layer].mT + own.qkv_bias[:, None, layer]
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        rows.append(weights[..., 0, :])
        out = (weights @ v).transpose(2, 3).flatten(3)
        x = x + out @ own.out_weight[:, layer].mT + own.out_bias[:, None, layer]
    return torch.stack(rows), x[:, :, 0]


def rollout(model: vit.ViT, images: Tensor) -> Tensor:
    """Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928) of a ViT in eval mode: [B, n, n], how much of each
    patch has reached the special tokens that the head reads, to the sum of 1 with their own shares.

    A layer hands on 0.5 A + 0.5 I, A the mean of its heads' attention, I its residual; layers are multiplied.
    """
    given: list[Tensor] = []
    hooks = [
        block.attn.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))  # type: ignore[union-attr]
        for block in model.blocks
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = model.pos_embed.shape[1]
    share = torch.eye(tokens, device=images.device).expand(len(images), -1, -1)
    for block, x in zip(model.blocks, given, strict=True):
        assert isinstance(block, vit.Block)
        share = mixing(attention(block.attn, x)) @ share
    special = model.config.special_tokens
    patches = share[:, :special, special:].mean(1)
    side = model.image_size // model.config.patch_size
    return patches.unflatten(1, (side, side))


def mixing(weights: Tensor) -> Tensor:
    """Attention [B, heads, T, T] to how a layer mixes tokens [B, T, T]: rows that sum to 1."""
    mean = weights.float().mean(1)
    mixed = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1], device=mean.device)
    return mixed / mixed.sum(-1, keepdim=True)


def attention(layer: vit.Attention, x: Tensor) -> Tensor:
    """[B, heads, T, T], the attention weights of a layer of a `subnet`, which has no scale of its own, for its input
    [B, T, d]."""
    q, k, _ = layer.queries_keys_values(x, FULL)
    weights: Tensor = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return weights
