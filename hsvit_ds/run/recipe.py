"""What a run is: the components' Configs in one TOML file, read, checked, and completed by what can be derived."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import torch
from pydantic import Discriminator, TypeAdapter, ValidationError

from .. import models
from ..data import augment, splits
from ..data.order import Order, Share
from ..data.sets import Facts
from ..engine import checkpoint, ema, engine, optimizer
from ..errors import RefusedError, counted
from ..grid import grid
from ..models import hsvit
from ..models.batchnorm import BatchNorm
from ..tasks import features, scala, supervised, teacher
from . import table as tables
from . import tracking


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str = ""
    """Of the folder and the MLflow run; by default from the recipe's path (digits/hsvit.toml: "digits-hsvit")."""
    root: str = "runs"
    """Folder of all runs; this one gets `root`/`name`-NNN."""
    seed: int = 0
    """Of the initial weights and of everything random."""
    epochs: int = 10
    """Passes over the training split."""
    global_batch: int = 64
    """Images of one optimizer step, over all replicas and micro batches."""
    micro_batch: int = 0
    """Images of one forward on a replica; 0: the global batch divided by the replicas, without accumulation."""
    bn_batch: int = 0
    """Consecutive images of the global batch that BatchNorm takes its statistics over; 0: all of them."""
    log_every: int = 10
    """Steps between logged metrics."""
    eval_every: int = 1
    """Epochs between evaluations on the validation split."""
    watchdog: float = 1800.0
    """Seconds that a step, a batch of an evaluation or a save may take before the rank writes its stacks down and ends;
    0: for ever. Longer than the first step takes to compile."""
    step_back: float = 0.0
    """What the learning rate is multiplied with when the run goes back to its last checkpoint, after more than
    engine.max_skipped_steps skipped steps in a row; 0: the run ends there."""
    survive: str = "restart"
    """What `hsvit launch` does when hosts are lost for good: "restart" goes on with whole models on what is left, or
    waits for more; "degraded" goes on without the submodules that were lost."""

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch", "log_every", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if not 0 <= self.step_back < 1:
            raise ValueError(f"step_back = {self.step_back}: must be in [0, 1)")
        if self.survive not in ("restart", "degraded"):
            raise ValueError(f'survive = "{self.survive}": must be "restart" or "degraded"')
        for name in ("micro_batch", "bn_batch", "watchdog"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}: must not be negative")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    run: Run = field(default_factory=Run)
    model: Annotated[models.Config, Discriminator("kind")]
    task: Annotated[supervised.Config | scala.Config, Discriminator("kind")] = field(default_factory=supervised.Config)
    data: splits.Config = field(default_factory=splits.Config)
    augment: augment.Config = field(default_factory=augment.Config)
    optimizer: optimizer.Config = field(default_factory=optimizer.Config)
    ema: ema.Config = field(default_factory=ema.Config)
    grid: grid.Config = field(default_factory=grid.Config)
    engine: engine.Config = field(default_factory=engine.Config)
    checkpoint: checkpoint.Config = field(default_factory=checkpoint.Config)
    tracking: tracking.Config = field(default_factory=tracking.Config)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What follows from a recipe and the number of ranks."""

    ranks: int
    replicas: int
    micro_batch: int
    """Images of one forward on a replica."""
    accumulation: int
    """Micro batches of one step (A)."""
    steps_per_epoch: int
    steps: int
    bn_runs: int
    """Runs of BatchNorm's statistics in a micro batch."""
    bn_synced: bool
    """Whether one run spans the replicas."""
    bf16: bool
    parameters: int
    macs: int
    """Multiply-adds of one image, forward."""
    teacher_bytes: int
    """Memory of the teacher's weights on every rank."""

    def share(self, recipe: Recipe, replica: int) -> Share:
        return Share(recipe.run.global_batch, self.accumulation, self.replicas, replica)


def order(recipe: Recipe) -> Order:
    """The order of the training split."""
    return Order(
        splits.shard_lengths(recipe.data),
        recipe.data.window,
        recipe.run.global_batch,
        recipe.run.seed,
        recipe.augment.repeats,
        recipe.data.last_batch == "fill",
    )


