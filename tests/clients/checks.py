"""What every script here shares: where the server is, and how a claim is checked."""

import json
import sys
import urllib.request

URL, KEY = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "none"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def check(name: str, holds: object, shown: object = "") -> None:
    """Prints a claim; the first that does not hold ends the script."""
    print(f"{'ok  ' if holds else 'FAIL'} {name} {shown}", flush=True)
    if not holds:
        sys.exit(1)


def call(path: str, body: object = None) -> dict:
    """A plain JSON request, for what client libraries do not cover."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    with urllib.request.urlopen(urllib.request.Request(URL + path, data, headers)) as answer:
        return json.load(answer)
