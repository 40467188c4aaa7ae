"""Name -> member of a plug-in folder.

A plug-in folder (`formats`, `quantizers`, `kernels`, `export`, `imports`) declares one base class in its `__init__.py`;
every other file of it holds one subclass, and the file's name is the member's name. Nothing is listed by hand: putting
a file there registers it, and only the file asked for is imported.
"""

import difflib
import importlib
import pkgutil
from functools import lru_cache


def nearest(name: str, allowed, what: str) -> str:
    """The middle and last part of an error about an unknown name: what is allowed, and the likeliest right one."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"unknown {what} {name!r}; allowed: {', '.join(allowed) or 'none'}.{hint}"


@lru_cache
def names(folder: str) -> tuple[str, ...]:
    """Names of the members of `lrec.<folder>`, sorted; imports the folder's `__init__` alone."""
    package = importlib.import_module(f"lrec.{folder}")
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg))


@lru_cache
def find(folder: str, name: str) -> type:
    """The class in `lrec/<folder>/<name>.py`. Raises ValueError that names the nearest member if there is none."""
    if name not in names(folder):
        raise ValueError(nearest(name, names(folder), folder.rstrip("s")))
    package = importlib.import_module(f"lrec.{folder}")
    module = importlib.import_module(f"lrec.{folder}.{name}")
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, package.Base) and value.__module__ == module.__name__
    ]
    assert len(own) == 1, f"{module.__name__} must define exactly one {package.Base.__name__}, found {own}"
    return own[0]


def name_of(member: type) -> str:
    """The name of a member: that of its file."""
    return member.__module__.rpartition(".")[2]


def members(folder: str) -> dict[str, type]:
    """All members of a folder by name."""
    return {name: find(folder, name) for name in names(folder)}