def read(path: Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a TOML file, with `key.path=value` overrides; refuses what is unknown or of a wrong type."""
    table = tables.read(path, overrides or [])
    recipe = _build(table, str(path))
    if not recipe.run.name:
        recipe = replace(recipe, run=replace(recipe.run, name=tables.run_name(path)))
    return recipe


def from_table(table: dict[str, Any], where: str) -> Recipe:
    """The recipe in a nested table, as a checkpoint keeps it."""
    return _build(table, where)


def to_table(recipe: Recipe) -> dict[str, Any]:
    """A nested table of every key."""
    return dataclasses.asdict(recipe)


def flat(recipe: Recipe) -> dict[str, Any]:
    """{"model.groups": 16, …}: the recipe as MLflow parameters."""
    return tables.flat(to_table(recipe))


def dumps(recipe: Recipe) -> str:
    return tomli_w.dumps(to_table(recipe))


def _build(table: dict[str, Any], where: str) -> Recipe:
    _refuse_unknown(table, Recipe, "", where)
    preset = augment.PRESETS.get(table.get("augment", {}).get("preset"))
    if preset:
        table = table | {"augment": preset | table["augment"]}
    try:
        # As JSON pydantic is strict about types and still takes a TOML array for a tuple.
        return TypeAdapter(Recipe).validate_json(json.dumps(table), strict=True)
    except ValidationError as error:
        # Of a key of two types each complains, and the other one says what it is.
        lines = [explain(e) for e in error.errors() if e["loc"][-1] != "str" and "tuple[float, ...]" not in e["loc"]]
        raise RefusedError(f"{where}: {'; '.join(lines)}") from error
    except TypeError as error:  # a TOML date, which JSON does not have
        raise RefusedError(f"{where}: {error}") from error


_OR_ELSE = {"float": 'must be a number, or a fraction such as "1/12"', "bool": "must be true, false or a word"}
_OR_ELSE["mlp_ratio"] = "must be a number, or a list of one for each block"
"""What is said of keys that are of such a type or a string, and of this one."""


def explain(error: Any) -> str:
    tagged = error["loc"][:1] in (("model",), ("task",))  # the second part is then the kind
    key = ".".join(str(part) for i, part in enumerate(error["loc"]) if not (tagged and i == 1))
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"[{key}] {message}"
    if error["type"] == "union_tag_not_found":
        return f"{key}.kind is missing: one of {', '.join(_kinds(key))}"
    if error["type"] == "union_tag_invalid":
        return f'{key}.kind = "{error["input"]["kind"]}": must be one of {", ".join(_kinds(key))}'
    if error["type"] == "missing":
        return f"{key} is missing"
    if said := [_OR_ELSE[part] for part in error["loc"][-2:] if part in _OR_ELSE]:
        return f"{key.rpartition('.')[0]} = {error['input']!r}: {said[0]}"
    return f"{key} = {error['input']!r}: {message[:1].lower()}{message[1:]}"


def _kinds(table: str) -> dict[str, Any]:
    """{kind: Config} of a table that has several."""
    return {config.kind: config for config in typing.get_args(typing.get_type_hints(Recipe)[table])}


def _refuse_unknown(table: dict[str, Any], config: Any, prefix: str, where: str, above: Collection[str] = ()) -> None:
    """above: keys of the table that this one is an entry of a list in."""
    hints = typing.get_type_hints(config)
    if not prefix:
        for name in ("model", "task"):  # without a known kind nothing can be said of the keys
            hints[name] = _kinds(name).get(table.get(name, {}).get("kind"), object)
    for key, value in table.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            elsewhere = [n for n, t in typing.get_type_hints(Recipe).items() if key in _fields(t)]
            hint = f'did you mean "{prefix}{near[0]}"?' if near else ""
            if key in above:
                hint = f'it is one of the whole table: "{prefix.rpartition(".")[0].rpartition(".")[0]}.{key}"'
            elif not hint and elsewhere:
                hint = f'did you mean "{elsewhere[0]}.{key}"?'
            raise RefusedError(f'{where}: unknown key "{prefix}{key}"; {hint or "known: " + ", ".join(sorted(hints))}')
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            _refuse_unknown(value, hints[key], f"{prefix}{key}.", where)
        entry = next(iter(typing.get_args(hints[key])), None)
        if dataclasses.is_dataclass(entry) and isinstance(value, list):
            for inner in value:
                if isinstance(inner, dict):
                    _refuse_unknown(inner, entry, f"{prefix}{key}.", where, hints)


def _fields(config: Any) -> set[str]:
    return {f.name for f in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()


def _steps_per_epoch(recipe: Recipe) -> int:
    run_order = order(recipe)
    if recipe.run.global_batch > run_order.samples:
        raise RefusedError(
            f"run.global_batch = {recipe.run.global_batch} is more than the "
            f"{counted(run_order.samples, 'training image')}"
        )
    return run_order.steps_per_epoch


def resolve(recipe: Recipe, ranks: int) -> tuple[Recipe, Plan]:
    """The recipe with everything derived filled in, and the plan for `ranks` ranks; refuses what cannot be."""
    recipe = replace(recipe, data=splits.resolved(recipe.data))
    if recipe.data.is_placed:
        splits.check_splits(recipe.data)
    facts = splits.facts(recipe.data)
    if recipe.data.name == "digits" and (keys := recipe.augment.needs_files):
        raise RefusedError(f"augment.{keys[0]} needs image files; the digits are in memory: use augment.shift")
    model = _model(recipe.model, facts)
    _check_task(recipe.task, model)
    _check_families(recipe.run, model)
    _check_exchange(recipe.grid, model)
    replicas = grid.replicas(ranks, recipe.grid.submodule_ranks, model.submodules, recipe.grid.absent)
    _check_survival(recipe.run, model)
    micro, accumulation = _batches(recipe.run, replicas)
    splits.check_share(recipe.data, facts, recipe.grid.submodule_ranks, micro)
    splits.check_on_device(recipe.data, recipe.augment)
    _check_blocks(recipe, micro)
    _check_stream(recipe)
    if isinstance(model, hsvit.Config):
        features.check(model.backbone.cache, model.backbone.trained_stages, recipe.engine.zero_stage, recipe.augment)
    steps = _steps_per_epoch(recipe)
    automatic = "bf16" if torch.cuda.is_available() else "fp32"
    precision = automatic if recipe.engine.precision == "auto" else recipe.engine.precision
    with torch.device("meta"):
        shape = model.build(image_size=facts.image_size, channels=facts.channels, classes=facts.classes)
    # The ranks of a replica split its images where a backbone is, so a batch statistic spans them.
    parts = recipe.grid.submodule_ranks if model.splits_images else 1
    if micro % parts:
        raise RefusedError(
            f"a backbone's images are divided among the ranks of a replica, but grid.submodule_ranks = {parts} does "
            f"not divide the micro batch of {micro}"
        )
    trained_norms = any(isinstance(m, BatchNorm) and m.weight.requires_grad for m in shape.modules())
    runs, synced = _bn_runs(recipe.run, replicas, parts, micro, accumulation) if trained_norms else (1, False)
    recipe = replace(
        recipe,
        model=model,
        run=replace(recipe.run, micro_batch=micro, bn_batch=recipe.run.bn_batch or recipe.run.global_batch),
        engine=replace(recipe.engine, precision=precision),
    )
    # Contradicting expert keys are refused before anything starts.
    engine.deepspeed_config(recipe.engine, recipe.optimizer.clip, precision == "bf16", micro, trained=1)
    return recipe, Plan(
        ranks=ranks,
        replicas=replicas,
        micro_batch=micro,
        accumulation=accumulation,
        steps_per_epoch=steps,
        steps=steps * recipe.run.epochs,
        bn_runs=runs,
        bn_synced=synced,
        bf16=precision == "bf16",
        parameters=sum(p.numel() for p in shape.parameters()),
        macs=model.macs(facts.image_size, facts.channels, facts.classes),
        teacher_bytes=_teacher_bytes(recipe.task, facts, 2 if precision == "bf16" else 4),
    )


def _model(config: models.Config, facts: Facts) -> models.Config:
    try:
        model = config.resolved(facts.image_size)
    except ValueError as error:
        raise RefusedError(f"{'' if str(error).startswith('model.') else '[model] '}{error}") from error
    if getattr(model, "resize", False) and not model.weights:
        raise RefusedError("model.resize = true: there are no weights to resize; set model.weights too")
    return model


def _check_exchange(config: grid.Config, model: models.Config) -> None:
    if config.exchange != "fp32" and model.submodules == 1:
        raise RefusedError(
            f'grid.exchange = "{config.exchange}": model.submodules = 1 has nothing to exchange; leave it "fp32"'
        )


def _check_survival(run: Run, model: models.Config) -> None:
    if run.survive == "degraded" and model.submodules == 1:
        raise RefusedError('run.survive = "degraded": there are no submodules to go on without; set "restart"')


def _check_task(task: supervised.Config | scala.Config, model: models.Config) -> None:
    """Refuse a task that the model does not fit."""
    distilled = getattr(model, "distilled", False)
    if isinstance(task, scala.Config):
        try:
            task.check(model.widths, distilled)
        except ValueError as error:
            raise RefusedError(f"[task] {error}") from error
        if distilled and not task.teacher.name:
            raise RefusedError("model.distilled = true needs a teacher: set task.teacher.name")
    elif distilled or len(model.widths.all) > 1:
        key = "distilled = true" if distilled else model.widths.said
        raise RefusedError(f'model.{key} needs task.kind = "scala"; task.kind = "supervised" trains one output')


def _check_families(run: Run, model: models.Config) -> None:
    for change in model.widths.then:
        if change.epoch >= run.epochs:
            raise RefusedError(
                f"model.widths.then: epoch = {change.epoch} is outside the run: must be below run.epochs = {run.epochs}"
            )


def _check_stream(recipe: Recipe) -> None:
    """Refuse what needs to know which sample is where in a global batch."""
    if not recipe.data.stream:
        return
    if recipe.augment.repeats > 1:
        raise RefusedError(
            f"augment.repeats = {recipe.augment.repeats}: not for a stream ({recipe.data.stream}); set 1"
        )
    if isinstance(recipe.model, hsvit.Config) and recipe.model.backbone.cache:
        raise RefusedError("model.backbone.cache: a stream's images have no numbers; leave it empty")
    if isinstance(recipe.task, scala.Config) and recipe.task.teacher.cache:
        raise RefusedError("task.teacher.cache: a stream's images depend on ranks and workers; leave it empty")


def _teacher_bytes(task: supervised.Config | scala.Config, facts: Facts, each: int) -> int:
    if not isinstance(task, scala.Config) or not task.teacher.name:
        return 0
    with torch.device("meta"):
        module = teacher.load(task.teacher, facts)
    return each * sum(int(tensor.numel()) for tensor in module.state_dict().values())


def _batches(run: Run, replicas: int) -> tuple[int, int]:
    """(micro batch, accumulation)."""
    if run.global_batch % replicas:
        raise RefusedError(f"run.global_batch = {run.global_batch} is not divisible by {counted(replicas, 'replica')}")
    share = run.global_batch // replicas
    micro = run.micro_batch or share
    if share % micro:
        raise RefusedError(
            f"run.micro_batch = {micro} does not divide a replica's part of the global batch, "
            f"{run.global_batch} / {counted(replicas, 'replica')} = {share}"
        )
    return micro, share // micro


def _check_blocks(recipe: Recipe, micro: int) -> None:
    block = recipe.augment.mix_block
    if recipe.augment.mixes and micro % block:
        raise RefusedError(f"augment.mix_block = {block} does not divide the micro batch of {micro}")


def _bn_runs(run: Run, replicas: int, splits: int, micro: int, accumulation: int) -> tuple[int, bool]:
    """(runs in a rank's part of a micro batch, whether one run spans all ranks). splits: ranks that divide it."""
    replicas, micro = replicas * splits, micro // splits
    batch = run.bn_batch or run.global_batch
    if batch > micro:
        if batch != micro * replicas:
            raise RefusedError(
                f"run.bn_batch = {run.bn_batch}: BatchNorm over {counted(batch, 'image')} needs them in one forward, "
                f"but a forward has {micro} on each of {replicas} {'ranks' if splits > 1 else 'replicas'} and "
                f"{accumulation} are accumulated; "
                f"set run.bn_batch to {micro * replicas}, or to a divisor of {micro}"
            )
        return 1, True
    if micro % batch:
        raise RefusedError(f"run.bn_batch = {batch} does not divide the micro batch of {micro}")
    return micro // batch, False
