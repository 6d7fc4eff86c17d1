"""What a network of one's own is to be."""

from __future__ import annotations

from enum import StrEnum


class Goal(StrEnum):
    small = "small"
    accurate = "accurate"
    elastic = "elastic"
