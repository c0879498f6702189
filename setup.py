"""Compiles the message path with Cython where it can. Everything else about the package is in pyproject.toml.

The modules named under `[tool.isthmus] compiled` are ordinary Python with a `.pxd` beside them. Without Cython or a
compiler the package installs and runs interpreted; ISTHMUS_COMPILE=always turns that fall-back into a failure and
ISTHMUS_COMPILE=never skips compiling.
"""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

HERE = Path(__file__).resolve().parent
MODE = os.environ.get("ISTHMUS_COMPILE", "try")
DIRECTIVES = {
    "language_level": 3,
    "boundscheck": True,  # lengths may lie; what is hot goes through pointers, behind checks of its own
    "wraparound": True,  # `parts[-1]` stays what it says
    "annotation_typing": False,  # types come from the .pxd alone
    "initializedcheck": False,
    "cdivision": True,
    "nonecheck": False,
}


def compiled_modules() -> list[str]:
    """The list under `[tool.isthmus] compiled`."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text("utf-8"))
    return list(project["tool"]["isthmus"]["compiled"])


def extensions() -> list[Extension]:
    """What Cython makes of the list; empty, with a warning, when it cannot."""
    if MODE == "never":
        return []
    try:
        from Cython.Build import cythonize
        from Cython.Compiler.Errors import CompileError
    except ImportError as error:
        return refused("Cython is not installed", error)
    optional = MODE != "always"
    arguments = ["-O3", "-fno-strict-aliasing", "-w"] if os.name == "posix" else []  # -w: the C is not ours to mend
    wanted = [
        Extension(name, [name.replace(".", "/") + ".py"], optional=optional, extra_compile_args=arguments)
        for name in compiled_modules()
    ]
    try:
        made: list[Extension] = cythonize(
            wanted,
            compiler_directives=DIRECTIVES,
            build_dir="build/cython",
            nthreads=0 if sys.platform == "win32" else os.cpu_count() or 1,
            quiet=True,
        )
    except CompileError as error:
        return refused("Cython refuses a module", error)
    return made


def refused(why: str, error: BaseException) -> list[Extension]:
    """Warn and go on interpreted, or end the build where compiling was asked for."""
    if MODE == "always":
        raise SystemExit(f"isthmus: {why}: {error}") from error
    print(f"warning: isthmus will run interpreted: {why}: {error}", file=sys.stderr)
    return []


class BuildExtensions(build_ext):
    """A missing compiler is a warning: `optional` covers each module, this covers the search for the compiler."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # whatever the platform's compiler search raises
            refused("the compiler does not work", error)

    def copy_extensions_to_source(self) -> None:
        """Put beside the sources those modules that could be compiled."""
        whole = self.extensions
        self.extensions = [e for e in whole if Path(self.build_lib, self.get_ext_filename(e.name)).exists()]
        super().copy_extensions_to_source()
        self.extensions = whole


class SourceDistribution(sdist):
    """Adds what building needs and no package holds."""

    def add_defaults(self) -> None:
        super().add_defaults()
        for pattern in ("conf.d/*", "broker/**/*.pxd"):
            self.filelist.extend(sorted(str(p.relative_to(HERE)) for p in HERE.glob(pattern) if p.is_file()))


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtensions, "sdist": SourceDistribution},
)
