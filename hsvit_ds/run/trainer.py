"""The loop, on one screen: set up, train epochs, evaluate, checkpoint, report."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..data.bad import BadSamples
from ..data.batch import Batch
from ..data.reader import Reader
from ..data.splits import class_names
from ..data.splits import facts as facts_of
from ..engine import initial
from ..engine.captured import compiled
from ..engine.checkpoint import Checkpoints, Position
from ..engine.ema import EMA
from ..engine.engine import BatchStatistics, Engine
from ..engine.optimizer import Schedule
from ..engine.outcomes import NonFiniteError, StepResult
from ..errors import Exit, RefusedError, counted
from ..grid.grid import Grid
from ..models import Model
from ..spans import Part, each, span, spanned
from . import about, closing, commands, kernels, opening, task, title
from . import recipe as recipes
from .about import UNKNOWN, Asked
from .evaluation import Answers, evaluate
from .interval import Interval
from .memory import used_up
from .profiling import Profile, TracedError
from .recipe import Plan, Recipe
from .report import Reporter, print_widths
from .summary import FAILED, FINISHED, STOPPED
from .survival import StoppedError, StopRequests, Watch, is_out_of_memory, told
from .tracking import CLASSES, Tracker, Untracked

SHOWN_BAD = 10
"""Unreadable images that are printed at a time."""
PATIENCE = 30
"""Seconds that a rank of several, asked to stop, still waits for images."""
STEPS_BACK = 3
"""Times that a run may go back to one checkpoint (run.step_back)."""


class Trainer:
    """One run on this rank.

    Args:
        recipe, plan: resolved. folder: of the run. resume: continue its latest checkpoint. asked: what it was started
        from.
    """

    def __init__(
        self, recipe: Recipe, plan: Plan, grid: Grid, folder: Path, resume: bool, asked: Asked = UNKNOWN
    ) -> None:
        self.recipe, self.plan, self.grid, self.folder, self.asked = recipe, plan, grid, folder, asked
        facts = facts_of(recipe.data)
        before = folder / "checkpoints" if resume else None
        model, self.weights_said = initial.build(
            recipe.model, facts, grid, exchange=recipe.grid.exchange, seed=recipe.run.seed, resumed=before
        )
        self.engine = Engine(
            model,
            recipe.engine,
            recipe.optimizer,
            grid,
            micro_batch=plan.micro_batch,
            accumulation=plan.accumulation,
            batch_statistics=BatchStatistics(plan.bn_runs, plan.bn_synced),
            bf16=plan.bf16,
        )
        self.schedule = Schedule(recipe.optimizer, recipe.run.epochs, plan.steps_per_epoch)
        self.task = task.build(recipe, plan, self.engine, facts)
        self.reader = Reader(recipe.data, recipe.augment, recipes.order(recipe), plan.share(recipe, grid.replica), grid)
        self.bad = BadSamples(folder, self.reader, recipe.data.max_bad_fraction)
        self.ema = None
        if recipe.ema.decay:
            self.ema = EMA(recipe.ema.decay, self.engine.shards, self.engine.module)
        self.tracker: Tracker | Untracked = Untracked()
        self.checkpoints = Checkpoints(
            recipe.checkpoint,
            folder / "checkpoints",
            self.engine,
            self.ema,
            recipes.to_table(recipe),
            lambda: self.tracker.run_id(),
            names := class_names(recipe.data),
            lambda position: self.tracker.covered(position),
        )
        restored = self.checkpoints.load() if resume else None
        self.at = self.start = restored or Position(0, 0, 0, logged=0)
        """Where the run stands, and where this process found it."""
        self.saved = restored
        self.stops, self.watch = StopRequests(grid), Watch(folder, grid, recipe.run.watchdog, self.start.total)
        if grid.is_main and names:
            (folder / CLASSES).write_text("\n".join(names) + "\n", "utf-8")
        self.report = Reporter(grid.is_main, plan.steps, self.start.total, self.watch.state)
        self.interval = Interval(grid.device)
        self.profile = Profile(recipe.tracking.profile, folder, grid)
        self.reader.idle = self._waits
        self._steps_back = 0
        self._evaluated: tuple[str, int, dict[str, float]] = ("", 0, {})

    def fit(self) -> Exit:
        """Train to the end, or until the run is asked to stop."""
        began = time.perf_counter()
        where = self.folder, self.start, self.weights_said, self.checkpoints.dropout_mask
        for line in opening.lines(self.recipe, self.plan, self.grid, self.engine, self.reader, *where):
            self.report.say(line)
        with self.stops.heard(), self.watch.kept(), self._recorded() as self.tracker:
            try:
                final = self._train()
                self._finish(final, time.perf_counter() - began)
                ended = Exit.FINISHED
            except StoppedError:
                self._stop()
                ended = Exit.STOPPED
            except TracedError:
                self._end_traced()
                ended = Exit.FINISHED
            except BaseException as error:
                self.report.close()
                if is_out_of_memory(error):
                    error = RefusedError(used_up(self.recipe, self.plan, self.watch.now, told(error)))
                self.tracker.close(FAILED, told(error), seconds=10)
                raise error
            finally:
                self.profile.close()
                self.reader.close()
        return ended

    def _recorded(self) -> AbstractContextManager[Tracker | Untracked]:
        model: Model = self.engine.module  # type: ignore[assignment]
        widths = self.task.trained(self.plan.steps)
        where = self.recipe, self.plan, self.grid, self.reader, model, widths
        summary = about.begin(self.asked, title.of(self.folder), *where)
        return about.recorded(summary, self.folder, self.recipe, self.grid, self.start)

    def _train(self) -> dict[str, float]:
        """From where the run stands to its end; the metrics of the test split."""
        self._choose_kernels()
        self.watch.doing("starting the data workers" if self.reader.working else "starting")
        if self.recipe.run.survive == "degraded" and self.saved is None:
            self._save()  # submodules that are lost before the first checkpoint come from this one
        while True:
            try:
                for epoch in range(self.at.epoch, self.recipe.run.epochs):
                    self._train_epoch(epoch, self.at.step)
                    self._end_epoch(epoch)
                break
            except NonFiniteError as error:
                self._step_back(error)
        final = self._evaluate(self.recipe.data.test, self.plan.steps)
        failure = self.checkpoints.wait()
        if failure is not None:
            raise RefusedError(f"the last checkpoint could not be saved: {failure}")
        return final

    def _choose_kernels(self) -> None:
        """Let every rank use the same kernels: those that are right and faster here."""
        if not kernels.is_open(self.grid.device):
            return
        self.watch.doing("trying kernels")
        teacher = getattr(getattr(self.task, "teach", None), "module", None)
        if wanted := kernels.cases(self.recipe, self.plan, self.task.possible, teacher):
            decision = kernels.decide(self.grid, wanted, self.folder / kernels.FILE)
            self.report.table(
                ("kernels of this run", "computed by", "kernel, ms", "PyTorch, ms"), kernels.rows(decision)
            )
            for note in decision.notes:
                self.report.say(note)

    def _train_epoch(self, epoch: int, first_step: int) -> None:
        steps, every = self.plan.steps_per_epoch, self.recipe.checkpoint.every_steps
        self.interval.waits()
        for step, batches in enumerate(each(Part.IMAGES, self.reader.train(epoch, first_step)), first_step):
            self.interval.works()
            total = epoch * steps + step + 1
            self.watch.doing(f"step {total}: forward and backward passes, reduction, update", total - 1)
            result = self._step(batches, total - 1)
            if self.ema is not None:
                with span(Part.AVERAGE):
                    self.ema.update(result.applied)
            self.interval.ended()
            self.at = replace(self.at, epoch=epoch, step=step + 1, total=total)
            logs = total % self.recipe.run.log_every == 0 or total == self.plan.steps
            saves = every and total % every == 0 and step + 1 < steps
            if logs or saves or step + 1 == steps:
                self._settle()
            self.interval.rests()
            if logs:
                self._log(total)
            if saves:
                self._save()
            with span(Part.WAITING):
                self.stops.check()
            if self.profile.steps:
                self.profile.ended(total, self._flops)
            self.watch.doing(f"step {total + 1}: waiting for images", total)
            self.interval.waits()

    def _waits(self) -> None:
        """While images do not come: a request to stop is heard all the same."""
        if not self.stops.asked:
            return
        if self.plan.ranks == 1:
            raise StoppedError
        if time.monotonic() - self.watch.since > PATIENCE:  # the others may be in a step, so none can save
            self.report.say("stopped as asked while waiting for images; --resume goes on from the last checkpoint")
            self.report.close()
            self.tracker.close(STOPPED, "asked to, while it waited for images")
            os._exit(Exit.STOPPED)

    @spanned(Part.LOG)
    def _settle(self) -> None:
        """Wait for the steps so far, and learn which of them were skipped. Only here does the host wait for the device.

        Raises:
            NonFiniteError: too many in a row.
        """
        for settled in self.engine.outcomes.settle():
            self.interval.settled.append(settled)
            if not settled.applied:
                loss = sum(settled.losses)
                self.report.say(
                    f"warning: step {settled.step + 1} was skipped: its gradient is not finite (loss {loss:g})"
                )

    def _end_epoch(self, epoch: int) -> None:
        """Evaluate and save; a run that is stopped in here comes back to its beginning."""
        done, top1 = epoch + 1, None
        if done == self.recipe.run.epochs or done % self.recipe.run.eval_every == 0:
            val = self.recipe.data.val
            top1 = self._evaluate(val, done * self.plan.steps_per_epoch)[f"{val}/top1"]
            self.report.evaluated(val, top1)
        self.at = replace(self.at, epoch=done, step=0)
        self._save(top1)

    def _step_back(self, error: NonFiniteError) -> None:
        """Go on from the last checkpoint with a lower learning rate, or give up."""
        factor = self.recipe.run.step_back
        self._warn_of(self.checkpoints.wait())
        found = self.checkpoints.load() if factor else None
        if found is None:
            raise error
        self._steps_back += 1
        if self._steps_back > STEPS_BACK:
            raise RefusedError(
                f"{error}; going back {counted(STEPS_BACK, 'time')} to step {found.total} did not help"
            ) from error
        self.at = replace(found, lr_factor=found.lr_factor * factor**self._steps_back)
        self.engine.outcomes.forget()
        self.reader.close()
        self._evaluated = ("", 0, {})
        self.interval = Interval(self.grid.device)
        self.tracker.go_back(found)
        self.report.say(
            f"warning: {error}; back to step {found.total}, the learning rate times {self.at.lr_factor:g} from there"
        )

    def _stop(self) -> None:
        """Save where the run stands, if that has not been done, and say so."""
        self.watch.doing("saving before a stop")
        with suppress(NonFiniteError):  # nothing of those steps was applied
            self._settle()
        if self.at != self.saved:
            self._save()
        self._warn_of(self.checkpoints.wait())
        self.report.say(f"stopped as asked after step {self.at.total}; --resume continues")
        self.report.close()
        self.tracker.close(STOPPED, "asked to")

    def _end_traced(self) -> None:
        """The steps of a profile are over; what was trained in them is not kept."""
        self._warn_of(self.checkpoints.wait())
        self.report.say(f"traced {counted(self.profile.steps, 'step')}, by step {self.at.total}")
        self.report.close()
        self.tracker.close(STOPPED, f"traced {counted(self.profile.steps, 'step')}")

    def _step(self, batches: list[Batch], step: int) -> StepResult:
        return self.engine.step(
            lambda: (self.task.losses(self.engine, batch) for batch in batches),
            self.task.passes(step),
            self._lr(step),
            step,
        )

    def _lr(self, step: int) -> float:
        return self.schedule.lr(step) * self.task.lr_factor(step) * self.at.lr_factor

    @spanned(Part.EVALUATION)
    def _evaluate(self, split: str, step: int) -> dict[str, float]:
        """The metrics of a split, under its name; once after a step."""
        if self._evaluated[:2] == (split, step):
            return self._evaluated[2]
        engine, widths = self.engine, self.task.trained(step)

        def next_batch() -> None:
            self.stops.check()
            self.watch.doing(f"evaluating {split} after step {step}")

        score = partial(evaluate, engine, engine.module, self.reader, split, widths, engine.runs_differ, next_batch)
        classes = self.reader.facts.classes
        self._counts = Answers.of(widths, classes, self.grid.device)
        found = {f"{split}/{k}": v for k, v in score(counts=self._counts).items()}
        if self.ema is not None:
            with self.ema.in_place():
                averaged = score()
            found |= {f"ema/{split}_{k}": v for k, v in averaged.items()}
        self._report_bad()
        self.tracker.log(found, step)
        scores = {name: value for name, value in found.items() if "top1" in name}
        line = "  ".join(f"{name} {value:.2f}" for name, value in scores.items() if "_w" not in name)
        slim = "  ".join(
            f"{name.partition('_w')[2]} {value:.2f}" for name, value in scores.items() if "/top1_w" in name
        )
        self.report.say(f"epoch {step // self.plan.steps_per_epoch}  {line}" + (f"  by width: {slim}" if slim else ""))
        self._evaluated = split, step, found
        return found

    @spanned(Part.CHECKPOINT)
    def _save(self, top1: float | None = None) -> None:
        self.watch.doing(f"saving after step {self.at.total}")
        self.at = replace(self.at, logged=self.tracker.size())
        self._warn_of(self.checkpoints.save(self.at, top1))
        self.saved, self._steps_back = self.at, 0

    def _warn_of(self, failure: str | None) -> None:
        if failure is not None:
            self.report.say(f"warning: a checkpoint could not be saved, the run goes on: {failure}")

    @spanned(Part.LOG)
    def _log(self, step: int) -> None:
        """Bring an interval's metrics from the device, once, and hand them to the tracker."""
        done, self.interval = self.interval, Interval(self.grid.device)
        mean = torch.tensor(done.losses(), device=self.grid.device)
        losses = (self.grid.sum_over_replicas(mean) / self.plan.replicas).tolist()
        flops = sum(self._flops(s) for s in range(step - done.steps, step))
        metrics = {
            "train/loss": losses[0],
            "train/grad_norm": done.settled[-1].grad_norm,
            "train/lr": self._lr(step - 1),
            "train/skipped_steps": float(self.engine.outcomes.skipped),
            **done.speed(self.recipe.run.global_batch),
            **done.mfu(flops // self.plan.ranks),
            **self.engine.traffic(done.steps),
            "data/bad_samples": float(self._report_bad()),
        }
        if len(losses) > 1:
            metrics |= {f"train/loss_pass{place}": loss for place, loss in enumerate(losses, 1)}
            metrics["train/loss_sum"] = sum(losses)
        if (submodules := self.recipe.model.submodules) > 1:
            metrics["train/submodules_present"] = float(submodules - len(self.grid.absent))
        self.tracker.log(metrics, step)
        self.report.step(step, metrics)
        if self.recipe.engine.compile and step - done.steps == self.start.total:
            self.report.say(compiled())

    def _report_bad(self) -> int:
        """Images that any rank could not read so far; the new ones are named. Collective."""
        new = self.bad.update()
        for name in new[:SHOWN_BAD]:
            self.report.say(f"warning: not readable: {name}")
        if len(new) > SHOWN_BAD:
            self.report.say(f"warning: … and {len(new) - SHOWN_BAD} more, see {self.bad.path}")
        return len(self.bad.names)

    def _flops(self, step: int) -> int:
        """Of all passes of a step over the global batch, forward and backward."""
        facts, model = self.reader.facts, self.recipe.model
        shape = (facts.image_size, facts.channels, facts.classes)
        return 3 * 2 * self.recipe.run.global_batch * sum(model.macs(*shape, w) for w in self.task.widths(step))

    def _finish(self, final: dict[str, float], seconds: float) -> None:
        self.report.close()
        if not self.grid.is_main:
            return
        model: Model = self.engine.module  # type: ignore[assignment]
        widths, seen = self.task.trained(self.plan.steps), (final, self._counts)
        files, widths_rows = closing.draw(self.folder, self.recipe, self.plan, self.reader, model, widths, *seen)
        self.tracker.artifacts(files)
        self.tracker.close(FINISHED)
        if widths_rows:
            print_widths(widths_rows, self.recipe.data.test)
        rows = closing.result(self.folder, self.recipe, self.plan, final, seconds)
        self.report.summary(rows | {"MLflow run": self.tracker.run_id() or "-"})
        self.report.say("next:")
        for command in commands.after(self.folder, widths, self.tracker.ui()):
            self.report.say(command)
