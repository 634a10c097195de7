"""Serving many clients: `hearth serve` against llama.cpp's server on the same Q8_0 file, loaded by `hearth bench serve`.

    python benches/peers/serving.py target/release/hearth [--load short] [--load long] [--rounds 5] [--json]

Each round starts one server after the other with 32 slots and puts 1, 8 and 32 clients on it in a closed loop: prompts of
about 128 tokens with answers of 64 (short), or of 1200 with 60, as FastGen's (long; some minutes a round). Lengths vary by
30 %, the same for both. Without --load it is both, with --quick short. FastGen's bound on the first token, 512 prompt tokens
a second, is an eighth of that in the long load: its 70B on four A100 reads prompts that much faster than this model on two
cores.
"""

import argparse
import contextlib
import dataclasses
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import llama
from asked import Asked, asked
from turns import Missing, Report, Row

SLOTS, LABEL = 32, "Q8_0"
CLIENTS = (1, 8, 32)
# Output tokens a second and the median time to the first token, against the peer's.
BARS = {1: (1.2, None), 8: (2.0, 0.5), 32: (2.0, 0.5)}


@dataclasses.dataclass(frozen=True)
class Load:
    """What clients ask for."""

    prompt: int
    output: int
    # How often each client comes around.
    turns: int
    least: int
    # Tokens of each slot: prompts of more than twice the mean do come.
    context: int
    # Prompt tokens a second by which the first token must come.
    sla_prompt: int

    def requests(self, clients: int, quick: bool) -> int:
        some = max(self.least, clients * self.turns)
        return some if self.turns == 1 or clients == 1 or not quick else some // 2


LOADS = {"short": Load(128, 64, 4, 8, 2048, 512), "long": Load(1200, 60, 1, 4, 4096, 64)}


def measure(asked: Asked, server: list[object], load: Load) -> dict[int, dict[str, Any]]:
    """Starts a server and loads it with every number of clients."""
    found = {}
    with running(server) as url:
        for clients in CLIENTS:
            sizes = ["--prompt-tokens", load.prompt, "--output-tokens", load.output]
            # A seed of its own: prompts of an earlier load would be found in either server's prompt cache.
            sizes += ["--clients", clients, "--requests", load.requests(clients, asked.quick), "--seed", clients]
            sizes += ["--sla-prompt", load.sla_prompt]
            found[clients] = asked.hearth.call("bench", "serve", url, *sizes, "--peak-gb-s", 1)
            if found[clients]["errors"]:
                raise Missing(f"{server[0]}: {found[clients]['errors']} errors, {found[clients]['first_error']}")
    return found


@contextlib.contextmanager
def running(server: list[object]) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(word) for word in [*server, "--port", port]]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        try:
            url = f"http://127.0.0.1:{port}"
            until_ready(url, child)
            yield url
        finally:
            child.kill()


def until_ready(url: str, child: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if child.poll() is not None:
            raise Missing(f"a server ended with {child.returncode} before it was ready")
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        time.sleep(0.1)
    raise Missing("a server was not ready within a minute")


def compare(asked: Asked, report: Report, load: Load) -> None:
    model, threads = asked.models.gguf(LABEL), asked.threads
    slots = ["-np", SLOTS, "-c", SLOTS * load.context, "--threads-http", 2]
    servers = {
        llama.NAME: [asked.installs.llama("llama-server"), "-m", model, "-t", threads, *slots],
        "hearth": [asked.hearth.binary, "serve", model, "--max-seqs", SLOTS, "--threads", threads],
    }
    rounds = [{name: measure(asked, words, load) for name, words in servers.items()} for _ in range(asked.rounds)]

    def samples(name: str, clients: int, *keys: str) -> list[float]:
        values = [round_[name][clients] for round_ in rounds]
        for key in keys:
            values = [value[key] for value in values]
        return values

    for clients in CLIENTS:
        work = f"serving {load.prompt} in / {load.output} out, {LABEL}, {clients} clients"
        speed, wait = BARS[clients]
        rows = [
            ("output", "tok/s", ("output_tok_s",), speed, True),
            ("TTFT p50", "ms", ("ttft_ms", "p50"), wait, False),
            ("TPOT p99", "ms", ("tpot_ms", "p99"), None, False),
            ("effective throughput", "req/s", ("effective_requests_s",), None, True),
        ]
        for what, unit, keys, bar, higher in rows:
            ours, theirs = samples("hearth", clients, *keys), samples(llama.NAME, clients, *keys)
            # A peer that meets no request's bounds has no effective throughput to divide by.
            if min(theirs) > 0:
                report.rows.append(Row(f"{work}, {what}", unit, llama.NAME, ours, theirs, bar, higher))
            else:
                report.notes.append(f"{work}, {what}: hearth {ours}, {llama.NAME} {theirs} {unit}")
    report.peers[llama.NAME] = llama.VERSION


def loads(parser: argparse.ArgumentParser) -> None:
    text = "what clients ask for, several times for several [both; with --quick short]"
    parser.add_argument("--load", choices=LOADS, action="append", help=text)


def main() -> None:
    options, report = asked(__doc__, loads), Report()
    for name in options.own.load or (["short"] if options.quick else LOADS):
        report.attempt(lambda load=LOADS[name]: compare(options, report, load))
    report.show(options.as_json)


if __name__ == "__main__":
    main()
