"""What the first use found is remembered: by device and versions, beside other processes, on any disk."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from hsvit_kernels import configurations, dispatch, first_use, prepare
from hsvit_kernels import findings as files
from tests.kernels import test_first_use as first
from tests.kernels.test_first_use import ALL, INPUT, LAYER, ONE, WEIGHT, StandIn, layer, no_trials, spoil, verdict
from tests.ranks import ROOT

pytestmark = [pytest.mark.heavy, pytest.mark.usefixtures("nothing_is_known")]
nothing_is_known = first.nothing_is_known


def test_an_interrupted_trial_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        spoil(broken, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(ONE, machine=StandIn())
    assert verdict(StandIn()).wins


def test_a_lost_device_ends_the_run_and_the_next_one_leaves_the_case_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    class Lost(StandIn):
        def wait(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as broken:
        spoil(broken, fail)
        with pytest.raises(first_use.LostDeviceError, match=r"linear_forward .* killed the CUDA context \("):
            prepare(ALL, machine=Lost())
    found = prepare(ALL, machine=StandIn())
    assert found.verdicts[str(LAYER)].state == "died"
    assert found.notes == [f"{LAYER}: a process died while it tried this; it is left out"]
    assert found.verdicts[str(INPUT)].wins
    assert layer() == "reference"
    assert prepare(ALL, machine=StandIn()).verdicts == found.verdicts


SCRIPT = """
import os, sys
from tests.kernels import test_findings as t
case, kill = sys.argv[1:]
if kill == "kill":
    import pytest
    t.spoil(pytest.MonkeyPatch(), lambda *_: os._exit(9))
t.prepare({c: e for c, e in t.ALL.items() if case in str(c)}, machine=t.StandIn())
"""


def other_process(case: str, kill: str = "") -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(SCRIPT), case, kill], cwd=ROOT, env=environment)


def test_a_process_killed_while_trying_is_read_as_failed_at_the_next_start() -> None:
    assert other_process("linear_forward", "kill").wait() == 9
    assert verdict(StandIn()).state == "died"
    assert layer() == "reference"


def test_two_processes_write_the_file_at_once_and_nothing_is_lost() -> None:
    others = [other_process("linear_input"), other_process("linear_weight")]
    assert [other.wait() for other in others] == [0, 0]
    (path,) = Path(os.environ["HSVIT_KERNELS_CACHE"]).glob("*.json")
    assert set(json.loads(path.read_text())["verdicts"]) == {str(INPUT), str(WEIGHT)}


def test_who_waits_too_long_for_another_process_uses_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    with files.Memory(StandIn().about) as memory:
        assert memory.path is not None
        with memory.path.with_suffix(".lock").open("w") as second, pytest.raises(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        monkeypatch.setattr(files.Memory.__init__, "__defaults__", (0.1,))
        found = prepare(ONE, machine=StandIn())
    assert found.verdicts[str(LAYER)].state == "raised"
    (note,) = found.notes
    assert "another process has held" in note
    assert "HSVIT_KERNELS_CACHE" in note
    assert layer() == "reference"


def test_what_is_remembered_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(ALL, machine=StandIn())
    dispatch.verdicts.clear()
    configurations.chosen.clear()
    no_trials(monkeypatch)
    again = prepare(ALL, machine=StandIn())
    assert (again.verdicts, again.launches) == (first.verdicts, first.launches)
    assert layer() == "kernel"
    assert configurations.chosen["stand-in", ("linear_forward", (0,))] == first.launches["linear_forward 0"]


def test_another_driver_or_device_is_tried_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(ONE, machine=StandIn())
    no_trials(monkeypatch)
    for other in (StandIn(driver="2"), StandIn("another")):
        assert verdict(other).why == "AssertionError: tried again"


def test_known_findings_go_before_the_file_unless_they_are_of_another_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = first_use.attempt(ONE, StandIn(ms=2))
    assert first_use.attempt(ONE, StandIn(driver="2"), slow).verdicts[str(LAYER)].wins
    no_trials(monkeypatch)
    assert first_use.attempt(ONE, StandIn(), slow).verdicts == slow.verdicts


@pytest.mark.parametrize("where", ["a file", "nowhere", "read-only"])
def test_without_a_place_to_remember_kernels_are_tried_and_a_line_says_so(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "a file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("HSVIT_KERNELS_CACHE", str(tmp_path / "file/cache"))
    elif where == "read-only":
        monkeypatch.setenv("HSVIT_KERNELS_CACHE", "/proc/cache")  # also for root
    else:
        monkeypatch.delenv("HSVIT_KERNELS_CACHE")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    found = prepare(ONE, machine=StandIn())
    assert found.verdicts[str(LAYER)].wins
    (note,) = found.notes
    assert "HSVIT_KERNELS_CACHE" in note
    assert layer() == "kernel"


def test_a_full_disk_costs_the_memory_and_not_the_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    found = prepare(ALL, machine=StandIn())
    assert all(v.wins for v in found.verdicts.values())
    (note,) = found.notes
    assert "No space left on device" in note


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"about": {}, "launches": {}, "verdicts": {"x": 1}}',
        '{"verdicts": {"x": {"state": "odd"}}}',
    ],
)
def test_a_corrupt_file_is_replaced_and_a_line_says_so(text: str) -> None:
    prepare(ONE, machine=StandIn())
    (path,) = Path(os.environ["HSVIT_KERNELS_CACHE"]).glob("*.json")
    whole = path.read_text()
    path.write_text(text)
    found = prepare(ONE, machine=StandIn())
    assert found.verdicts[str(LAYER)].wins
    (note,) = found.notes
    assert note.startswith(f"{path} cannot be read (")
    assert path.read_text() == whole
