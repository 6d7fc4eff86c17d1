"""Three steps of every case: initial weights, gradient norms, the canonical state, and the collectives of step two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hsvit_ds.data import augment
from hsvit_ds.grid.rounding import size

from .common import state, steps, trainer

COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
calls: list[tuple[str, Any, int]] = []


def counted(name: str) -> Any:
    """torch.distributed's collective, which also notes (name, group, numbers)."""
    original = getattr(dist, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in [*args, *kwargs.values()] if isinstance(a, torch.Tensor)]
        if tensors:
            calls.append((name, kwargs.get("group"), max(t.numel() for t in tensors)))
        return original(*args, **kwargs)

    return call


def main(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """arguments: {"base": recipe, "cases": {name: overrides}}; "choose": whether kernels are tried first; "waiting": of
    `steps`, after the first; "float64": what the models compute in."""
    for name in COLLECTIVES:  # before DeepSpeed takes references to them
        setattr(dist, name, counted(name))
    if arguments.get("float64"):
        compute_in_float64()
    base, choose, waiting = arguments["base"], arguments.get("choose", False), arguments.get("waiting", "default")
    return {
        name: one_case(trainer(folder / name, case, base=base), choose, waiting)
        for name, case in arguments["cases"].items()
    }


def compute_in_float64() -> None:
    """Masters stay fp32 where DeepSpeed has them."""
    from deepspeed.accelerator import get_accelerator

    torch.set_default_dtype(torch.float64)
    get_accelerator().supported_dtypes = lambda: [torch.float32, torch.float64]  # of gradients to be reduced
    prepare: Any = augment.prepare
    augment.prepare = lambda *args: tuple(x.double() for x in prepare(*args))  # type: ignore[assignment]


def one_case(run: Any, choose: bool, waiting: str) -> dict[str, Any]:
    if choose:
        run._choose_kernels()
    initial = {k: v.clone() for k, v in run.engine.module.named_parameters() if v.numel()}
    frozen = [
        f"{path}.{name}"
        for path, module in run.engine.module.named_modules()
        if (weights := list(module.parameters(recurse=False))) and not any(p.requires_grad for p in weights)
        for name in module.state_dict()
    ]
    before = {key: tensor.clone() for key, tensor in state(run).items() if key.rpartition("/")[2] in frozen}
    norms = steps(run, 1)
    run.start = type(run.start)(0, 1, 1)
    calls.clear()
    run.engine.traffic(1)
    norms += steps(run, 2)  # in which the update is captured
    names = {run.grid.replica_group: "replica", run.grid.data_group: "data"}
    traffic = run.engine.traffic(1)
    second_step = [(name, names.get(group, "other"), numbers) for name, group, numbers in calls]
    run.start = type(run.start)(0, 2, 2)
    norms += steps(run, 3, waiting)
    return {
        "initial": initial,
        "not_captured": run.engine.not_captured,
        "norms": norms,
        "state": state(run),
        "calls": second_step,
        "frozen": before,
        "feature_bytes": traffic["comm/feature_bytes"],
        "submodule_ranks": run.grid.submodule_ranks,
        "trained": sum(f.shape.numel() for fragments in run.engine.shards.layout for f in fragments),
        "exchanged": run.plan.micro_batch * _numbers(run.recipe),
    }


def _numbers(recipe: Any) -> int:
    """In a message, of an image: fp32 ones, or bytes."""
    features, form = getattr(recipe.model, "embedding", 0), recipe.grid.exchange
    return features if form == "fp32" else size(features, form)
