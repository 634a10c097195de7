"""Writes a GGUF file in f32 or f16: a copy of another one, dequantized, or random weights in a wider shape.

    python write_gguf.py copy|widen f32|f16 SOURCE TARGET

The wider shape keeps SOURCE's vocabulary; each of its rows is a multiple of 256, which K-quants need.
"""

import sys
from collections.abc import Iterator

import gguf
import numpy as np

HIDDEN, INNER, BLOCKS, HEADS, KV_HEADS, HEAD_DIM = 1024, 3072, 12, 16, 4, 64
WIDER = {
    "general.name": "random weights",
    "llama.block_count": BLOCKS,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.rope.dimension_count": HEAD_DIM,
}
SET_BY_WRITER = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")

Named = Iterator[tuple[str, np.ndarray]]


def copied(reader: gguf.GGUFReader) -> Named:
    for tensor in reader.tensors:
        yield tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)


def widened(reader: gguf.GGUFReader) -> Named:
    random = np.random.default_rng(0)
    vocabulary = next(int(t.shape[1]) for t in reader.tensors if t.name == "token_embd.weight")
    kv = KV_HEADS * HEAD_DIM
    matrices = {
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (kv, HIDDEN),
        "attn_v": (kv, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }

    def matrix(shape: tuple[int, int]) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32) * 0.02

    yield "token_embd.weight", matrix((vocabulary, HIDDEN))
    yield "output_norm.weight", np.ones(HIDDEN, np.float32)
    for block in range(BLOCKS):
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{block}.{name}.weight", np.ones(HIDDEN, np.float32)
        for name, shape in matrices.items():
            yield f"blk.{block}.{name}.weight", matrix(shape)


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
    tensors, changed = (widened(reader), WIDER) if how == "widen" else (copied(reader), {})
    write(reader, target, tensors, changed, dtype == "f16")


if __name__ == "__main__":
    main()
