"""The `lrec` command: one verb, its settings as flags, one report.

Exit codes: 0 done, 1 done but for what the report calls failed (methods of `compare`, checks of `doctor`), 2 wrong
input (one clear message on stderr), 3 does not fit in memory or on the disk, 130 interrupted. With `--json` the report
is the only thing on stdout.
"""

import contextlib
import errno
import gc
import json
import sys

from safetensors import SafetensorError

from lrec import options, registry
from lrec.verbs import FIRST, VERBS, benches, help_text, parts

# The verbs that the processes of an `accelerate launch` share; each of the others is one process's work.
SHARED = ("quantize", "cache", "train")


def run(verb: str, values: dict) -> dict:
    """What a verb reports under these settings."""
    if verb == "bench":
        what = str(values.pop("what", "nothing"))
        if what not in benches():
            raise ValueError(registry.nearest(what, benches(), "bench"))
        what = "step --shape" if what == "step" and "shape" in values else what
        return options.fill(values, benches()[what])[0].run()
    classes = parts(verb, values)
    if verb != "quantize":
        first, *rest = options.fill(values, *classes)
        return first.run(*rest)
    from lrec import effort

    first, *rest, preprocess = options.fill(effort.spend(values, *classes), *classes)
    return preprocess.run(first, *rest)


def show(report: dict) -> str:
    """A report for people: rows as a table, the rest as one line each."""
    from lrec.report import table

    lines = [
        f"{key:<20} {value:.6g}" if isinstance(value, float) else f"{key:<20} {value}"
        for key, value in report.items()
        if not isinstance(value, list)
    ]
    for rows in report.values():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            lines += ["", *table(rows)]
    return "\n".join(lines)


def join(verb: str) -> None:
    """Connects this process to the others of its launch. Raises ValueError for a verb that they cannot share."""
    from lrec import processes

    if verb not in SHARED:
        raise ValueError(
            f"{processes.count()} processes were started, but this is one process's work: leave `accelerate launch` "
            f"or `torchrun` out; {', '.join(SHARED)} and recipes share theirs"
        )
    processes.state()


def full(error: Exception) -> bool:
    """Whether a disk, a quota or the largest size of a file was reached, in Python's words or safetensors'."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in numbers or any(f"(os error {number})" in str(error) for number in numbers)


def main(argv: list[str] | None = None) -> int:
    """Runs one verb and returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = words.pop(0) if words and not words[0].startswith("-") else None
    try:
        if verb is not None and verb not in VERBS:
            raise ValueError(registry.nearest(verb, VERBS, "verb"))
        if verb in FIRST and words and not words[0].startswith("-"):
            words[0] = f"--{FIRST[verb]}={words[0]}"
        values = options.settings(words)
        if values.pop("help", False) or verb is None:
            print(help_text(verb, values))
            return 0
        if verb == "completion":
            print(options.fill(values, *parts(verb, values))[0].script())
            return 0
        as_json = options.parse("json", values.pop("json", False), bool)
        trusting = options.parse("trust_remote_code", values.pop("trust_remote_code", False), bool)
        from lrec import foreign, load, processes

        if trusting:
            foreign.trust_remote_code()

        if processes.count() > 1:
            join(verb)
        with contextlib.redirect_stdout(sys.stderr):
            load.quiet()
            if argv is None:  # the process is this command's own
                gc.freeze()  # a pass collects garbage at every block, and need not look at what was imported
            report = run(verb, values)
        if processes.is_main():
            print(json.dumps(report) if as_json else show(report))
        return int(bool(report.get("failed")))
    except ValueError as error:
        print(f"lrec{' ' + verb if verb else ''}: {error}", file=sys.stderr)
        return 2
    except MemoryError as error:
        print(f"lrec {verb}: does not fit in memory: {error}", file=sys.stderr)
        return 3
    except (OSError, SafetensorError) as error:
        if not full(error):
            if getattr(error, "filename", None) is None:
                raise
            print(f"lrec {verb}: {error.strerror}: {error.filename}; name a path that may be used", file=sys.stderr)
            return 2
        print(f"lrec {verb}: does not fit on the disk ({error}); what is there stays valid", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print(f"lrec {verb}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
