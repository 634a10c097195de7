"""python3 -m unittest discover benches/peers"""

import sys
import unittest

from turns import Missing, Report, Row, Sample, memory_row, rows_against, run, spread, take_turns


def taken(*values: float) -> list[Sample]:
    return [Sample(value, int(value) << 20) for value in values]


class Turns(unittest.TestCase):
    def test_sides_alternate_and_each_gives_every_sample(self) -> None:
        order: list[str] = []

        def side(name: str, value: float) -> Sample:
            order.append(name)
            return Sample(value)

        samples = take_turns({"peer": lambda: side("peer", 1.0), "hearth": lambda: side("hearth", 2.0)}, 2)
        self.assertEqual(order, ["peer", "hearth", "peer", "hearth"])
        self.assertEqual([sample.value for sample in samples["hearth"]], [2.0, 2.0])

    def test_the_ratio_is_of_medians_and_the_spread_of_quartiles(self) -> None:
        row = Row("w", "tok/s", "peer", [3.0, 100.0, 2.0], [2.0, 1.0, 50.0], bar=1.5)
        self.assertEqual((row.ratio, row.met), (1.5, True))
        self.assertEqual(spread([1.0, 2.0, 3.0, 4.0, 5.0]), 2 / 3)
        self.assertEqual(spread([7.0]), 0.0)

    def test_the_bar_holds_against_the_best_peer(self) -> None:
        samples = {"hearth": taken(10), "slow": taken(5), "fast": taken(20)}
        bars = {row.peer_name: (row.bar, row.met) for row in rows_against("w", "tok/s", samples, 1.0)}
        self.assertEqual(bars, {"slow": (None, None), "fast": (1.0, False)})
        lower = {row.peer_name: row.bar for row in rows_against("w", "ms", samples, 1.0, higher_is_better=False)}
        self.assertEqual(lower, {"slow": 1.0, "fast": None})

    def test_memory_is_met_when_it_is_lower(self) -> None:
        row = memory_row("w", {"hearth": taken(5), "peer": taken(10)}, "peer", 0.6)
        self.assertEqual((row.ratio, row.met, row.unit), (0.5, True, "MiB"))


class Processes(unittest.TestCase):
    def test_a_failure_is_one_sentence_with_the_last_line(self) -> None:
        report = Report()
        script = "import sys; sys.exit('first\\nthe reason')"
        with self.assertRaisesRegex(Missing, "failed with 1: the reason"):
            run([sys.executable, "-c", script])
        with self.assertRaisesRegex(Missing, "cannot be started"):
            run(["/nowhere/at/all"])
        report.attempt(lambda: run(["/nowhere/at/all"]) and None)
        self.assertEqual(len(report.notes), 1)

    def test_time_memory_and_output_are_of_the_process_alone(self) -> None:
        done = run([sys.executable, "-c", "print('x' * 100_000)"])
        self.assertEqual(len(done.stdout.strip()), 100_000)
        self.assertGreater(done.peak_rss_bytes, 1 << 20)


if __name__ == "__main__":
    unittest.main()
