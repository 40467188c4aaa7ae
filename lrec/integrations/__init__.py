"""lrec inside transformers and peft.

Each library has a module here that registers lrec with it when it is imported. Importing either library takes
seconds, so `import lrec` imports neither: it waits until somebody does.
"""

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder

# The library's module that registration needs -> ours that registers.
AFTER = {
    "transformers.quantizers.auto": "lrec.integrations.transformers",
    "peft.tuners.lora.model": "lrec.integrations.peft",
    "peft.utils.transformers_weight_conversion": "lrec.integrations.peft_experts",
    "peft.peft_model": "lrec.integrations.stamp",
    "transformers.integrations.peft": "lrec.integrations.stamp",
}


class ImportAfter(MetaPathFinder):
    """Calls `register` of the module `then` once `awaited` has been imported, and leaves `sys.meta_path`."""

    def __init__(self, awaited: str, then: str):
        self.awaited = awaited
        self.then = then

    def find_spec(self, fullname, path=None, target=None):
        """The awaited module's own spec, whose loader goes on to `then`; None for every other module."""
        if fullname != self.awaited:
            return None
        position = sys.meta_path.index(self)
        del sys.meta_path[position]
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(position, self)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register(self.then)

        spec.loader.exec_module = exec_module
        return spec


def arrange() -> None:
    """Registers lrec with each library: now if it is imported already, else when it is. Calling it again is free."""
    waiting = {finder.awaited for finder in sys.meta_path if isinstance(finder, ImportAfter)}
    for awaited, then in AFTER.items():
        if awaited in sys.modules:
            _register(then)
        elif awaited not in waiting:
            sys.meta_path.insert(0, ImportAfter(awaited, then))


def _register(name: str) -> None:
    module = importlib.import_module(name)
    # One that is only now being imported registers at its end.
    if hasattr(module, "register"):
        module.register()
