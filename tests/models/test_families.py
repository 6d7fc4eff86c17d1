"""Slimmable MobileNetV2 and UniFormer: published sizes, the networks that they are, and what a width computes."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hsvit_ds.models import macs, mobilenet, parameters, slimmable, uniformer
from hsvit_ds.models.batchnorm import BatchNorm, Statistics, move_running_statistics, recalibrate, set_statistics
from hsvit_ds.models.slimmable import Rounding, Width
from hsvit_kernels import Draw
from tools.benchmarks.published_uniformer import UniFormer as PlainUniFormer

from .test_plain_loops import MOBILENET, UNIFORMER

WIDTHS = slimmable.Config(smallest=0.25, granularity=0.125)
KINDS: dict[str, Any] = {
    "mobilenet": replace(MOBILENET, widths=WIDTHS),
    "uniformer": replace(UNIFORMER, channels=(16, 24, 32, 48), heads=(2, 2), widths=WIDTHS),
    "patches": replace(UNIFORMER, stem="patches", downsampling="patches", heads=(2, 2), widths=WIDTHS),
    "light": replace(UNIFORMER, pruned=True, downsampling="patches", heads=(2, 2), widths=WIDTHS),
}

# Width: parameters, multiply-adds in units of 10^6 at 224 px. MobileNetV2's of US-Net (arXiv 1903.05134, and counted by
# its rules); UniFormer's counted with PyTorch's counter on the published code, its widths scaled and its heads kept.
MOBILENETV2 = {
    "1/4": (1_519_112, 37.2), "0.40625": (None, 80.7), "0.4375": (None, 88.6), "0.46875": (None, 94.1),
    "1/2": (None, 97.1), "0.53125": (None, 100.4), "0.5625": (None, 147.4), "0.59375": (None, 151.0),
    "3/4": (None, 209.1), "1": (3_504_872, 300.8),
}  # fmt: skip
S_PLUS = {
    "1/4": (1_626_296, 315.7), "3/8": (3_534_592, 657.2), "7/16": (4_762_652, 873.8), "1/2": (6_173_320, 1121.1),
    "9/16": (7_766_596, 1398.9), "5/8": (9_542_480, 1707.4), "3/4": (13_642_072, 2416.2), "7/8": (18_472_096, 3247.4),
    "1": (24_032_552, 4201.0),
}  # fmt: skip
S = {
    "1/4": (1_468_728, 274.5), "3/8": (3_182_176, 570.1), "1/2": (5_548_680, 971.3), "5/8": (8_568_240, 1478.1),
    "3/4": (12_240_856, 2090.4), "7/8": (16_566_528, 2808.3), "1": (21_545_256, 3631.8),
}  # fmt: skip
XS = {
    "1/4": (1_249_968, 142.6), "3/8": (2_593_664, 298.9), "1/2": (4_417_168, 512.0), "5/8": (6_720_480, 781.8),
    "3/4": (9_503_600, 1108.3), "7/8": (12_766_528, 1491.5), "1": (16_509_264, 1931.5),
}  # fmt: skip
PUBLISHED = {
    "MobileNetV2": (mobilenet.Config(variant="MobileNetV2"), MOBILENETV2),
    "UniFormer-S+": (uniformer.Config(variant="UniFormer-S+"), S_PLUS),
    "UniFormer-S": (uniformer.Config(variant="UniFormer-S"), S),
    "UniFormer-XS": (uniformer.Config(variant="UniFormer-XS"), XS),
}


def width_of(text: str) -> Width:
    return Width(*Fraction(text).as_integer_ratio())


def images(count: int = 8, side: int = 32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def randomised(model: Any) -> Any:
    """With numbers in every parameter and statistic that tell layers and channels apart."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return model


