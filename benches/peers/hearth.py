"""Running the hearth binary and reading what it prints."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from turns import Missing, Sample, json_lines, run


@dataclasses.dataclass(frozen=True)
class Hearth:
    """The binary, and on how many threads it runs."""

    binary: pathlib.Path
    threads: int

    def call(self, *arguments: object) -> dict[str, Any]:
        """The JSON object that a command prints, its peak resident memory added where it does not say so itself."""
        environment = {"RAYON_NUM_THREADS": str(self.threads)}
        done = run([self.binary, *arguments, "--json"], environment)
        found = json_lines(done.stdout)[-1]
        found.setdefault("peak_rss_bytes", done.peak_rss_bytes)
        return found

    def bench(self, *arguments: object) -> Sample:
        """Tokens a second of one measured run of `hearth bench`."""
        found = self.call("bench", *arguments)
        return Sample(found["tok_s"], found["peak_rss_bytes"])

    def needs(self, command: Sequence[str], *options: str) -> None:
        """Says in one sentence which option this binary lacks."""
        for option in options:
            if not re.search(rf"{option}(?![\w-])", help_of(self.binary, tuple(command))):
                raise Missing(f"`hearth {' '.join(command)}` has no {option}")


@functools.cache
def help_of(binary: pathlib.Path, command: tuple[str, ...]) -> str:
    return run([binary, *command, "--help"]).stdout
