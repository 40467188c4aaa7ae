"""A verb of `lrec` in a process of its own, with its report kept beside what it makes.

So time and peak memory are that run's alone, and what is finished is not run again.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from lrec import assembly, checkpoint, foreign

# In a process that ends with its parent, so that no orphan writes where a later call goes on.
CHILD = """
import ctypes, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
from lrec.cli import main
sys.exit(main())
"""


def run(verb: str, settings: dict[str, object], output_dir: Path) -> dict:
    """The report of `lrec VERB` with these settings into `output_dir`; that of an earlier call if it was finished.

    Raises ValueError with the last line that the process said, if it fails; all that it said is in a log.
    """
    told, log = beside(output_dir)
    if told.exists() and output_dir.exists():
        return checkpoint.read_json(told)
    if not goes_on(verb, output_dir):
        shutil.rmtree(output_dir, ignore_errors=True)
    flags = [f"--{name}={'none' if value is None else value}" for name, value in settings.items()]
    flags += ["--trust_remote_code"] if foreign.trusted() else []
    command = [sys.executable, "-c", CHILD, verb, "--json", *flags, f"--output_dir={output_dir}"]
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stderr:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
    if done.returncode:
        last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1]
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise ValueError(f"{last} ({ended}; {log} tells more)")
    report = json.loads(done.stdout)
    checkpoint.write_json(told, report)
    return report


def goes_on(verb: str, output_dir: Path) -> bool:
    """Whether a verb goes on with what an interrupted run of it left. Quantizing does from its first note of progress
    to its last; of one that was finished, but not reported, neither seconds nor bytes are known."""
    return verb == "cache" or (verb == "quantize" and (output_dir / assembly.PROGRESS).exists())


def remove(output_dir: Path) -> None:
    """Removes what a run made, its report and its log, as far as they are there."""
    shutil.rmtree(output_dir, ignore_errors=True)
    for path in beside(output_dir):
        path.unlink(missing_ok=True)


def beside(output_dir: Path) -> tuple[Path, Path]:
    """Where a run's report and its log are."""
    return output_dir.with_suffix(".json"), output_dir.with_suffix(".log")
