"""The first use of kernels on a device model: each case is compiled, compared with the reference, and timed beside it.

`auto` goes by what is found here. A kernel is used only where it is right (`trials.py` has the rule), gives the same
bits again, and was faster; whatever raises means the reference.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime import _async_compile

from . import attention_cuda, configurations, dispatch
from .cases import Case, Cases
from .configurations import Options, Place
from .findings import Findings, Memory, Verdict, fastest, place_name, tried
from .trials import Trial, excess, trial


class Machine:
    """A GPU that kernels are tried on."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())

    @property
    def about(self) -> dict[str, str]:
        """What findings hold for."""
        return {
            "device": torch.cuda.get_device_name(self.device),
            "driver": _driver(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "hsvit_kernels": _package(),
        }

    def milliseconds(self, step: Callable[[], Any]) -> float:
        """The median of a step's time, host included."""
        with torch.cuda.device(self.device):
            return float(triton.testing.do_bench(step, warmup=10, rep=40, return_mode="median"))

    def wait(self) -> None:
        """Until everything has been computed; raises where the context is gone."""
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Give memory back."""
        torch.cuda.empty_cache()


def _driver() -> str:
    """The NVIDIA driver's version, as nvidia-smi has it."""
    version = ctypes.create_string_buffer(96)
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(version, len(version)) == 0:
            return version.value.decode()
    except (OSError, AttributeError):
        pass
    return "unknown"


@functools.cache
def _package() -> str:
    """The kernels' sources, by a digest: a version's name does not change with every change of a kernel."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), *attention_cuda.headers(), configurations.FILE]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


class LostDeviceError(RuntimeError):
    """A kernel took the CUDA context with it: this process can compute nothing more on the device."""


def prepare(
    cases: Cases,
    device: torch.device | str = "cuda",
    *,
    known: Findings | None = None,
    machine: Machine | None = None,
) -> Findings:
    """Try what has not been tried on this device model, and let `auto` go by it in this process.

    Args:
        cases: as `cases.listing` gives them.
        known: findings that go before the file's, as of a run that is resumed; of another identity they are ignored.
        machine: stands for the device.

    Returns:
        The verdicts on all of `cases`, and what a person should know.

    Raises:
        LostDeviceError: a kernel killed the CUDA context. The next start leaves it out.
    """
    machine = machine or Machine(device)
    found = attempt(cases, machine, known)
    install(found, cases, machine)
    return found


def attempt(cases: Cases, machine: Machine, known: Findings | None = None) -> Findings:
    """`prepare` without its effect."""
    about = machine.about
    found = Findings(about)
    if known is not None and known.about == about:
        found = known.on(cases)
    tries = _tries(cases, machine)
    if all(name in found.verdicts for name in tries):
        return found
    try:
        with Memory(about) as memory:
            _attempt(cases, machine, memory, found)
            found.notes += memory.notes
    except TimeoutError as error:
        found.notes.append(str(error))
        found.verdicts |= {name: Verdict("raised", "waited for") for name in tries if name not in found.verdicts}
    return found


def _tries(cases: Cases, machine: Machine) -> dict[str, tuple[Case, str]]:
    """Every case by every kernel that there is for it."""
    found = {}
    for case in cases:
        cuda = case.operation == "grouped_attention" and attention_cuda.fits(case, machine.device)
        for kernel in dispatch.KERNELS if cuda else ("triton",):
            found[tried(str(case), kernel)] = (case, kernel)
    return found


def _attempt(cases: Cases, machine: Machine, memory: Memory, found: Findings) -> None:
    remembered = memory.read()
    found.launches = remembered.launches | found.launches
    found.verdicts = remembered.on(cases).verdicts | found.verdicts
    todo = {name: of for name, of in _tries(cases, machine).items() if name not in found.verdicts}
    device, model = machine.device, found.about["device"]
    before = dispatch.models.get(device)
    dispatch.models[device] = model
    _choose(found, model)
    try:
        for name, (case, kernel) in todo.items():
            memory.trying(name)
            verdict = _verdict(case, kernel, cases[case], machine, memory, found)
            found.verdicts[name] = verdict
            memory.add(name, verdict, found.launches)
    finally:
        if before is None:
            del dispatch.models[device]


def install(found: Findings, cases: Cases, machine: Machine, used: Mapping[str, str] | None = None) -> None:
    """Let `auto` go by findings in this process. used: by case, where it was decided with other devices."""
    model = found.about["device"]
    dispatch.models[machine.device] = model
    if machine.device.type == "cuda":  # the same model has the same verdicts
        for index in range(torch.cuda.device_count()):
            if torch.cuda.get_device_name(index) == model:
                dispatch.models[torch.device("cuda", index)] = model
    _choose(found, model)
    for case in cases:
        name = str(case)
        dispatch.verdicts[model, case] = fastest(name, [found]) if used is None else used[name]


def _choose(found: Findings, model: str) -> None:
    for place in configurations.TABLE:
        if (options := found.launches.get(place_name(place))) is not None:
            configurations.chosen[model, place] = options


def _verdict(
    case: Case, kernel: str, extent: Sequence[int], machine: Machine, memory: Memory, found: Findings
) -> Verdict:
    """Try one case by one kernel. What it raises is a verdict too, unless nothing more can be computed or the process
    shall end."""
    try:
        # In this thread, where compilations are collected, and exceptions belong to whoever waits for them.
        with torch.autograd.set_multithreading_enabled(False), torch.autocast(machine.device.type, enabled=False):
            return _compared(case, kernel, trial(case, extent, machine.device), machine, found)
    except Exception as error:
        try:
            machine.wait()
        except Exception as lost:
            remedy = (
                "start again: it is then left out"
                if memory.path is not None
                else 'engine.kernels = "reference", or HSVIT_KERNELS_CACHE to a folder that can be written'
            )
            raise LostDeviceError(
                f"{tried(str(case), kernel)} killed the CUDA context ({_said(error)}); {remedy}"
            ) from lost
        return Verdict("raised", _said(error))
    except BaseException:
        memory.trying(None)
        raise
    finally:
        with suppress(Exception):
            machine.release()


def _said(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _compared(case: Case, kernel: str, problem: Trial, machine: Machine, found: Findings) -> Verdict:
    with dispatch.forcing(kernel):
        step = problem.step()
        _tune(problem.places if kernel == "triton" else [], case.dtype, step, machine, found)
        ours = problem.results(case.dtype)
        again = problem.results(case.dtype)
    with dispatch.forcing("reference"):
        plain, exact = problem.results(case.dtype), problem.results(torch.float64)
    worst = {
        name: excess(value, plain[name], exact[name], gradient=name not in ("result", "saved"), terms=problem.terms)
        for name, value in ours.items()
    }
    name = max(worst, key=worst.__getitem__)
    if worst[name] > 1:
        return Verdict("wrong", f"{name}: {worst[name]:.3g} times the error that is allowed", worst[name])
    moved = [name for name, value in ours.items() if not torch.equal(value, again[name])]
    if moved:
        return Verdict("wrong", f"{moved[0]}: other bits when computed again", worst[name])
    del plain, exact, ours, again
    with dispatch.forcing(kernel):
        ms = machine.milliseconds(step)
    with dispatch.forcing("reference"):
        reference_ms = machine.milliseconds(step)
    return Verdict("right", "" if ms < reference_ms else "slower", worst[name], ms, reference_ms)


def _tune(
    places: Sequence[Place], dtype: torch.dtype, step: Callable[[], Any], machine: Machine, found: Findings
) -> None:
    """Choose the launches of `places` that have not been chosen on this device model, each by the time of a step."""
    if dtype == torch.float32:
        _compile(step, [])
        return
    model = found.about["device"]
    capability = dispatch.capability(machine.device)
    open_places = {p: configurations.candidates(p, capability) for p in places if place_name(p) not in found.launches}
    _compile(step, [(model, place, options) for place, several in open_places.items() for options in several])
    for place, several in open_places.items():
        times: list[tuple[float, int]] = []
        failure: Exception | None = None
        for number, options in enumerate(several):
            configurations.chosen[model, place] = options
            try:
                step()
                times.append((machine.milliseconds(step) if len(several) > 1 else 0.0, number))
            except Exception as error:
                machine.wait()
                failure = error
        if not times:
            del configurations.chosen[model, place]
            assert failure is not None
            raise failure
        best = several[min(times)[1]]
        configurations.chosen[model, place] = best
        found.launches[place_name(place)] = best


def _compile(step: Callable[[], Any], candidates: Sequence[tuple[str, Place, Options]]) -> None:
    """Compile what a step launches, with every candidate, side by side; an error shows at the launch."""
    if dispatch.INTERPRETED:
        return
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool, _async_compile.AsyncCompileMode(pool, ignore_errors=True):
        dispatch.compiling = True
        try:
            step()
            for model, place, options in candidates:
                before = configurations.chosen.get((model, place))
                configurations.chosen[model, place] = options
                step()
                if before is None:
                    del configurations.chosen[model, place]
        finally:
            dispatch.compiling = False
