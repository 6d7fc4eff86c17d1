"""Images that cannot be read: counted over all ranks, named in a file, and too many of them refused."""

from __future__ import annotations

from pathlib import Path

from ..errors import RefusedError, counted, warn
from .reader import Reader

FILE = "bad_samples.txt"


class BadSamples:
    """What the ranks of a run could not read so far, once each, also before it was resumed; on rank 0. Collective.

    Args:
        folder: of the run. most: share of the training images from which on the run is refused.
    """

    def __init__(self, folder: Path, reader: Reader, most: float) -> None:
        self.path, self.reader, self.most = folder / FILE, reader, most
        self.names: set[str] = set()
        reader.grid.agree(self._begin)

    def _begin(self) -> None:
        self.names = set(self.path.read_text("utf-8").splitlines()) if self.path.exists() else set()
        self._add([name for name in self.reader.left_out if name not in self.names])

    def update(self) -> list[str]:
        """What has been found since the last call, sorted; on rank 0.

        Raises:
            RefusedError: there are too many.
        """
        grid, mine = self.reader.grid, self.reader.new_bad()
        if not grid.any_rank(bool(mine))():
            return []
        found = {name for names in grid.gather_on_main(mine) for name in names}
        new = sorted(found - self.names)
        grid.agree(lambda: self._add(new))
        return new

    def _add(self, new: list[str]) -> None:
        """On rank 0."""
        self.names.update(new)
        if new:
            try:
                with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.writelines(f"{name}\n" for name in new)
            except OSError as error:  # on one rank, of a disk that is full: no reason to end the run
                warn(f"{self.path}: {error.strerror}: {'; '.join(new)}")
        total = self.reader.order.samples + len(self.reader.left_out)
        if len(self.names) > self.most * total:
            some = "; ".join(sorted(self.names)[:5])
            raise RefusedError(
                f"{len(self.names):,} of {counted(total, 'image')} cannot be read, more than "
                f"data.max_bad_fraction = {self.most}: {some}; all of them: {self.path}"
            )