def built(name: str) -> Any:
    return randomised(KINDS[name].build(image_size=32, channels=3, classes=5).double())


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, (_, table) in PUBLISHED.items() for text in table])
def test_parameters_and_macs_are_the_published_ones(name: str, text: str) -> None:
    config, table = PUBLISHED[name]
    with torch.device("meta"):
        model = config.build(image_size=224, channels=3, classes=1000)
    numbers, millions = table[text]
    width = width_of(text)
    if numbers is not None:
        assert parameters(model, width) == numbers
    assert round(macs(model, width) / 1e6, 1) == millions


def test_what_is_set_goes_before_what_the_variant_has() -> None:
    config = uniformer.Config(variant="UniFormer-XS", pruned=False, mlp_ratio=4.0, stem="patches").resolved(224)
    assert (config.pruned, config.mlp_ratio, config.stem, config.downsampling) == (False, 4.0, "patches", "patches")
    assert config.channels == uniformer.Config(variant="UniFormer-XS").resolved(224).channels


def test_channels_are_rounded_as_us_nets() -> None:
    """Of every size and width: nearest multiple of 8, half upwards, at least 8, above 0.9 of the exact number."""
    for size in range(8, 330, 8):
        for n in range(1, 65):
            exact = size * n / 64
            multiple = int(exact + 4) // 8 * 8
            expected = max(8, multiple + 8 if multiple < 0.9 * exact else multiple)
            assert Width(n, 64).of(size, Rounding(8)) == min(expected, size)
            assert Width(n, 64).of(6 * size, Rounding(8, times=6)) == 6 * min(expected, size)


def test_mobilenetv2_at_a_width_has_us_nets_channels() -> None:
    config = mobilenet.Config(variant="MobileNetV2").resolved(224)
    assert config.at(width_of("1/4")).channels == (8, 8, 8, 8, 16, 24, 40, 80)
    assert config.at(width_of("0.40625")).channels == (16, 8, 16, 16, 24, 40, 64, 128)
    assert config.at(width_of("0.53125")).channels == (16, 8, 16, 16, 32, 48, 88, 168)
    assert config.at(width_of("0.5625")).channels == (24, 16, 16, 24, 40, 56, 88, 184)
    assert config.at(width_of("3/4")).channels == (24, 16, 24, 24, 48, 72, 120, 240)


def without_counts(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}


def assert_equal(ours: Any, theirs: nn.Module, x: Tensor, answers: Any = lambda y: (y,)) -> None:
    """Answers in evaluation, and in training answers, gradients and statistics."""
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-9, atol=1e-9)
    found, expected = answers(ours.train()(x)), answers(theirs.train()(x))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)
    torch.stack(tuple(found)).square().sum().backward()
    torch.stack(tuple(expected)).square().sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        expected_gradient = gradients[name].grad.clone()
        if name.endswith("qkv.bias"):  # no key bias changes a softmax: ours is exactly zero there
            q, k, v = expected_gradient.chunk(3)
            assert float(k.abs().max()) < 1e-12
            expected_gradient = torch.cat((q, torch.zeros_like(k), v))
        torch.testing.assert_close(parameter.grad, expected_gradient, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: n + m)
    buffers = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, buffers[name])


def test_a_mobilenet_is_timms() -> None:
    import timm

    theirs = randomised(timm.create_model("mobilenetv2_100", num_classes=5).double())
    ours = mobilenet.Config(variant="MobileNetV2").build(image_size=64, channels=3, classes=5).double()
    ours.load_state_dict(without_counts(theirs))
    assert_equal(ours, theirs, images(4, 64))


@pytest.mark.parametrize(("text", "name"), [("0.35", "035"), ("1/2", "050"), ("3/4", "075")])
@torch.no_grad()
def test_a_mobilenet_at_a_width_is_timms_of_that_width(text: str, name: str) -> None:
    import timm

    model = randomised(mobilenet.Config(variant="MobileNetV2").build(image_size=64, channels=3, classes=5).double())
    x, width = images(4, 64), width_of(text)
    with recalibrate(model, [width]):
        model(x, width=width)
    theirs = timm.create_model(f"mobilenetv2_{name}", num_classes=5).double().eval()
    theirs.load_state_dict(model.eval().subnet(width).state_dict(), strict=False)
    torch.testing.assert_close(theirs(x), model(x, width=width), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["uniformer", "patches", "light"])
