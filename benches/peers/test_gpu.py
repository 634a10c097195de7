"""The part of gpu.py that needs neither torch nor a card: python -m unittest discover benches/peers"""

import unittest

import gpu


class Table(unittest.TestCase):
    def test_has_a_line_per_row_and_a_sentence_per_failure(self):
        rows = [("copy within the card", 4000.0, "GB/s"), ("decoding 8B in bf16", 123.456, "tokens/s")]
        text = gpu.render("torch 2", rows, ["training 1.1B: out of memory"], False)
        self.assertIn("| decoding 8B in bf16 | 123.5 tokens/s |", text)
        self.assertIn("| copy within the card | 4,000.0 GB/s |", text)
        self.assertIn("Left out: training 1.1B: out of memory.", text)
        self.assertNotIn("mean nothing", text)
        self.assertIn("mean nothing", gpu.render("torch 2", rows, [], True))

    def test_every_trained_model_has_a_shape(self):
        self.assertLessEqual(set(gpu.TRAINED), set(gpu.MODELS) | set(gpu.TINY))


if __name__ == "__main__":
    unittest.main()
