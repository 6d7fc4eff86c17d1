"""Passwords and tokens: brought to every rank, but on no command line, in no log, in no file that others can read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from ..errors import LOGIN, RefusedError, masked
from .cluster import Host, on_all

VARIABLE = "HSVIT_SECRETS"
"""Names the file on every host that the ranks read."""
_NAME = re.compile(r"PASSWORD|TOKEN|SECRET|CREDENTIAL|KEY|^AWS_|^MLFLOW_TRACKING_USERNAME$", re.IGNORECASE)
_EXPORTED = ("NCCL", "PYTHON", "MLFLOW", "MV2", "UCX")  # DeepSpeed puts such variables on the ranks' command line


def check_overrides(overrides: Iterable[str]) -> None:
    """Refuse what would stand on the command line of every rank, and in DeepSpeed's log."""
    for override in overrides:
        if masked(override) != override:
            raise RefusedError(
                f"override {masked(override)}: every user of a host can read the command line of a rank; write it into "
                "the recipe, or for MLflow set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )


def in_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The secrets among this process's variables."""
    return {
        name: value
        for name, value in environment.items()
        if _NAME.search(name) or (name.startswith(_EXPORTED) and LOGIN.search(value))
    }


def in_lines(lines: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """(the secrets, the other lines) of a `.deepspeed_env`, without what is no NAME=VALUE and makes DeepSpeed crash."""
    found, others = {}, []
    for line in lines:
        name, sign, value = line.strip().partition("=")
        if _NAME.search(name) or LOGIN.search(value):
            found[name] = value
        elif sign and not name.startswith("#"):
            others.append(f"{name}={value}")
    return found, others


class Secrets:
    """Variables on their way to the ranks: in a file of one path on every host, for this user alone.

    Args:
        values: of the variables by name; none: no file.
    """

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = dict(values)
        self.folder = f"/tmp/hsvit-{os.urandom(16).hex()}"
        self.path = f"{self.folder}/secrets"
        self.left: list[Host] = []
        """Hosts where the file may be."""

    def put(self, hosts: list[Host]) -> None:
        """Write the file on hosts; one that does not answer will not start a rank either.

        Raises:
            RefusedError: it cannot be written there.
        """
        if not self.values:
            return
        self.left += [host for host in hosts if host not in self.left]
        # It may be there since the last attempt, or from a host with the same /tmp; what is not ours is not taken.
        ours = f"{{ test -O {self.folder} && test ! -L {self.folder}; }}"
        script = f"umask 077; {{ mkdir {self.folder} || {ours}; }} && cat > {self.path}"
        for name, answer in on_all(hosts, ["sh", "-c", script], json.dumps(self.values)).items():
            if answer.code not in (0, 255):
                raise RefusedError(f"{name}: {self.path} cannot be written ({answer.error.strip()}); make room in /tmp")

    def remove(self, free: Collection[str]) -> None:
        """From the hosts of these names."""
        there = [host for host in self.left if host.name in free]
        answers = on_all(there, ["rm", "-rf", self.folder]) if there else {}
        self.left = [host for host in self.left if host.name not in answers or answers[host.name].code]


def load() -> None:
    """Put what the launcher brought to this host into this rank's environment."""
    path = os.environ.pop(VARIABLE, "")
    if not path:
        return
    try:
        os.environ.update(json.loads(Path(path).read_text("utf-8")))
    except (OSError, ValueError) as error:
        raise RefusedError(f"{VARIABLE} = {path}: cannot be read ({error}); start again with `hsvit launch`") from error
