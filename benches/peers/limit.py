"""Running a program in less memory than it would like: a memory cgroup (v1 or v2) around one process."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from turns import Finished, Missing, run

ROOT = pathlib.Path("/sys/fs/cgroup")


@dataclasses.dataclass(frozen=True)
class Limit:
    """At most so many bytes, page cache included."""

    limit_bytes: int

    def run(self, command: Sequence[object]) -> Finished:
        """As `turns.run`, inside."""
        group, knob = self._group()
        try:
            (group / knob).write_text(str(self.limit_bytes))
            enter = 'echo $$ > "$1/cgroup.procs"; shift; exec "$@"'
            return run(["sh", "-c", enter, "sh", group, *command])
        finally:
            group.rmdir()

    def _group(self) -> tuple[pathlib.Path, str]:
        for root, knob in ((ROOT / "memory", "memory.limit_in_bytes"), (ROOT, "memory.max")):
            group = root / f"hearth-bench-{os.getpid()}"
            try:
                group.mkdir()
            except OSError:
                continue
            if (group / knob).exists():
                return group, knob
            group.rmdir()
        raise Missing("a memory cgroup cannot be made here: run as root where cgroups may be written")


def forget(path: pathlib.Path) -> None:
    """Takes a file, or a folder's files, out of the page cache: pages found there would not count."""
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