def test_a_uniformer_is_the_published_one(name: str) -> None:
    """Against plain PyTorch with the published names, in which tokens are sorted, cut, computed and sorted back."""
    c = replace(KINDS[name], drop_path=0.0).resolved(32)
    theirs = randomised(PlainUniFormer(c, channels=3, classes=5).double())
    ours = c.build(image_size=32, channels=3, classes=5).double()
    ours.load_state_dict(without_counts(theirs))
    ours.all_heads = True
    assert_equal(ours, theirs, images(), lambda y: y if isinstance(y, tuple) else (y,))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_a_width_is_a_standalone_network_of_the_sliced_weights(name: str, training: bool) -> None:
    """Answers and gradients, in training with this width's batch statistics, in evaluation with its recalibrated ones;
    beside the slice a weight's gradient is zero."""
    x = images()
    for width in WIDTHS.all:
        model = built(name)
        if not width.is_full:
            with recalibrate(model, [width]):
                model(x, width=width)
        small, parts = model.train(training).subnet(width), model._slices(lambda path, width=width: width)
        torch.manual_seed(0)
        found = model(x, width=width)
        torch.manual_seed(0)
        expected = small(x)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        found.square().sum().backward()
        expected.square().sum().backward()
        assert small.config.channels == model.config.at(width).channels
        own, whole = dict(small.named_parameters()), dict(model.named_parameters())
        for key, parameter in whole.items():
            gradient = own[key].grad
            if gradient is None or key not in parts:
                assert (parameter.grad is None) == (gradient is None)
                continue
            (placed,) = torch.autograd.grad(parts[key], parameter, gradient)
            torch.testing.assert_close(parameter.grad, placed, rtol=1e-7, atol=1e-9, msg=lambda m, k=key: k + m)
        if "cls_token" in whole:
            torch.testing.assert_close(width.take(whole["cls_token"].grad, 2), own["cls_token"].grad)


@torch.no_grad()
def test_a_statistic_is_that_of_the_width_also_where_no_channel_is_left_out() -> None:
    """MobileNet's last convolution has all of its outputs at every width, of other inputs."""
    model, x, half = built("mobilenet"), images(), WIDTHS.find(0.5)
    with recalibrate(model, [half]):
        model(x, width=half)
    mean, _ = model.bn2.recalibrated[half]
    assert mean.shape == model.bn2.running_mean.shape
    assert not torch.allclose(mean, model.bn2.running_mean)
    with pytest.raises(ValueError, match=r"BatchNorm has no statistics for width 0.75"):
        model(x, width=0.75)


@pytest.mark.parametrize("name", KINDS)
def test_only_full_passes_move_the_running_statistics(name: str) -> None:
    model, x = built(name).train(), images()
    set_statistics(model, Statistics())
    before = [layer.running_mean.clone() for layer in model.modules() if isinstance(layer, BatchNorm)]
    for width, moves in ((0.5, False), (1.0, True)):
        model(x, draw=Draw.of(0, image=torch.arange(len(x))), width=width)
        move_running_statistics(model, torch.tensor(True), None)
        layers = [layer for layer in model.modules() if isinstance(layer, BatchNorm)]
        now = [not torch.equal(layer.running_mean, old) for layer, old in zip(layers, before, strict=True)]
        assert all(now) if moves else not any(now)


@torch.no_grad()
def test_tokens_with_one_score_are_kept_alike_in_every_batch() -> None:
    """As those of an empty background are."""
    model = built("light").eval()
    x = images(6)
    x[:, :, :, 10:] = 0
    together = model(x)
    for number in range(6):
        torch.testing.assert_close(model(x[number : number + 1]), together[number : number + 1])


