"""What is known of a data set without reading a file."""

from __future__ import annotations

from dataclasses import dataclass, field

from . import digits

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.449,), (0.226,)
"""Their means, for grey images of no known set."""


@dataclass(frozen=True)
class Facts:
    """What a model and its input depend on.

    mean, std: of the training images by channel, in units of full scale; 0 and 1 where none are taken off.
    """

    image_size: int
    channels: int
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    samples: dict[str, int] = field(default_factory=dict)
    """Images of each split as published; those of a run are counted in its index."""


def photographs(
    image_size: int,
    classes: int,
    samples: tuple[int, int] | None = None,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Facts:
    """RGB images, or grey ones where `mean` has one number; `samples` of the training and of the held-out split, which
    is both "val" and "test"."""
    counts = {"train": samples[0], "val": samples[1], "test": samples[1]} if samples else {}
    return Facts(image_size, len(mean), classes, mean, std, counts)


# Statistics of CIFAR are those of the published HSViT code, which takes none off Fashion-MNIST and Food-101.
SETS = {
    "digits": Facts(
        digits.SIDE,
        1,
        10,
        digits.MEAN,
        digits.STD,
        {name: stop - start for name, (start, stop) in digits.SPLITS.items()},
    ),
    "cifar10": photographs(32, 10, (50_000, 10_000), mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)),
    "cifar100": photographs(32, 100, (50_000, 10_000), mean=(0.5071, 0.4867, 0.4408), std=(0.2675, 0.2565, 0.2761)),
    "fashion_mnist": photographs(28, 10, (60_000, 10_000), mean=(0.0,), std=(1.0,)),
    "mnist": photographs(28, 10, (60_000, 10_000), mean=(0.1307,), std=(0.3081,)),
    "food101": photographs(128, 101, (75_750, 25_250), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    "imagenette": photographs(128, 10, (9_469, 3_925)),
    "tiny_imagenet": photographs(64, 200, (100_000, 10_000)),
    "imagenet1k": photographs(224, 1000, (1_281_167, 50_000)),
}
