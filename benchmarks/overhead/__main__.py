"""What one change costs: the two loads of `python -m benchmarks.serving --groups cost`.

Requests of 16 tokens, 32 at a time, and of one token alone; with dials, and with dials and report.
With `--against` the server of another checkout is measured too.
"""

from pathlib import Path

from benchmarks.serving.__main__ import parser, run


def main() -> None:
    """Runs the benchmark."""
    defaults = {"groups": ["cost"], "starts": 8, "rounds": 10, "out": Path("bench/overhead")}
    run(parser(**defaults).parse_args())


if __name__ == "__main__":
    main()
