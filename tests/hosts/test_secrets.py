"""Passwords and tokens reach the ranks, and nobody else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hsvit_ds.errors import Exit, RefusedError, masked
from hsvit_ds.hosts import secrets

from .launcher import FAILS, Runs


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(tmp_path, monkeypatch)


def test_secrets_are_seen_by_the_ranks_alone(runs: Runs, capfd: pytest.CaptureFixture[str]) -> None:
    hidden = {"MLFLOW_TRACKING_PASSWORD": "s3cr3t-1", "AWS_SECRET_ACCESS_KEY": "s3cr3t-2", "HF_TOKEN": "s3cr3t-3"}
    hidden["MLFLOW_TRACKING_URI"] = "http://me:s3cr3t-4@host"
    for name, value in hidden.items():
        runs.monkeypatch.setenv(name, value)
    (runs.folder / ".deepspeed_env").write_text("WANDB_API_KEY=s3cr3t-5\n\n# words\nOMP_NUM_THREADS=3\n")
    assert runs.launch([{**FAILS, "saved": 1}, {"code": 0}]) == Exit.FINISHED
    for number in range(2):
        started = runs.started(number)
        assert started["private"] == ["0o700"] * 2
        assert {path.split("/")[0] for path in started["secrets"]} == {"node-1", "node-2"}
        for mode, text in started["secrets"].values():
            assert mode == "0o600"
            assert hidden.items() <= json.loads(text).items()
            assert json.loads(text)["WANDB_API_KEY"] == "s3cr3t-5"
        path = started["variables"].partition("HSVIT_SECRETS=")[2].strip()
        assert path.startswith("/tmp/hsvit-")
        assert "OMP_NUM_THREADS=3\n" in started["variables"]
        for public in ("arguments", "environment", "variables", "hostfile"):
            assert "s3cr3t" not in json.dumps(started[public])
    written = [path for path in (runs.folder / "runs").rglob("*") if path.is_file()]
    assert not [path for path in [*written, runs.folder / "ssh.log"] if "s3cr3t" in path.read_text()]
    assert "s3cr3t" not in "".join(capfd.readouterr())
    assert not list(runs.folder.glob("node-*/hsvit-*"))


@pytest.mark.parametrize("returns", [True, False])
def test_secrets_on_a_lost_host_are_removed_when_it_is_back_or_else_named(
    returns: bool, runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    runs.monkeypatch.setenv("HF_TOKEN", "x")
    back = {"dead": []} if returns else {}
    runs.launch([{"code": 255, "dead": ["node-2"]}, {"code": 0, **back}], "--shrink")
    assert ("node-2 did not answer and may still have /tmp/hsvit-" in capfd.readouterr().out) is not returns
    assert bool(list(runs.folder.glob("node-*/hsvit-*"))) is not returns


def test_a_rank_reads_its_secrets_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "old")
    monkeypatch.setenv(secrets.VARIABLE, str(tmp_path / "secrets"))
    (tmp_path / "secrets").write_text(json.dumps({"HF_TOKEN": "new"}))
    secrets.load()
    assert os.environ["HF_TOKEN"] == "new"
    monkeypatch.setenv(secrets.VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(RefusedError, match="gone: cannot be read"):
        secrets.load()


def test_a_password_on_the_command_line_is_refused_and_not_repeated(
    runs: Runs, capfd: pytest.CaptureFixture[str]
) -> None:
    assert runs.launch([{"code": 0}], "tracking.uri=http://me:s3cr3t@host") == Exit.REFUSED
    assert "override tracking.uri=http://***@host: every user" in (err := capfd.readouterr().err)
    assert "s3cr3t" not in err
    assert masked("x --api_key=abc PASSWORD=a lr=1") == "x --api_key=*** PASSWORD=*** lr=1"
    assert masked("git@host:2 http://host:80/a@b") == "git@host:2 http://host:80/a@b"
