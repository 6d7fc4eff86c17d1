"""timm's models under this project's promises: batch statistics of the global batch, counted randomness, weights that
fit or are refused.

`kind = "timm"` trains any classifier of timm with the same recipe and loop as the papers' models: their baselines.
"""

from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hsvit_kernels.random import Draw, Site, generator

from ..errors import RefusedError, counted, first_line
from . import slimmable
from .batchnorm import BatchNorm
from .network import Network, OneRank, counted_macs
from .slimmable import FULL, Width
from .weights import load_exactly, read_foreign, unwrapped, with_own_classifier

FILES = (".safetensors", ".pth", ".pt", ".bin")
DEFAULT = "default"
"""The weights that timm itself takes for `pretrained=True`."""


@dataclass(frozen=True, kw_only=True)
class Config(OneRank):
    kind: Literal["timm"] = "timm"
    name: str
    """Of a timm classifier: resnet50, efficientnet_b4, vit_base_patch16_224, …"""
    weights: str = ""
    """What training starts from: a timm tag ("a1_in1k", or "default"), a local file (.safetensors, .pth), or empty for
    random ones. A classifier of another number of classes starts anew."""
    drop_path: float = 0.0
    """Probability of skipping a block for an image in training, as timm spreads it over the blocks. What a timm model
    drops by default is off."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path = {self.drop_path}: must be in [0, 1)")

    @property
    def widths(self) -> slimmable.Config:
        """The full one."""
        return slimmable.Config()

    def resolved(self, image_size: int) -> Config:
        """Refuse what timm does not have, or does not build for such images."""
        self.macs(image_size, 3, 10)
        return self

    def check_width(self, width: Width) -> None:
        if not width.is_full:
            raise ValueError(f'width {width}: a model of kind "timm" has its full width only')

    def at(self, width: Width) -> Config:
        self.check_width(width)
        return replace(self, weights="")

    def macs(self, image_size: int, channels: int, classes: int, width: Width = FULL) -> int:
        """Multiply-adds of one image, forward: convolutions and matrix products."""
        self.check_width(width)
        return counted_macs(self, f'model.name = "{self.name}"', image_size, channels, classes)

    def build(
        self,
        *,
        image_size: int,
        channels: int,
        classes: int,
        seed: int = 0,
        here: Any = None,
        grid: Any = None,
        exchange: str = "",
    ) -> Classifier:
        """The model; `here`, `grid` and `exchange` are HSViT's."""
        return Classifier(self, image_size=image_size, channels=channels, classes=classes, seed=seed)


class Classifier(Network):
    """A timm classifier. Args: as of the other models."""

    def __init__(self, config: Config, *, image_size: int, channels: int, classes: int, seed: int = 0) -> None:
        super().__init__(config, image_size, channels, classes)
        self.randomness = Randomness()
        options: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path else {}
        self.net = create(
            "model.name",
            config.name,
            weights=config.weights,
            randomness=self.randomness,
            classes=classes,
            channels=channels,
            image_size=image_size,
            seed=seed,
            **options,
        )

    def forward(self, images: Tensor, draw: Draw | None = None, width: Width | float = FULL) -> Tensor:
        """images [B, C, H, W], normalised, to logits [B, Q]. draw: of a training forward; on one rank by default keyed
        on PyTorch's generator."""
        logits: Tensor = self.net(self._prepared(images, draw, width))
        return logits

    def forward_features(self, images: Tensor, draw: Draw | None = None, width: Width | float = FULL) -> Tensor:
        """[B, C, H, W] to what timm's model calls its features: a map, or all tokens."""
        features: Tensor = self.net.forward_features(self._prepared(images, draw, width))  # type: ignore[operator]
        return features

    def reset_classifier(self, num_classes: int) -> None:
        """Give the model a new classifier for so many classes, with random weights."""
        self.classes = num_classes
        self.net.reset_classifier(num_classes)  # type: ignore[operator]

    def _prepared(self, images: Tensor, draw: Draw | None, width: Width | float) -> Tensor:
        self.width(width)
        self._check(images)
        needs = self.training and self.config.drop_path
        self.randomness.draw = self._draw(images, draw) if needs else None
        return images.contiguous(memory_format=torch.channels_last)

    def subnet(self, width: Width | float) -> Classifier:
        """A copy: there is one width."""
        self.width(width)
        return copy.deepcopy(self)


