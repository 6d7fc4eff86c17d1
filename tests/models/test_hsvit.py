"""HSViT is the published model, and M submodules are what the papers claim of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hsvit_ds.engine.foreign import import_hsvit
from hsvit_ds.models import backbone as backbones
from hsvit_ds.models.hsvit import VARIANTS, Config, HSViT
from hsvit_ds.models.slimmable import FULL
from hsvit_kernels.random import Draw
from tools.benchmarks.published import published

# variant, image side, colour channels, classes: parameters, MFLOPs (arXiv 2404.05196, counted on the published code)
PUBLISHED = {
    ("C2A2", 32, 3, 10): (812_298, 203.43),
    ("C3A4", 32, 3, 10): (2_242_826, 687.75),
    ("C4A8", 32, 3, 10): (6_873_354, 1276.54),
    ("C2A2", 32, 3, 100): (818_148, 203.44),
    ("C3A4", 32, 3, 100): (2_248_676, 687.76),
    ("C4A8", 32, 3, 100): (6_879_204, 1276.56),
    ("C2A2", 28, 1, 10): (810_186, 156.31),
    ("C3A4", 28, 1, 10): (2_240_714, 534.22),
    ("C4A8", 28, 1, 10): (6_871_242, 1016.35),
    ("C2A2", 64, 3, 200): (824_648, 440.57),
    ("C3A4", 64, 3, 200): (2_255_176, 1264.62),
    ("C4A8", 64, 3, 200): (6_885_704, 1853.42),
    ("C2A2", 128, 3, 101): (818_213, 1728.73),
    ("C3A4", 128, 3, 101): (2_248_741, 2213.05),
    ("C4A8", 128, 3, 101): (6_879_269, 6878.70),
    ("ImageNet-256", 256, 3, 1000): (6_964_616, 8747.38),
}
# variant, image side, classes: for M = 2, 4, 8, 16 parameters with a shared projection, and MFLOPs
SUBMODULES = {
    ("C2A2", 32, 10): [(683_274, 109.06), (618_762, 61.88), (586_506, 38.28), (570_378, 26.49)],
    ("C3A4", 32, 10): [(1_671_434, 366.89), (1_385_738, 206.46), (1_242_890, 126.24), (1_171_466, 86.13)],
    ("C4A8", 32, 10): [(4_532_490, 729.19), (3_362_058, 455.51), (2_776_842, 318.67), (2_484_234, 250.25)],
    ("C4A8", 64, 200): [(4_544_840, 1022.94), (3_374_408, 607.71), (2_789_192, 400.09), (2_496_584, 296.28)],
}
OWN_PROJECTIONS_C2A2 = {2: 687_434, 4: 631_242, 8: 615_626, 16: 632_778}
TINY = Config(kernels=(8, 16), pool_strides=(4, 2), groups=4, depth=2, heads=2, embedding=16, dropout=0.0)


def on_meta(config: Config, size: int, channels: int, classes: int) -> HSViT:
    with torch.device("meta"):
        return HSViT(config, image_size=size, channels=channels, classes=classes)


def tiny(config: Config = TINY, size: int = 32, **more: Any) -> HSViT:
    return HSViT(config, image_size=size, channels=3, classes=5, **more).double()


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def images(batch: int = 4, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_parameters_and_flops_are_the_published_ones(case: tuple[str, int, int, int]) -> None:
    variant, size, channels, classes = case
    count, mflops = PUBLISHED[case]
    config = Config(variant=variant)
    assert parameters(on_meta(config, size, channels, classes)) == count
    assert round(2 * config.macs(size, channels, classes) / 1e6, 2) == mflops


@pytest.mark.parametrize("index", range(4), ids=["M=2", "M=4", "M=8", "M=16"])
@pytest.mark.parametrize("case", SUBMODULES, ids=str)
def test_parameters_and_flops_of_submodules(case: tuple[str, int, int], index: int) -> None:
    variant, size, classes = case
    count, mflops = SUBMODULES[case][index]
    m = 2 ** (index + 1)
    config = Config(variant=variant, submodules=m)
    own_projections = (m - 1) * (64 * 64 + 64)
    found = parameters(on_meta(config, size, 3, classes))
    assert found == count + own_projections
    assert round(2 * config.macs(size, 3, classes) / 1e6, 2) == mflops
    if case == ("C2A2", 32, 10):
        assert found == OWN_PROJECTIONS_C2A2[m]


def separable(variant: str, size: int, channels: int, m: int) -> tuple[int, int, int]:
    """(weights of convolutions, numbers of BatchNorm, multiply-adds) of a depthwise-separable trunk of M submodules, a
    convolution at a time."""
    weights = norms = macs = 0
    c_in, side = channels, size
    blocks = zip(VARIANTS[variant].kernels, VARIANTS[variant].pool_strides[size], strict=True)
    for block, (c_out, stride) in enumerate(blocks):
        dense, depthwise = (3 * 3 * c_in * c_out, c_out), (3 * 3 * c_in, c_in)
        units = [dense] if block == 0 else [depthwise, (c_in * c_out // m, c_out)]
        for count, normed in [*units, (3 * 3 * c_out, c_out), (c_out * c_out // m, c_out)]:
            weights, norms, macs = weights + count, norms + 2 * normed, macs + count * side**2
        c_in, side = c_out, -(-side // stride)
    return weights, norms, macs


@pytest.mark.parametrize("m", [1, 2, 8])
@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_depthwise_separable_counts_are_the_closed_form(case: tuple[str, int, int, int], m: int) -> None:
    variant, size, channels, classes = case
    weights, norms, macs = separable(variant, size, channels, m)
    dense, config = (Config(variant=variant, submodules=m, depthwise=on) for on in (False, True))
    models = [on_meta(each, size, channels, classes) for each in (dense, config)]
    trunks = [parameters(model.submodules.trunk) for model in models]
    assert trunks[1] == weights + norms
    assert parameters(models[1]) - trunks[1] == parameters(models[0]) - trunks[0]
    with FlopCounterMode(display=False) as counter:
        models[1].eval().submodules.trunk[0](torch.empty(1, channels, size, size, device="meta"), FULL)
    first = VARIANTS[variant].kernels[0]
    assert counter.get_total_flops() == 2 * size**2 * (9 * channels * first + 9 * first + first**2 // m)
    k, depth, f = VARIANTS[variant].kernels[-1], VARIANTS[variant].depth, config.resolved(size).features(size)
    n, d = k // 16 + 1, 64
    rest = k * f * d + 16 * depth * (4 * n * d**2 + 2 * n**2 * d) + d * classes
    assert config.macs(size, channels, classes) == macs + rest


def test_depthwise_separable_counts_of_c4a8() -> None:
    assert separable("C4A8", 32, 3, 1)[:2] == (534_592, 6_656)
    config = Config(variant="C4A8", depthwise=True)
    assert parameters(on_meta(config, 32, 3, 10)) == 2_727_306
    assert round(2 * config.macs(32, 3, 10) / 1e9, 2) == 0.31


def test_a_depthwise_separable_block_is_made_of_pytorchs_layers() -> None:
    """Howard et al.'s (arXiv 1704.04861), with the first convolution of an image dense."""
    model = tiny(replace(TINY, depthwise=True)).train()
    x = images()
    expected, c_in = x, 3
    for block, (c_out, stride) in zip(model.submodules.trunk, ((8, 4), (16, 2)), strict=True):
        between = c_out if c_in == 3 else c_in
        layers = [nn.Conv2d(c_in, between, 3, padding=1, groups=1 if c_in == 3 else c_in, bias=False)]
        layers += [] if c_in == 3 else [nn.Conv2d(c_in, c_out, 1, bias=False)]
        layers += [
            nn.Conv2d(c_out, c_out, 3, padding=1, groups=c_out, bias=False),
            nn.Conv2d(c_out, c_out, 1, bias=False),
        ]
        ours = [module for module in block.children() if isinstance(module, nn.Conv2d)]
        for layer, one in zip(layers, ours, strict=True):
            layer.weight = one.weight
            expected = nn.BatchNorm2d(layer.out_channels).double()(layer(expected)).relu()
        expected, c_in = nn.MaxPool2d(3, stride, 1)(expected), c_out
    found = x
    for block in model.submodules.trunk:
        found = block(found, FULL)
    torch.testing.assert_close(found, expected)