@pytest.mark.parametrize(
    ("config", "side", "message"),
    [
        (mobilenet.Config(variant="MobileNetV2"), 8, r"of 8 px have shrunk to 1 x 1 before stage 4, .* fewer of 2"),
        (mobilenet.Config(variant="MobileNetV2", depths=(1, 2)), 64, r"channels has 8 entries .* must have 3"),
        (mobilenet.Config(variant="MobileNetV2", strides=(1, 2)), 64, r"strides has 2 entries .* must have 8"),
        (uniformer.Config(variant="UniFormer-S+"), 8, r"of 8 px have shrunk to 1 x 1 before stage 3"),
        (
            uniformer.Config(variant="UniFormer-S"),
            56,
            r"do not divide the side of 7 of what stage 3 sees of images of 56",
        ),
        (uniformer.Config(variant="UniFormer-XS"), 32, r"have one token in stage 4, and pruned = true keeps half"),
        (uniformer.Config(variant="UniFormer-S+", heads=(7, 16)), 64, r"heads = 7 does not divide the 320 channels"),
        (
            uniformer.Config(variant="UniFormer-XS", widths=slimmable.Config(smallest=0.3, granularity=0.7)),
            64,
            r"width 0.30: 0.3 x the stem's channels 32 = 9.6 is not a whole number; nearest: 0.28125, 0.3125",
        ),
        (
            uniformer.Config(
                variant="UniFormer-S+", heads=(20, 16), widths=slimmable.Config(smallest="3/32", granularity="29/32")
            ),
            64,
            r"width 0.09375: 0.09375 x stage 3's channels 320 = 30 is not a multiple of heads = 20; nearest: 0.0625,",
        ),
    ],
)
def test_what_does_not_fit_is_refused(config: Any, side: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.resolved(side)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mobilenet.Config(), "name a variant, or set channels, depths and strides"),
        (lambda: mobilenet.Config(variant="MobileNetV3"), 'variant = "MobileNetV3": must be MobileNetV2'),
        (lambda: mobilenet.Config(variant="MobileNetV2", strides=(3, 1)), r"strides = \[3, 1\]: each must be 1 or 2"),
        (
            lambda: mobilenet.Config(variant="MobileNetV2", channels=(0, 1)),
            r"channels = \[0, 1\]: each must be at least 1",
        ),
        (lambda: mobilenet.Config(variant="MobileNetV2", features=0), "features = 0: must be at least 1"),
        (lambda: mobilenet.Config(variant="MobileNetV2", drop_path=1.0), r"drop_path = 1.0: must be in \[0, 1\)"),
        (
            lambda: mobilenet.Config(variant="MobileNetV2", widths=slimmable.Config(slice="heads")),
            'widths.slice = "heads": a MobileNet has no heads',
        ),
        (lambda: uniformer.Config(), "name a variant, or set channels, depths and heads"),
        (lambda: uniformer.Config(variant="UniFormer-B"), 'variant = "UniFormer-B": must be one of UniFormer-S, '),
        (lambda: uniformer.Config(variant="UniFormer-S", depths=(1, 2)), r"depths = \[1, 2\]: must be 4 numbers"),
        (lambda: uniformer.Config(variant="UniFormer-S", strides=(4, 4, 2, 2)), r"must be 1, 2 or 4 for the stem"),
        (lambda: uniformer.Config(variant="UniFormer-S", stem="conv"), 'stem = "conv": must be "convolutions" or'),
        (lambda: uniformer.Config(variant="UniFormer-S", mlp_ratio=-1.0), "mlp_ratio = -1.0: must not be negative"),
        (lambda: uniformer.Config(variant="UniFormer-S", drop_path=1.0), r"drop_path = 1.0: must be in \[0, 1\)"),
        (
            lambda: uniformer.Config(variant="UniFormer-S", widths=slimmable.Config(slice="heads")),
            'widths.slice = "heads" is for a ViT',
        ),
    ],
)
def test_values_that_mean_nothing_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", KINDS)
def test_a_mix_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r'has one width for all layers; .* sliced = "mlp"'):
        built(name)(images(), width=[0.5, 1])