@dataclass
class Randomness:
    """The draw of the forward that is being computed, where timm's modules find it."""

    draw: Draw | None = None
    count: int = field(default=0, repr=False)
    """Modules that draw."""


class DropPath(nn.Module):
    """Skips a branch for an image (arXiv 1603.09382), decided by the pass's counted randomness."""

    def __init__(self, rate: float, scales: bool, randomness: Randomness) -> None:
        super().__init__()
        self.rate, self.scales, self.randomness = rate, scales, randomness
        self.number = randomness.count
        randomness.count += 1

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...], or [B k, ...] where a model takes k pieces of each image: every piece is decided by itself."""
        if not self.training or not self.rate:
            return x
        draw = self.randomness.draw
        assert draw is not None
        pieces = len(x) // len(draw.image)
        element = self.number * 65536 + torch.arange(pieces, dtype=torch.int32, device=x.device)
        kept = (draw.uniform(Site.DROP_PATH, element) >= self.rate).to(x.dtype)
        if self.scales:
            kept = kept / (1 - self.rate)
        return x * kept.view(-1, *[1] * (x.dim() - 1))


class NormAct(BatchNorm):
    """timm's BatchNorm with an activation."""

    def __init__(self, channels: int, eps: float, momentum: float, act: nn.Module) -> None:
        super().__init__(channels, eps, momentum)
        self.act = act

    def forward(self, x: Tensor, width: Width = FULL) -> Tensor:
        y: Tensor = self.act(super().forward(x, width))
        return y


def create(
    key: str,
    name: str,
    *,
    classes: int,
    channels: int,
    image_size: int,
    weights: str = "",
    same_classes: bool = False,
    randomness: Randomness | None = None,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """A model of timm with this project's BatchNorm and drop path; on the meta device without its weights.

    Args:
        key: of `name` in the recipe, for refusals; that of `weights` stands beside it.
        classes: 0: without a classifier and pooling, so that the answer is what the last layer gives.
        weights: as `Config.weights`; a file's classifier is left out where there is none, or one of another number of
            classes, which `same_classes` refuses. seed: of random weights.

    Raises:
        ValueError: timm has no such model or tag, or builds none for such options.
        RefusedError: weights that cannot be had or do not fit.
    """
    import timm  # here, as it takes 6 s

    _check_name(key, name)
    if getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        options["img_size"] = image_size
    if not classes:
        options["global_pool"] = ""
    local = Path(weights).suffix in FILES
    full_name = _with_tag(key, name, weights) if weights and not local else name
    download = bool(weights) and not local and not torch.empty(0).is_meta
    try:
        # timm draws initial weights from PyTorch's global generator.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(generator(seed, Site.INIT, -1).initial_seed())
            model: nn.Module = timm.create_model(
                full_name, pretrained=download, num_classes=classes, in_chans=channels, **options
            )
    except (TypeError, AssertionError) as error:  # as timm's models say that they do not have an option
        asked = ", ".join(f"{k} = {v}" for k, v in options.items() if v != "") or "such a size"
        raise ValueError(f'{key} = "{name}": timm does not build it with {asked} ({first_line(error)})') from error
    except Exception as error:  # a hub's failures have many types
        if not download:
            raise
        page = f"https://huggingface.co/{getattr(timm.get_pretrained_cfg(full_name), 'hf_hub_id', '')}"
        raise RefusedError(
            f'{key} = "{name}": timm cannot get the weights "{weights}" here ({first_line(error)}); '
            f"download model.safetensors from {page} and set {_beside(key)} to the file"
        ) from error
    if not weights:
        _fit_efficientformer(model, image_size)
    _convert(model, randomness or Randomness(), drops="drop_path_rate" in options)
    if local and not torch.empty(0).is_meta:
        heads = f"{counted(classes, 'class', 'classes')} and {counted(channels, 'channel')}"
        wanted = f"{_beside(key)} = {weights} does not fit {name} for {heads}"
        _load(model, Path(weights), classes, same_classes, wanted)
    return model


def _fit_efficientformer(model: nn.Module, image_size: int) -> None:
    """Give EfficientFormer's attention, which timm builds for 224 px alone, position biases for another size."""
    from timm.models.efficientformer import Attention

    side = -(-image_size // 32)
    for path, module in list(model.named_modules()):
        if isinstance(module, Attention) and module.attention_biases.shape[1] != side**2:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Attention(module.qkv.in_features, resolution=side))


def _check_name(key: str, name: str) -> None:
    """Refuse what timm, with CvT registered, does not have."""
    import timm

    if name in ("cvt_13", "cvt_21"):
        _register_cvt(key, name)
    if "." in name:
        tag = name.partition(".")[2]
        raise ValueError(f'{key} = "{name}": name the weights apart from the model: {_beside(key)} = "{tag}"')
    if not name or not timm.is_model(name):
        begins = {model[: len(name)]: model for model in reversed(timm.list_models())}
        near = (
            ", ".join(begins[found] for found in difflib.get_close_matches(name or " ", begins)) or "timm.list_models()"
        )
        raise ValueError(f'{key} = "{name}": timm {timm.__version__} has no such model; near it: {near}')


def _register_cvt(key: str, name: str) -> None:
    try:
        from . import cvt  # noqa: F401
    except ImportError as error:
        raise RefusedError(f'{key} = "{name}" is built by transformers: pip install "hsvit-ds[cvt]"') from error


def _beside(key: str) -> str:
    return f"{key.rpartition('.')[0]}.weights"


def _with_tag(key: str, name: str, tag: str) -> str:
    import timm

    if tag == DEFAULT:
        return name
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    if tag not in tags:
        raise ValueError(
            f'{_beside(key)} = "{tag}": neither a file ({", ".join(FILES)}) nor a tag of {name}; '
            f"timm has {', '.join(tags) or 'none'}"
        )
    return f"{name}.{tag}"


def _load(model: Any, path: Path, classes: int, same_classes: bool, message: str) -> None:
    found = unwrapped(read_foreign(path))
    layers = model.pretrained_cfg["classifier"]
    layers = [layers] if isinstance(layers, str) else layers
    if not classes:
        found = {key: tensor for key, tensor in found.items() if key.rpartition(".")[0] not in layers}
    elif not same_classes:
        found = with_own_classifier(found, model.state_dict(), layers)
    load_exactly(model, found, message)


def _convert(model: nn.Module, randomness: Randomness, drops: bool) -> None:
    """Replace every BatchNorm and drop path inside a model; switch off what it drops by default."""
    from timm.layers import DropPath as TimmDropPath

    converted: dict[nn.Module, nn.Module] = {}  # a module may stand in several places
    for path, module in list(model.named_modules(remove_duplicate=False)):
        new: nn.Module
        if module in converted:
            new = converted[module]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            new = _norm(path, module)
        elif isinstance(module, TimmDropPath):
            new = DropPath((module.drop_prob or 0.0) if drops else 0.0, module.scale_by_keep, randomness)
        else:
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            continue
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.train(module.training))
        converted[module] = new


