"""A small /dev/shm, as a container has it: refused before the first step, and at once when it is full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..ranks import ROOT, environment
from ..tars import data_set
from ..workers.common import SMALL

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a file system"),
]
UNCHECKED = "import sys; from hsvit_ds.data import loader; loader.check_shared_memory = lambda needed: None; "


@pytest.mark.parametrize("checked", [True, False])
def test_a_small_shared_memory_is_refused_with_what_to_set(checked: bool, tmp_path: Path) -> None:
    data = data_set(tmp_path / "set", train=64, val=8)
    keys = ["data.name=tiny", "data.classes=10", "data.image_size=128", f"data.root={data}", "data.test=val"]
    keys += ["data.workers=2", "run.global_batch=32", "run.epochs=1", "grid.submodule_ranks=1", f"run.root={tmp_path}"]
    keys += ["augment.mix_block=1", "augment.shift=0"]
    start = UNCHECKED + f"from hsvit_ds.train import main; main({['recipes/digits/hsvit.toml', *SMALL, *keys]!r})"
    program = ["-c", start] if not checked else ["-m", "hsvit_ds.train", "recipes/digits/hsvit.toml", *SMALL, *keys]
    mounted = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    done = subprocess.run(
        [*mounted, sys.executable, *program],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert "docker run --shm-size=8g" in done.stderr
    assert ("/dev/shm has 1 MiB free, but the batches that the data workers hold ready" in done.stderr) == checked
    assert "step 1/" not in done.stdout