def test_depthwise_where_there_is_no_trunk_is_refused() -> None:
    with pytest.raises(ValueError, match=r"depthwise = true is of the trunk's convolutions, and convolution = false"):
        replace(TINY, depthwise=True, convolution=False)
    with pytest.raises(ValueError, match=r"depthwise is of HSViT's own trunk; a backbone takes its place"):
        Config(backbone=backbones.Config(name="resnet50"), depth=2, depthwise=True)


def test_flops_equal_what_the_published_model_dispatches() -> None:
    model = published("C2A2", 32)
    with FlopCounterMode(display=False) as counter:
        model.train()(torch.randn(2, 3, 32, 32))
    counted = counter.get_total_flops() / 2
    # PyTorch's counter sees attention's projections and products, all of which the closed form has
    assert counted == pytest.approx(2 * Config(variant="C2A2").macs(32, 3, 10), rel=0.005)


def randomised(model: nn.Module) -> nn.Module:
    """Weights that hide nothing: running statistics and biases away from 0 and 1."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
        if isinstance(module, nn.MultiheadAttention):
            nn.init.normal_(module.in_proj_bias, generator=generator)
    return model


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("variant", "size"), [("C2A2", 32), ("C3A4", 28), ("C2A2", 64)])
def test_equals_the_published_model(variant: str, size: int, train: bool) -> None:
    theirs = randomised(published(variant, size, dropout=0.0)).double().train(train)
    ours = import_hsvit(theirs.state_dict(), image_size=size, pool_strides=VARIANTS[variant].pool_strides[size])
    ours = ours.double().train(train)
    ours.config = ours.submodules.config = replace(ours.config, dropout=0.0)
    x = images(2, size)
    logits = [model(x) for model in (ours, theirs)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-9, atol=1e-9)
    for y in logits:
        y.square().sum().backward()
    mine, other = (
        ours.submodules.trunk[0].conv1.weight.grad,
        theirs.model.conv2d_layers[0].layer[0].convolution.weight.grad,
    )
    torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("depthwise", [False, True], ids=["dense", "depthwise"])
@pytest.mark.parametrize("m", [2, 4])
def test_submodules_apart_equal_submodules_together(m: int, depthwise: bool) -> None:
    """What a rank computes of its own submodule, summed, is the whole model, gradients included; dropout on."""
    config = replace(TINY, submodules=m, dropout=0.2, depthwise=depthwise)
    whole = tiny(config)
    apart = [tiny(config, here=range(i, i + 1)) for i in range(m)]
    x, draw = images(), Draw.of(0, image=torch.arange(4))
    expected = whole(x, draw)
    sums = sum(model.submodules(x, draw).sum(1) for model in apart)
    found = apart[0].head(sums / config.groups)
    torch.testing.assert_close(found, expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    for name, parameter in whole.submodules.named_parameters():
        parts = [model.submodules.get_parameter(name).grad for model in apart]
        torch.testing.assert_close(torch.cat(parts), parameter.grad, msg=lambda text, n=name: f"{n}: {text}")


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return function(*args, **(kwargs or {}))


def test_groups_and_submodules_are_computed_together() -> None:
    """As many operations for 8 groups in 4 submodules as for 2 in 2: nothing loops over them."""
    calls = []
    for m, groups in [(2, 2), (4, 8)]:
        model = tiny(replace(TINY, submodules=m, groups=groups))
        with _Count() as counter:
            model(images(), Draw.of(0, image=torch.arange(4))).sum().backward()
        calls.append(counter.calls)
    assert calls[0] == calls[1]


@pytest.mark.parametrize("size", [28, 30, 33, 50])
def test_any_image_side_fits_the_projection(size: int) -> None:
    """The pools round up; the published code assumed that they round down."""
    model = tiny(size=size)
    assert model(images(2, size)).shape == (2, 5)
    with FlopCounterMode(display=False) as counter:
        model(images(1, size))
    assert counter.get_total_flops() < 2 * model.config.macs(size, 3, 5)  # the last layer runs for CLS only


@pytest.mark.parametrize("kernel", [1, 2, 5])
def test_any_kernel_size(kernel: int) -> None:
    assert tiny(replace(TINY, kernel_sizes=(kernel, kernel)))(images(2)).shape == (2, 5)


def test_ablation_without_attention_averages_the_tokens() -> None:
    model = tiny(replace(TINY, depth=0, submodules=2)).eval()
    assert not hasattr(model.submodules, "cls")
    tokens = model.submodules.tokens(images(), None)
    torch.testing.assert_close(model(images()), model.head(tokens.mean(1)))


def test_ablation_without_convolution_tiles_the_colour_planes() -> None:
    model = tiny(replace(TINY, convolution=False, kernels=(16,), pool_strides=(), submodules=2), size=4).eval()
    x = images(2, 4)
    tokens = model.submodules.tokens(x, None)
    torch.testing.assert_close(tokens, x.flatten(2).repeat(1, 6, 1)[:, :16])
    assert model(x).shape == (2, 5)


def test_the_mean_runs_over_the_submodules_that_answered() -> None:
    model = tiny(replace(TINY, submodules=4)).eval()
    x = images()
    sums = model.submodules(x, None)
    present = torch.tensor([True, False, True, False])
    torch.testing.assert_close(model(x, present=present), model.head(sums[:, [0, 2]].sum(1) / 2))
    by_image = torch.eye(4, dtype=torch.bool)
    expected = model.head(torch.stack([sums[i, i] for i in range(4)]))
    torch.testing.assert_close(model(x, present=by_image), expected)
    torch.testing.assert_close(model(x, present=torch.ones(4, dtype=torch.bool)), model(x))


def test_submodule_drop_trains_random_subsets_and_never_none() -> None:
    model = tiny(replace(TINY, submodules=4, submodule_drop=0.5))
    present = model._drop_submodules(Draw.of(0, image=torch.arange(4096)))
    assert present.any(1).all()
    expected = 0.5 + 0.5**4 / 4  # a submodule is also present when all were to drop and it was the luckiest
    assert abs(present.double().mean() - expected) < 4 * 0.5 / present.numel() ** 0.5
    x, draw = images(4096 // 1024), Draw.of(0, image=torch.arange(4))
    torch.testing.assert_close(model.train()(x, draw), model(x, draw, present=present[:4]))


def degraded(whole: HSViT, absent: tuple[int, ...], here: range) -> HSViT:
    """The submodules `here` of a whole model, on a grid without `absent`."""
    grid: Any = SimpleNamespace(absent=absent, submodule_ranks=1, exchange=lambda sums, form: sums.sum(1))
    model, m = tiny(whole.config, here=here, grid=grid), whole.config.submodules
    for name, tensor in whole.state_dict().items():
        own = torch.cat(tensor.chunk(m)[here.start : here.stop]) if name.startswith("submodules.") else tensor
        model.state_dict()[name].copy_(own)
    return model


@pytest.mark.parametrize(("absent", "here"), [((0,), range(1, 4)), ((2, 3), range(2))])
def test_the_mean_runs_over_the_submodules_that_the_grid_has(absent: tuple[int, ...], here: range) -> None:
    whole = tiny(replace(TINY, submodules=4, dropout=0.2))
    model = degraded(whole, absent, here)
    x, draw = images(), Draw.of(0, image=torch.arange(4))
    rest = torch.tensor([m not in absent for m in range(4)])
    torch.testing.assert_close(model(x, draw), whole(x, draw, present=rest))
    torch.testing.assert_close(model(x, draw, present=torch.ones(4, dtype=torch.bool)), model(x, draw))
    answered = torch.tensor([True, True, False, False])  # one of them is absent, or none
    torch.testing.assert_close(model(x, draw, present=answered), whole(x, draw, present=answered & rest))


def test_submodule_drop_leaves_one_of_those_that_the_grid_has() -> None:
    whole = tiny(replace(TINY, submodules=4, submodule_drop=0.5))
    model = degraded(whole, (1,), range(2, 4))
    draw = Draw.of(0, image=torch.arange(4096))
    present, before = model._drop_submodules(draw), whole._drop_submodules(draw)
    assert not present[:, 1].any()
    assert present.any(1).all()
    assert (present & ~before).any()  # the absent one was the luckiest and only one
    assert not (before & ~present)[:, [0, 2, 3]].any()
    expected = 0.5 + 0.5**3 / 3
    assert abs(present[:, [0, 2, 3]].double().mean() - expected) < 4 * 0.5 / (3 * 4096) ** 0.5
    few = Draw.of(0, image=torch.arange(4))
    torch.testing.assert_close(model.train()(images(), few), model(images(), few, present=present[:4]))


def test_initial_weights_depend_on_the_global_submodule_only() -> None:
    config = replace(TINY, submodules=4)
    whole, part = tiny(config, seed=3), tiny(config, seed=3, here=range(2, 4))
    for name, parameter in part.submodules.named_parameters():
        torch.testing.assert_close(parameter, whole.submodules.get_parameter(name).chunk(2)[1])
    assert not torch.equal(*whole.submodules.cls.chunk(2))
    assert not torch.equal(whole.submodules.cls, tiny(config, seed=4).submodules.cls)


def test_initial_weights_are_spread_like_pytorchs() -> None:
    ours = HSViT(Config(variant="C2A2"), image_size=32, channels=3, classes=10)
    theirs = published("C2A2", 32)
    pairs = [
        (ours.submodules.trunk[1].conv1.weight, theirs.model.conv2d_layers[1].layer[0].convolution.weight),
        (ours.submodules.projection_weight, theirs.model.embed_projection[0].weight),
        (ours.submodules.qkv_weight[0, 0], theirs.model.attn_encoders[0][0].attn_block.self_attn.in_proj_weight),
        (ours.submodules.out_weight[0, 0], theirs.model.attn_encoders[0][0].attn_block.self_attn.out_proj.weight),
        (ours.submodules.positions, theirs.model.position_embeddings),
        (ours.head.linear.weight, theirs.classifier.mlp_head[1].weight),
    ]
    for mine, other in pairs:
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.1)
    assert not ours.submodules.qkv_bias.any()
    assert not ours.submodules.out_bias.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "C9"}, 'variant = "C9": must be one of'),
        ({"heads": 7}, "heads = 7 does not divide embedding = 64"),
        ({"submodules": 3}, "submodules = 3 does not divide groups = 16"),
        ({"groups": 24}, "groups = 24 does not divide the 128 kernels"),
        ({"kernels": (6, 16), "pool_strides": (2, 2), "submodules": 4}, "submodules = 4 does not divide kernels 6"),
        ({"pool_strides": (2,)}, "pool_strides has 1 entries for 2 conv blocks"),
        ({"kernel_sizes": (3, 0)}, r"kernel_sizes = \[3, 0\]: each must be at least 1"),
        ({"convolution": False}, "convolution = false needs images of embedding = 64 pixels; 32 x 32 = 1024"),
        ({"kernels": (8, 8, 16)}, "pool_strides is not set and not known for 32 px"),
        ({"dropout": 1.0}, r"dropout = 1.0: must be in \[0, 1\)"),
        ({"variant": ""}, "name a variant or a backbone, or set both kernels and depth"),
    ],
)
def test_an_impossible_combination_is_refused_with_the_arithmetic(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(Config(variant="C2A2"), **change).resolved(32)
