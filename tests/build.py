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


def find_python(version: str) -> str | None:
    """An interpreter of this version that runs: on the path, or where pyenv and uv keep theirs. Their stand-ins on the
    path refuse to run what is not switched on."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser()
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", "~/.local/share/uv/python")).expanduser()
    kept = (*pyenv.glob(f"versions/{version}.*/bin/python"), *uv.glob(f"cpython-{version}.*/bin/python{version}"))
    print_version = "import sys; print('%d.%d' % sys.version_info[:2])"
    for candidate in (sys.executable, shutil.which(f"python{version}"), *sorted(map(str, kept), reverse=True)):
        if candidate is None:
            continue
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            asked = subprocess.run([candidate, "-c", print_version], capture_output=True, text=True, timeout=20)
            if asked.returncode == 0 and asked.stdout.strip() == version:
                return candidate
    return None


def matrix(arguments: Sequence[str]) -> int:
    """Every supported Python in a virtual environment of its own; prints one closing line each."""
    lines = []
    worst = 0
    for version in PYTHONS:
        python = find_python(version)
        if python is None:
            lines.append(f"matrix: python{version} is not on this machine")
            continue
        began = time.monotonic()
        code = on_python(python, version, arguments)
        result = "ok" if code == 0 else f"failed ({code})"
        lines.append(f"matrix: python{version}: {result} in {time.monotonic() - began:.0f} s, {python}")
        worst = worst or code
    print("\n".join(lines))
    return worst


def on_python(python: str, version: str, arguments: Sequence[str]) -> int:
    """The tests on one interpreter, compiled for it, in a copy of the tree; the first exit code that is not 0."""
    with tempfile.TemporaryDirectory(prefix=f"isthmus-{version}-") as folder:
        target = Path(folder)
        copy_pure(target)
        venv = str(target / ".venv" / "bin" / "python")
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment["PATH"] = f"{target / '.venv' / 'bin'}:{environment.get('PATH', '')}"
        for command in (
            [python, "-m", "venv", str(target / ".venv")],
            [venv, "-m", "pip", "install", "--quiet", "--upgrade", "pip"],
            [venv, "-m", "pip", "install", "--quiet", "--editable", ".[all,test]"],
            [venv, "-m", "pytest", *arguments],
        ):
            code = subprocess.run(command, cwd=target, env=environment).returncode
            if code:
                print(f"matrix: python{version}: failed: {' '.join(command)}", flush=True)
                return code
    return 0


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
