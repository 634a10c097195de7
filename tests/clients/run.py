"""Starts a server on the tiny chat model of the fixtures and lets every client talk to it.

    python run.py target/release/hearth
"""

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "fixtures" / "tiny-chat" / "model"
CLIENTS = ("openai_python.py", "langchain_chat.py", "load_generators.py", "harness.py")
KEY = "secret-of-the-checks"


# The model knows no tools; with this in front its template has a place for them, and says how calls are written.
TOOLS = "{%- if tools -%}{{- '<tool_call>' -}}{%- endif -%}\n"


def with_tools(folder: str) -> Path:
    """The fixture with a template that takes tools."""
    model = Path(shutil.copytree(MODEL, Path(folder) / "tiny-chat"))
    template = model / "chat_template.jinja"
    template.write_text(TOOLS + template.read_text())
    return model


@contextlib.contextmanager
def serving(binary: str, model: Path) -> Iterator[str]:
    """The address of a server."""
    words = [binary, "serve", str(model), "--host", "127.0.0.1", "--port", "0", "--api-key", KEY]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            ready = "listening on "
            line = next((line for line in server.stdout if line.startswith(ready)), None)
            if line is None:
                sys.exit(f"`{' '.join(words)}` ended with {server.wait()} before it listened")
            yield line[len(ready) :].strip()
            if server.poll() is not None:
                sys.exit(f"the server ended with {server.returncode} while clients talked to it")
        finally:
            server.terminate()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, serving(sys.argv[1], with_tools(folder)) as url:
        for script in CLIENTS:
            start = time.monotonic()
            print(f"── {script}", flush=True)
            if subprocess.run([sys.executable, HERE / script, url, KEY], check=False).returncode != 0:
                sys.exit(f"{script} found something that does not hold")
            print(f"   {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
