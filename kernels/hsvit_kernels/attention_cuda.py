"""Grouped attention in CUDA C++, for groups of 32 tokens and CLS, 64 features in eight heads, in bf16: cuda/*.h.

What Triton cannot express: a warp that keeps an image's tokens in registers, and shares everything else with those of
seven other images in shared memory. NVRTC compiles it at first use; it comes with PyTorch, as NVIDIA's bindings do.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .cases import Case
from .random import keep_scale

TOKENS, WIDTH, HEADS = 33, 64, 8
WARPS = 8  # of a block, an image each
FOLDED = 256 * WIDTH + 2 * 256  # numbers of 16 bits that the weights of a layer become
WEIGHTS = (torch.float32, torch.bfloat16)
LARGE = ("90", "100", "103")
"""Compute capabilities with 227 KB of shared memory a block, of which the backward takes all but one."""
BLOCKS = 132  # of the backward, one on each multiprocessor of an H100; more, and there are more sums to add


class Entry(NamedTuple):
    """A kernel: a function of a namespace of cuda/*.h, with its template arguments."""

    namespace: str
    function: str

    @property
    def checks(self) -> str:
        """Include, and what the header and this file must agree in."""
        at, (arguments, shared) = self.namespace, ENTRIES[self.namespace]
        sizes = f"sizeof({at}::Arguments) == {ctypes.sizeof(arguments)} && {at}::SHARED == {shared}"
        return f'#include "{at}.h"\nstatic_assert({sizes});\n'

    @property
    def name(self) -> str:
        """As a profiler shows it."""
        return f"grouped_attention_{self.namespace}"

    @property
    def source(self) -> str:
        """A program with the kernel."""
        of = f"__launch_bounds__({WARPS * 32}, 1) {self.name}(const __grid_constant__ {self.namespace}::Arguments a)"
        return f'{self.checks}extern "C" __global__ void {of} {{ {self.namespace}::{self.function}(a); }}\n'


def _structure(pointers: str, **others: Any) -> type[ctypes.Structure]:
    """As a header's `Arguments` lie in memory."""
    fields = [*((pointer, ctypes.c_void_p) for pointer in pointers.split()), *others.items()]
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})


_int, _long, _float = ctypes.c_int, ctypes.c_longlong, ctypes.c_float
_SIZES = {"batch": _int, "groups": _int, "depth": _int, "first_group": _int}
_WEIGHTS = "cls positions norm_weight norm_bias qkv_weight qkv_bias out_weight out_bias"
ENTRIES = {
    "weights": (_structure(f"{_WEIGHTS} folded", groups=_int, depth=_int, keep_scale=_float), 0),
    "forward": (
        _structure("tokens folded key images out saved", stride_image=_long, **_SIZES, eps=_float),
        86528,
    ),
    "backward": (
        _structure(
            "saved dout folded key images dtokens dcls products sums",
            **_SIZES,
            share=_int,
            eps=_float,
            keep_scale=_float,
        ),
        231584,
    ),
}
"""By namespace, which is a header's name too: its arguments, and the bytes of shared memory of a block."""


def fits(case: Case, device: torch.device) -> bool:
    """Whether there is a kernel for a case of grouped attention on a device."""
    shape = tuple(case.size(name) for name in ("T", "D", "heads", "all_tokens"))
    if shape != (TOKENS, WIDTH, HEADS, 0) or case.dtype != torch.bfloat16 or case.weights not in WEIGHTS:
        return False
    capability = dispatch.capability(device)
    if case.size("training"):
        return capability in LARGE
    return capability.isdigit() and int(capability) >= 80


def headers() -> list[Path]:
    """What the kernels are made of."""
    return sorted(Path(__file__).with_name("cuda").glob("*.h"))


# What is launched


def folded_size(groups: int, depth: int) -> int:
    """Numbers of 16 bits."""
    return groups * (depth * FOLDED + TOKENS * WIDTH * 2)


def fold(folded: Tensor, weights: list[Tensor], drop: int) -> None:
    """`cls` to `out_bias` as the kernels read them (cuda/weights.h). drop: in 1/256."""
    groups, depth = weights[2].shape[:2]
    halves = all(weight.dtype == torch.bfloat16 for weight in weights)
    weights = [_aligned(weight if halves else weight.float()) for weight in weights]
    numbers = groups, depth, keep_scale(drop / 256)
    entry = Entry("weights", f"run<{str(halves).lower()}>")
    launch(entry, (groups * depth + groups, 1), folded, [*weights, folded], *numbers)


def forward(
    tokens: Tensor, folded: Tensor, key: Tensor | None, image: Tensor | None, out: Tensor, saved: Tensor,
    depth: int, drop: int, first_group: int, eps: float,
) -> None:  # fmt: skip
    """To `out` [B, G, D] and, where it has elements, `saved` [G, A, B, T, D]."""
    batch, groups = out.shape[:2]
    if tokens.stride(2) == 1 and (tokens.stride(1) % 2 or tokens.stride(0) % 2 or tokens.data_ptr() % 4):
        tokens = tokens.clone(memory_format=torch.contiguous_format)  # they are read by pairs
    by_image, by_token, by_column = tokens.stride()
    entry = Entry("forward", f"run<{drop}, {str(saved.numel() > 0).lower()}, {by_token}, {by_column}>")
    tensors, numbers = [tokens, folded, key, image, out, saved], (by_image, batch, groups, depth, first_group, eps)
    launch(entry, (-(-batch // WARPS), groups), tokens, tensors, *numbers)


def backward(
    dout: Tensor, saved: Tensor, folded: Tensor, key: Tensor | None, image: Tensor | None, drop: int, first_group: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of the tokens, bf16 [B, K, D], and of CLS by image, fp32 [B, G, D]; what those of the weights are
    made of, in parts (`attention_weight_kernels.weight_products`)."""
    groups, depth, batch, length, width = saved.shape
    parts, share = splits(batch, groups)
    dtokens = saved.new_empty((batch, groups * (length - 1), width))
    dcls = saved.new_empty((batch, groups, width), dtype=torch.float32)
    products = saved.new_empty((parts, groups * depth, 4, width, width), dtype=torch.float32)
    sums = saved.new_empty((parts, groups * depth, 4, width), dtype=torch.float32)
    tensors = [saved, _aligned(dout), folded, key, image, dtokens, dcls, products, sums]
    numbers = batch, groups, depth, first_group, share, eps, keep_scale(drop / 256)
    launch(Entry("backward", f"run<{drop}>"), (parts, groups), saved, tensors, *numbers)
    return dtokens, dcls, products, sums


def splits(batch: int, groups: int) -> tuple[int, int]:
    """Into how many parts the backward splits a group's images, and how many there are in one."""
    share = WARPS * -(-batch // (WARPS * max(1, BLOCKS // groups)))
    return -(-batch // share), share


def _aligned(x: Tensor) -> Tensor:
    """In one piece that can be read eight bytes at a time: parameters lie anywhere in ZeRO's buffers."""
    x = x.contiguous()
    return x if x.data_ptr() % 8 == 0 else x.clone()


# How it is launched


def launch(
    entry: Entry, grid: tuple[int, int], near: Tensor, tensors: Sequence[Tensor | None], *numbers: float
) -> None:
    """Launch a kernel on the device of `near`; only compile it while `dispatch.compiling`.

    Raises:
        RuntimeError: NVRTC or the driver refuses, with its words.
    """
    from cuda.bindings import driver

    kernel = _loaded(entry, near.device.index, dispatch.capability(near.device))
    if dispatch.compiling:
        return
    filled = arguments(entry, tensors, numbers)
    pointer = ctypes.c_void_p(ctypes.addressof(filled))
    shared, block = ENTRIES[entry.namespace][1], (WARPS * 32, 1, 1)
    with torch.cuda.device_of(near):
        stream = torch.cuda.current_stream().cuda_stream
        _checked(driver.cuLaunchKernel(kernel, *grid, 1, *block, shared, stream, ctypes.addressof(pointer), 0))


def arguments(entry: Entry, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> ctypes.Structure:
    """What a kernel is given. Tensors by their addresses: they must live until it is launched."""
    return ENTRIES[entry.namespace][0](*(None if x is None else x.data_ptr() for x in tensors), *numbers)


@functools.cache
def _loaded(entry: Entry, index: int, capability: str) -> Any:
    from cuda.bindings import driver

    with torch.cuda.device(index):
        torch.cuda.current_stream().synchronize()  # makes the device's context
        (module,) = _checked(driver.cuModuleLoadData(machine_code(entry, capability)))
        (kernel,) = _checked(driver.cuModuleGetFunction(module, entry.name.encode()))
        wanted = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(kernel, wanted, ENTRIES[entry.namespace][1]))
    return kernel


@functools.cache
def machine_code(entry: Entry, capability: str) -> bytes:
    """A kernel for GPUs of a compute capability such as "90", by NVRTC.

    Raises:
        RuntimeError: what the compiler says.
    """
    from cuda.bindings import nvrtc

    texts = [header.read_bytes() for header in headers()]
    names = [header.name.encode() for header in headers()]
    source = entry.source.encode()
    (program,) = _checked(nvrtc.nvrtcCreateProgram(source, b"entry.cu", len(texts), texts, names))
    try:
        options = [f"--gpu-architecture=sm_{capability}".encode(), b"--std=c++17", b"-default-device"]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))[0]
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"{entry.function} for sm_{capability}: {log.decode()}")
        code: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))[0]
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(found: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a function of CUDA returned, but for its error."""
    error, *values = found
    if error:
        raise RuntimeError(f"CUDA: {error.name}")
    return tuple(values)