def _norm(path: str, module: Any) -> BatchNorm:
    if not module.affine or not module.track_running_stats or module.momentum is None:
        raise ValueError(f"{path} is a BatchNorm without weights, running statistics or momentum: not supported")
    known = (module.num_features, module.eps, module.momentum)
    act = getattr(module, "act", None)
    new = BatchNorm(*known) if act is None else NormAct(*known, act)
    new.load_state_dict(
        {k: v for k, v in module.state_dict().items() if k != "num_batches_tracked"}, assign=module.weight.is_meta
    )
    return new


def nets(model: nn.Module) -> list[tuple[str, Any]]:
    """(path, timm's network) of a classifier of timm or a backbone, empty for other models."""
    return [(path, module) for path, module in model.named_modules() if hasattr(module, "set_grad_checkpointing")]


def layer_numbers(model: Any, stages: bool) -> dict[str, int]:
    """{parameter: which layer or stage it belongs to, 0 the nearest to the images}, as timm groups them.

    Final norms belong to the last layer before them.
    """
    from timm.models import group_parameters

    try:
        groups = group_parameters(model, model.group_matcher(coarse=stages), reverse=True)
    except (AttributeError, AssertionError) as error:
        what = "stages" if stages else "layers"
        raise ValueError(f"timm does not tell the {what} of {type(model).__name__} ({first_line(error)})") from error
    parameters = dict(model.named_parameters())
    matrices = {number for name, number in groups.items() if parameters[name].dim() > 1}
    order = {number: place for place, number in enumerate(sorted(matrices))}
    last = len(order) - 1
    return {
        name: order.get(number, max((order[n] for n in order if n < number), default=min(0, last)))
        for name, number in groups.items()
    }
