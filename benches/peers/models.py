"""Model files that both sides read: one source model, written out in the formats that are compared."""

import dataclasses
import pathlib

from hearth import Hearth
from installs import Installs, quietly

WORKERS = pathlib.Path(__file__).parent / "workers"

# Name in the table, source, what llama-quantize is told, every matrix in that very type. SmolLM2's rows of 576 are no
# multiple of 256, so its K-quants fall back to larger types; the wide shape (random weights) shows Q4_K itself.
QUANTIZED = {
    "Q8_0": ("smollm2", "Q8_0", True),
    "Q4_0": ("smollm2", "Q4_0", True),
    "Q4_K_M (576 wide: mostly Q5_0)": ("smollm2", "Q4_K_M", False),
    "Q4_K (wide shape)": ("wide", "Q4_K_S", True),
}
FORMATS = ("F16", *QUANTIZED)
# The shape of a model with 1.1 billion parameters, random weights: larger than the memory it is given.
BILLION = {"1.1B Q8_0": ("billion", "Q8_0", True)}
# The same and the source model as they are written, not quantized.
PLAIN = {"F16": ("smollm2", "f16"), "1.1B f32": ("billion", "f32")}


@dataclasses.dataclass(frozen=True)
class Models:
    """Files under the cache folder, each made when it is first asked for."""

    installs: Installs
    source: pathlib.Path | None = None

    def gguf(self, label: str) -> pathlib.Path:
        """A GGUF file in one of FORMATS, BILLION or PLAIN."""
        if label in PLAIN:
            return self._plain(*PLAIN[label])
        base, told, pure = {**QUANTIZED, **BILLION}[label]
        target = self._at(f"{base}-{told}{'-pure' if pure else ''}.gguf")
        if not target.is_file():
            words = [self.installs.llama("llama-quantize"), *(["--pure"] if pure else [])]
            part = target.with_suffix(".part")
            plain = self._plain(base, "f16" if base == "billion" else "f32")
            quietly([*words, plain, part, told], f"{target.name} cannot be made")
            part.rename(target)
        return target

    def bundle(self, label: str, hearth: Hearth) -> pathlib.Path:
        """A GGUF file's own values as a bundle."""
        source = self.gguf(label)
        target = self._at(f"{source.stem}-bundle")
        if not (target / "manifest.json").is_file():
            hearth.call("convert", source, "--to", "bundle", "--output", target)
        return target

    def huggingface(self, hearth: Hearth) -> pathlib.Path:
        """The source model as a Hugging Face directory in f32."""
        target = self._at("smollm2-hf")
        if not (target / "config.json").is_file():
            hearth.call("convert", self._plain("smollm2", "f32"), "--to", "safetensors", "--output", target)
        return target

    def offloadable(self, label: str, hearth: Hearth) -> pathlib.Path:
        """The model of 1.1 billion parameters as a Hugging Face directory: in f32, or in f16 where the model is quantized."""
        dtype = "f32" if label.endswith("f32") else "f16"
        target = self._at(f"billion-hf-{dtype}")
        if not (target / "config.json").is_file():
            hearth.call("convert", self._plain("billion", dtype), "--to", "safetensors", "--output", target)
        return target

    def dequantized(self, label: str, hearth: Hearth) -> pathlib.Path:
        """A quantized file's own values as plain f32, the reference of its perplexity."""
        source = self.gguf(label)
        target = self._at(f"{source.stem}-f32.gguf")
        if not target.is_file():
            self._write(target, "copy", "f32", source)
        return target

    def ctranslate2(self, hearth: Hearth) -> pathlib.Path:
        """The source model in CTranslate2's int8 form."""
        target = self._at("smollm2-ctranslate2-int8")
        if not (target / "model.bin").is_file():
            self.installs.need("torch", "transformers", "ctranslate2")
            convert = self.installs.python.parent / "ct2-transformers-converter"
            source = self.huggingface(hearth)
            words = [convert, "--model", source, "--quantization", "int8", "--output_dir", target]
            quietly(words, "the model cannot be converted for CTranslate2")
        return target

    def _plain(self, base: str, dtype: str) -> pathlib.Path:
        target = self._at(f"{base}-{dtype}.gguf")
        if not target.is_file():
            source = self.source or self.installs.source_model()
            self._write(target, "copy" if base == "smollm2" else base, dtype, source)
        return target

    def _write(self, target: pathlib.Path, how: str, dtype: str, source: pathlib.Path) -> None:
        self.installs.need("gguf")
        part = target.with_suffix(".part")
        words = [self.installs.python, WORKERS / "write_gguf.py", how, dtype, source, part]
        quietly(words, f"{target.name} cannot be written")
        part.rename(target)

    def _at(self, name: str) -> pathlib.Path:
        folder = self.installs.folder / "models"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name
