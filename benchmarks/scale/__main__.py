"""What many requests a second take: pieces are measured, a simulation puts them together.

Results go to a folder: `results.json` and `tables.md`. docs/operations.md reads them.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from benchmarks.scale.checked import check_simulation, compare_processes
from benchmarks.scale.pieces import measure_pieces
from benchmarks.scale.sizing import sizing_tables
from benchmarks.serving.machine import machine
from benchmarks.serving.report import WIDTH
from benchmarks.serving.servers import Site

PARTS = {
    "pieces": measure_pieces,
    "processes": compare_processes,
    "check": check_simulation,
}


def main() -> None:
    """Measures, computes, prints the tables and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/demo"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--requests", type=int, default=3000, help="of a measurement")
    parser.add_argument("--rate", type=int, default=10_000, help="requests a second to size for")
    parser.add_argument("--out", type=Path, default=Path("bench/scale"), help="folder of results")
    options = parser.parse_args()
    console = Console()
    path = options.out / "results.json"
    # A part that is not measured anew stays.
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found["machine"] = machine()
    options.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        site = Site.made(options.checkpoint, Path(folder))
        for part in options.parts:
            with console.status(part):
                found[part] = PARTS[part](site, options.requests)
            path.write_text(json.dumps(found, indent=1) + "\n")
    tables = sizing_tables(found, options.rate)
    (options.out / "tables.md").write_text(tables)
    console.print(Markdown(tables), width=WIDTH)


if __name__ == "__main__":
    main()
