"""The table of peers: `python -m peers`, which goes on where it stopped; `peers.rows` says what is in it."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from lrec import checkpoint, picture
from lrec.report import table
from peers.rows import CACHE, MODEL, SEED, TEST, TRAIN, WORK, Label, labels

RESULTS = Path("data/results/peers_smollm2.json")
COLUMNS = ("bits_per_weight", "total_bytes", "perplexity", "kl", "top1_agreement", "training_tokens")


def row_of(label: Label, make: bool) -> dict:
    """A finished row, or one made now in a process of its own, or one that says why there is none.

    A row that failed is tried again by the next call."""
    if label.absent:
        return {"method": label.text, "error": label.absent}
    if not label.row.exists():
        if not make:
            return {"method": label.text, "error": "not made yet: `make peers` goes on with it"}
        print(f"{label.text} ...", file=sys.stderr, flush=True)
        label.place.mkdir(parents=True, exist_ok=True)
        log = label.place / "log.txt"
        with log.open("w") as said:
            done = subprocess.run([sys.executable, "-m", "peers.measure", label.text], stdout=said, stderr=said)
        if done.returncode:
            last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            return {"method": label.text, "error": f"{last} (exit code {done.returncode}; {log} tells more)"}
    return json.loads(label.row.read_text())


def smallest_kl(row: dict, rows: list[dict]) -> dict | None:
    """Of lrec's rows that take no more bytes than a peer's, the one of least KL."""
    fit = [r for r in rows if r["method"].startswith("lrec:") and "kl" in r and r["total_bytes"] <= row["total_bytes"]]
    return min(fit, key=lambda r: r["kl"], default=None)


def shown(row: dict, rows: list[dict]) -> dict:
    """A row as the table has it: beside each peer's the best of lrec's that takes no more bytes."""
    cells = {"method": row["method"]} | {name: row.get(name) for name in COLUMNS}
    ours = smallest_kl(row, rows) if "kl" in row and ":" in row["method"] else None
    if row["method"].startswith("lrec:") or ours is None:
        return cells | {"lrec_kl": None, "lrec_row": None}
    return cells | {"lrec_kl": ours["kl"], "lrec_row": ours["method"]}


def main(words: list[str] | None = None) -> int:
    """Makes what rows are missing, writes them, prints table and picture; 1 if a row failed that should be there."""
    parser = argparse.ArgumentParser("python -m peers", description=__doc__)
    parser.add_argument("--finished", action="store_true", help="make no row, only the table of those that are there")
    make = not parser.parse_args(words).finished
    rows, failed = [], 0
    for label in labels():
        rows.append(row_of(label, make))
        failed += "error" in rows[-1] and not label.absent
    settings = {"model": MODEL, "training": TRAIN | {"seed": SEED}, "test": TEST, "cache": f"lrec {CACHE}"}
    checkpoint.write_json(RESULTS, {"settings": settings, "rows": rows})
    print("\n".join(table([shown(row, rows) for row in rows])))
    for row in rows:
        if "error" in row:
            print(f"{row['method']}: {row['error']}")
    print(f"results {RESULTS}\npicture {picture.draw(rows[1:], WORK)}")  # without full precision
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
