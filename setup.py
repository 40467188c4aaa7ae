"""Builds the native CPU kernels; everything else about the package is in pyproject.toml.

The kernels are plain C++ behind a C ABI, loaded by ctypes: no Python or torch headers, one compiler call, one shared
library. They are optional. Without a compiler, or when it fails, the install succeeds, the compiler's own words go to
`lrec/kernels/native/build.log`, and `lrec explain` shows them. Build again with `python setup.py build_ext --inplace`.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = Path("lrec/kernels/native")
LIBRARY = "liblrec_native.so"
LOG = "build.log"
# No -march=native: a wheel may run elsewhere. The sources choose AVX2 and wider at run time, function by function.
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fPIC", "-shared", "-fopenmp"]


class BuildNative(build_ext):
    """One compiler call for the whole library; `optional=True` on the extension is what lets it fail."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(FOLDER / LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.build_lib) / FOLDER / LIBRARY
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        command = [*shlex.split(os.environ.get("CXX", "c++")), *FLAGS, *ext.sources, "-o", str(library)]
        if shutil.which(command[0]) is None:
            outcome = f"not built: no C++ compiler {command[0]!r}. Install one, or name it in CXX, and install again."
        else:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            outcome = f"{done.stdout}{'built' if done.returncode == 0 else 'not built: the compiler failed, see above'}"
        library.with_name(LOG).write_text(f"{shlex.join(command)}\n{outcome}\n")
        self.announce(f"lrec native kernels: {outcome}", level=3)

    def copy_extensions_to_source(self) -> None:
        """In-place builds: the library, if there is one, and the log. A library of an earlier build never stays."""
        (FOLDER / LIBRARY).unlink(missing_ok=True)
        super().copy_extensions_to_source()
        shutil.copyfile(Path(self.build_lib) / FOLDER / LOG, FOLDER / LOG)


sources = sorted(str(path) for path in FOLDER.glob("*.cpp"))
headers = sorted(str(path) for path in FOLDER.glob("*.h"))
extension = Extension("lrec.kernels.native.liblrec_native", sources, depends=headers, optional=True)
setup(ext_modules=[extension] if sources else [], cmdclass={"build_ext": BuildNative})
