"""Speed and memory as ratios against a peer or a ceiling that is measured in the same run."""

import json
from datetime import date
from pathlib import Path


def keep(output: str | None, name: str, report: dict) -> dict:
    """The report with today's date, added under `name` to the JSON file `output` if one is given."""
    report = {"date": date.today().isoformat(), **report}
    if output:
        path = Path(output)
        held = json.loads(path.read_text()) if path.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**held, name: report}, indent=1) + "\n")
    return report
