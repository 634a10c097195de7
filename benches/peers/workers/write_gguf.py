"""Writes a GGUF file in f32 or f16: a copy of another one, dequantized, or random weights in another shape.

    python write_gguf.py copy|wide|billion f32|f16 SOURCE TARGET

The other shapes keep SOURCE's vocabulary; each of their rows is a multiple of 256, which K-quants need.
"""

import dataclasses
import sys
from collections.abc import Iterator

import gguf
import numpy as np


@dataclasses.dataclass(frozen=True)
class Shape:
    hidden: int
    inner: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int = 64

    def metadata(self) -> dict[str, object]:
        return {
            "general.name": "random weights",
            "llama.block_count": self.blocks,
            "llama.embedding_length": self.hidden,
            "llama.feed_forward_length": self.inner,
            "llama.attention.head_count": self.heads,
            "llama.attention.head_count_kv": self.kv_heads,
            "llama.rope.dimension_count": self.head_dim,
        }


SHAPES = {"wide": Shape(1024, 3072, 12, 16, 4), "billion": Shape(2048, 5632, 22, 32, 4)}
SET_BY_WRITER = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")

Named = Iterator[tuple[str, np.ndarray]]


def copied(reader: gguf.GGUFReader) -> Named:
    for tensor in reader.tensors:
        yield tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)


def invented(reader: gguf.GGUFReader, shape: Shape) -> Named:
    random = np.random.default_rng(0)
    vocabulary = next(int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight")
    kv, hidden, inner = shape.kv_heads * shape.head_dim, shape.hidden, shape.inner
    matrices = {
        "attn_q": (hidden, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, hidden),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }

    def matrix(size: tuple[int, int]) -> np.ndarray:
        return random.standard_normal(size, dtype=np.float32) * 0.02

    yield "token_embd.weight", matrix((vocabulary, hidden))
    yield "output_norm.weight", np.ones(hidden, np.float32)
    for block in range(shape.blocks):
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{block}.{name}.weight", np.ones(hidden, np.float32)
        for name, size in matrices.items():
            yield f"blk.{block}.{name}.weight", matrix(size)


def write(reader: gguf.GGUFReader, target: str, tensors: Named, changed: dict[str, object], half: bool) -> None:
    writer = gguf.GGUFWriter(target, "llama")
    for key, field in reader.fields.items():
        if not key.startswith(SET_BY_WRITER):
            element = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, changed.get(key, field.contents()), field.types[0], element)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    for name, values in tensors:
        # Norms stay f32, as every GGUF file has them.
        writer.add_tensor(name, values.astype(np.float16) if half and values.ndim > 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    how, dtype, source, target = sys.argv[1:]
    reader = gguf.GGUFReader(source)
    if how == "copy":
        tensors, changed = copied(reader), {}
    else:
        tensors, changed = invented(reader, SHAPES[how]), SHAPES[how].metadata()
    write(reader, target, tensors, changed, dtype == "f16")


if __name__ == "__main__":
    main()
