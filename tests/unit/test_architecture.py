"""The shape of the code, kept true by reading it: who imports whom, what is compiled, what the wheel holds."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import build

ROOT = Path(__file__).resolve().parent.parent.parent
EDGES = {"extend", "config", "runtime"}
ALLOWED: dict[str, set[str]] = {
    # mqtt <- engine <- access <- net, features, admin, gateways, store, cluster <- app <- cli
    # mqtt <- client <- bridges
    "mqtt": set(),
    "engine": {"mqtt"},
    "config": {"extend"},
    "extend": {"config", "mqtt"},
    "client": {"mqtt"},
    "runtime": {"mqtt", "client"} | EDGES,
    "importers": {"config"},
    "connectors": EDGES,
    "access": {"mqtt", "engine"} | EDGES,
    **{
        outer: {"mqtt", "engine", "access", "client", "connectors"} | EDGES
        for outer in ("net", "features", "admin", "gateways", "store", "cluster")
    },
}
BACKENDS = {
    "auth": {"connectors", "access", "mqtt"} | EDGES,
    "sinks": {"connectors", "mqtt"} | EDGES,
    "bridges": {"connectors", "client", "mqtt"} | EDGES,
}
TOP = {"app", "identity", "defaults", "cli", "__main__", "__init__"}
FRAGMENTS = "broker/defaults/conf.d/"


def sources(room: str) -> list[Path]:
    return sorted(p for p in (ROOT / room).rglob("*.py") if "__pycache__" not in p.parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything the file imports, also inside functions; type checking only is not counted."""
    tree = ast.parse(path.read_text("utf-8"))
    unreal = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        if id(node) in unreal:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def room_of(name: str) -> str | None:
    """`broker.net.tcp` -> net; None for what is not ours and for `broker` itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == "broker" and len(parts) > 1 and not parts[1].startswith("__") else None


def wrong_imports(paths: list[Path], own: str | None, allowed: set[str]) -> list[str]:
    wrong = []
    for path in paths:
        for line, name in imports(path):
            where = f"{path.relative_to(ROOT)}:{line}: {name}"
            room = room_of(name)
            foreign_room = room is not None and room != own and room not in allowed
            backend = own is not None and name.split(".")[0] in BACKENDS
            if foreign_room or backend:
                wrong.append(where)
    return sorted(set(wrong))


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_point_inward(room: str) -> None:
    assert wrong_imports(sources(f"broker/{room}"), room, ALLOWED[room]) == []


@pytest.mark.parametrize("room", sorted(BACKENDS))
def test_a_backend_imports_neither_engine_nor_net_nor_another_backend(room: str) -> None:
    assert wrong_imports(sources(room), None, BACKENDS[room]) == []
    others = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources(room)
        for line, name in imports(path)
        if name.split(".")[0] in set(BACKENDS) - {room}
    ]
    assert others == []


def test_every_room_is_known_to_this_test() -> None:
    rooms = {p.name if p.is_dir() else p.stem for p in (ROOT / "broker").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert rooms - set(ALLOWED) - TOP - {"__pycache__"} == set()


def test_only_the_application_knows_every_room() -> None:
    """Nobody but app.py (and the command line above it) imports app."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources("broker") + sources("auth") + sources("sinks") + sources("bridges")
        for line, name in imports(path)
        if name.startswith("broker.app") and path.relative_to(ROOT).parts[1] not in {"cli", "__main__.py", "app.py"}
    ]
    assert wrong == []


def test_the_application_reaches_backends_only_by_name() -> None:
    assert [n for p in sources("broker") for _, n in imports(p) if n.split(".")[0] in BACKENDS] == []


def test_every_pxd_is_listed_and_every_listed_module_has_one() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["isthmus"]["compiled"]
    there = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "broker").rglob("*.pxd")}
    assert listed == sorted(listed)
    assert set(listed) == there
    assert all((ROOT / (m.replace(".", "/") + ".py")).exists() for m in listed)


def test_only_wire_engine_and_what_a_worker_reads_are_compiled() -> None:
    there = {p.relative_to(ROOT / "broker").with_suffix("").parts for p in (ROOT / "broker").rglob("*.pxd")}
    assert {parts for parts in there if parts[0] not in ("mqtt", "engine")} == {("client", "delivery")}


def test_the_top_level_holds_nothing_but_what_was_agreed() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    folders = {line.split("/")[0] for line in listing.stdout.splitlines() if "/" in line}
    assert folders <= {"broker", "bridges", "auth", "sinks", "tests", "compose", "conf.d", ".ci"}


@pytest.mark.timeout(180)
def test_the_wheel_holds_the_four_packages_and_the_fragments_and_nothing_else(tmp_path: Path) -> None:
    build.need_setuptools()
    environment = {**os.environ, "ISTHMUS_COMPILE": "never"}
    tree = tmp_path / "tree"
    tree.mkdir()
    build.copy_pure(tree)
    code = f"from setuptools.build_meta import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("isthmus-")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names if ".dist-info/" not in n}
    assert tops == {"broker", "auth", "bridges", "sinks"}
    suffixes = {Path(n).suffix for n in names if ".dist-info/" not in n and not n.startswith(FRAGMENTS)}
    assert suffixes <= {".py", ".typed"}
    shipped = {n.removeprefix(FRAGMENTS) for n in names if n.startswith(FRAGMENTS)}
    assert shipped == {p.name for p in (ROOT / "conf.d").glob("*.toml")}
    assert "00-broker.toml" in shipped


def test_the_packaged_fragments_are_the_shipped_ones() -> None:
    shipped = {p.name: p.read_text("utf-8") for p in (ROOT / "conf.d").glob("*.toml")}
    assert {p.name: p.read_text("utf-8") for p in (ROOT / FRAGMENTS).glob("*.toml")} == shipped
