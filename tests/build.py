"""Which modules run compiled, and runs of the tests on other builds.

`report [--all]` prints the state; `interpreted` runs unit, packet and conformance tests in a copy of the tree without
compiled files, on plain asyncio; `matrix` runs the tests on every supported Python of this machine.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    "broker",
    "auth",
    "bridges",
    "sinks",
    "tests",
    "compose",
    "conf.d",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "REFERENCE.md",
    "LICENSE",
    "Makefile",
)
PYTHONS = ("3.11", "3.12", "3.13", "3.14")


NO_UVLOOP = """
import importlib.machinery, importlib.util, sys
if "pytest" not in sys.modules:
    raise ImportError("left out on purpose")
paths = [p for p in sys.path if p not in ("", __file__.rpartition("/")[0])]
spec = importlib.machinery.PathFinder.find_spec("uvloop", paths)
sys.modules["uvloop"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""
"""Hides uvloop from every process that is not a test run: brokers then run on plain asyncio. The tests themselves may
still compare the two loops."""


def listed_modules(root: Path = ROOT) -> set[str]:
    """What pyproject.toml says is compiled."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    return set(project["tool"]["isthmus"]["compiled"])


def compiled(root: Path = ROOT) -> tuple[set[str], set[str]]:
    """The modules that have a compiled file for this Python beside their source, and those that should."""
    listed = listed_modules(root)
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    built = {m for m in listed if any((root / (m.replace(".", "/") + s)).exists() for s in suffixes)}
    return built, listed


def report(everything: bool) -> int:
    built, listed = compiled()
    print(f"isthmus: {len(built)} of {len(listed)} modules compiled", end="")
    print(f"; interpreted: {', '.join(sorted(listed - built))}" if built != listed else "")
    return 1 if everything and built != listed else 0


def copy_pure(target: Path) -> None:
    """The tree as a user without a compiler has it."""
    for name in COPIED:
        source = ROOT / name
        generated = ("*.c",) if name == "broker" else ()
        if source.is_dir():
            shutil.copytree(
                source,
                target / name,
                ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "mqttload", *generated),
            )
        elif source.exists():
            shutil.copy2(source, target / name)


def interpreted(arguments: Sequence[str]) -> int:
    """Unit, packet and conformance tests without a compiled file in sight; brokers without uvloop."""
    with tempfile.TemporaryDirectory(prefix="isthmus-pure-") as folder:
        target = Path(folder)
        copy_pure(target)
        (target / "uvloop.py").write_text(NO_UVLOOP)
        required = [r for r in os.environ.get("REQUIRE", "").split(",") if r and r != "compiled"]
        environment = {**os.environ, "PYTHONPATH": folder, "REQUIRE": ",".join(required)}
        rooms = [r for r in ("tests/unit", "tests/packets", "tests/conformance") if (target / r).is_dir()]
        command = [sys.executable, "-m", "pytest", *rooms, *arguments]
        return subprocess.run(command, cwd=target, env=environment).returncode


def matrix(arguments: Sequence[str]) -> int:
    """Every supported Python in a virtual environment of its own; prints one closing line each."""
    worst = 0
    for version in PYTHONS:
        python = shutil.which(f"python{version}")
        if python is None:
            print(f"matrix: python{version} is not on this machine")
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"isthmus-{version}-") as folder:
            target = Path(folder)
            copy_pure(target)
            venv = target / ".venv" / "bin" / "python"
            subprocess.run([python, "-m", "venv", target / ".venv"], check=True)
            install = [venv, "-m", "pip", "install", "--quiet", "--editable", ".[all,test]"]
            subprocess.run(install, check=True, cwd=target)
            environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
            code = subprocess.run([venv, "-m", "pytest", *arguments], cwd=target, env=environment).returncode
        print(
            f"matrix: python{version}: {'ok' if code == 0 else f'failed ({code})'} in {time.monotonic() - began:.0f} s"
        )
        worst = worst or code
    return worst


def need_setuptools() -> None:
    """In a test: skip where setuptools is older than the build asks for (a build without isolation uses it)."""
    import importlib.metadata

    import pytest

    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if int(importlib.metadata.version("setuptools").split(".")[0]) >= 77:
            return
    pytest.skip("the build needs setuptools >= 77 (make setup)")


def main(arguments: Sequence[str]) -> int:
    match list(arguments):
        case ["report", *rest]:
            return report("--all" in rest)
        case ["interpreted", *rest]:
            return interpreted(rest)
        case ["matrix", *rest]:
            return matrix(rest)
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
