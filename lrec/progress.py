"""How far a long step has come and how long it will still take, on stderr.

On a terminal these are tqdm's bars, the inner ones (layers of a block, batches of a layer) below the outer ones and
gone when they end. Elsewhere (a log, a pipe) an outer step that takes long tells a line every `LINE_S` seconds, and
inner ones say nothing. Of several processes the main one tells.
"""

import sys
from collections.abc import Iterable

from tqdm import tqdm

from lrec import processes

LINE_S = 60.0


class Progress(tqdm):
    """A tqdm bar that is lines of their own, now and then, where stderr is no terminal."""

    def __init__(
        self, iterable: Iterable | None = None, desc: str = "", unit: str = "step", inner: bool = False, **given
    ):
        """`inner` steps are parts of one that is told already; all else is as tqdm takes it."""
        terminal = sys.stderr.isatty()
        disable = not processes.is_main() or (inner and not terminal)
        shown = {"disable": disable, "leave": not inner, "dynamic_ncols": True}
        if not terminal:
            # The monitor would tell more often: it keeps to maxinterval.
            rate = {"mininterval": LINE_S, "maxinterval": LINE_S, "delay": LINE_S, "miniters": 1}
            line = "{desc}: {unit} {n_fmt} of {total_fmt}, {remaining} left{postfix}"
            shown |= rate | {"leave": False, "bar_format": line}
        super().__init__(iterable, desc=desc, unit=unit, file=sys.stderr, **shown | given)

    @staticmethod
    def status_printer(file):
        """Where tqdm's text goes: over itself on a terminal, else to a line of its own."""
        if file.isatty():
            return tqdm.status_printer(file)

        def line(text: str) -> None:
            if text.strip():
                file.write(f"{text.strip()}\n")
                file.flush()

        return line

    def close(self) -> None:
        """As tqdm does it, without moving a cursor where there is none."""
        if not self.disable and not self.fp.isatty():
            self.disable = True
            self._decr_instances(self)
            return
        super().close()
