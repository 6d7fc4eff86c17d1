"""A run has a folder of its own, whatever it is called and whatever starts beside it."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch

from hsvit_ds.errors import RefusedError
from hsvit_ds.hosts import schedulers
from hsvit_ds.hosts.cluster import Host
from hsvit_ds.models.slimmable import Width
from hsvit_ds.run import folders, metrics, pictures, report
from hsvit_ds.run import recipe as recipes
from hsvit_ds.run.evaluation import Answers
from hsvit_ds.run.recipe import Run

from ..ranks import ROOT

STARTS = 8
NAMES = ["plain", "lr[0-9]", "a[b]", "*", "a?c", "[red]", ":car:", "a+b(c)", "a/b", "$\\frac$ $x_1$"]


def test_starts_at_one_moment_get_a_folder_each(tmp_path: Path) -> None:
    for trial in range(10):
        barrier, run = Barrier(STARTS), Run(name="same", root=str(tmp_path / str(trial)))

        def start(number: int, barrier: Barrier = barrier, run: Run = run) -> Path:
            barrier.wait()
            return folders.open_folder(run, None, False, f"# {number}\n")

        with ThreadPoolExecutor(STARTS) as pool:
            found = list(pool.map(start, range(STARTS)))
        assert sorted(path.name for path in found) == [f"same-{n:03d}" for n in range(1, STARTS + 1)]
        assert [(path / "recipe.toml").read_text() for path in found] == [f"# {n}\n" for n in range(STARTS)]


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_counted_up_and_found_again(name: str, tmp_path: Path) -> None:
    run = Run(name=name, root=str(tmp_path))
    assert folders.newest(run) is None
    for number in (1, 2, 3):
        assert folders.claim(run) == tmp_path / f"{name}-{number:03d}"
    assert folders.newest(run) == tmp_path / f"{name}-003"


def test_a_thousandth_run_and_those_after_it_have_folders_of_their_own(tmp_path: Path) -> None:
    run = Run(name="many", root=str(tmp_path))
    (tmp_path / "many-999").mkdir()
    assert [folders.claim(run).name for _ in range(3)] == ["many-1000", "many-1001", "many-1002"]
    newest = folders.newest(run)
    assert newest is not None
    assert newest.name == "many-1002"


def test_what_is_no_run_of_the_name_is_left_alone(tmp_path: Path) -> None:
    for other in ("run-001-old", "run-01", "run-x", "my-run-007", "run-0042"):
        (tmp_path / other).mkdir()
    (tmp_path / "run-001").write_text("a file")
    run = Run(name="run", root=str(tmp_path))
    assert folders.newest(run) is None
    assert folders.claim(run).name == "run-002"


def test_a_root_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    for root in ("runs", "file"):
        with pytest.raises(RefusedError, match=re.escape(f"{tmp_path / root}") + r".*; set run\.root"):
            folders.claim(Run(name="run", root=str(tmp_path / root)))


def test_no_start_counts_up_to_the_folder_of_a_slurm_job(tmp_path: Path) -> None:
    recipe = recipes.read(ROOT / "recipes/digits/hsvit.toml", [f"run.root={tmp_path}", "run.name=x"])
    script = schedulers.slurm([Host("node", 1)], recipe, Path("x.toml"), [], resume=False)
    match = re.search(r'--run (\S+)"\$SLURM_JOB_ID"', script)
    assert match is not None
    (tmp_path / "x-999").mkdir()
    assert folders.claim(recipe.run) != Path(f"{match[1]}1000")


@pytest.mark.parametrize("name", NAMES)
def test_names_are_printed_and_drawn_as_they_are(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    voice = report.Reporter(True, 1, 0)
    voice.say(f"say {name}")
    voice.table(("a", "b"), [(f"row {name}", "1")])
    voice.summary({"run": f"sum {name}"})
    report.print_memory({"all": 1}, f"title {name}")
    out = capsys.readouterr().out
    for start in ("say", "row", "sum", "title"):
        assert f"{start} {name}" in out
    rows = [report.WidthRow(Width(4, 4), 1, 1, 50.0, trained=True)]
    pictures.draw_widths(tmp_path / "widths.png", rows, name, "top-1")
    pictures.draw_present(tmp_path / "present.png", [report.PresentRow(1, (50.0,))], name, "top-1")
    answers = Answers((Width(4, 4),), torch.eye(2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.int64))
    pictures.write_classes(tmp_path / "classes.png", answers, [name, "b"], name)
    lines = metrics.Lines(tmp_path)
    lines.log({"train/loss": 1.0}, 1, 0.0)
    lines.close()
    pictures.draw_curves(tmp_path, name, "val", 1, 1)
