"""Backends that other distributions bring: the README's example, built, installed and used."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from broker.extend import registry
from tests import build

ROOT = Path(__file__).resolve().parent.parent.parent.parent


def example() -> tuple[str, str]:
    """The module and the pyproject.toml that the README shows."""
    section = (ROOT / "README.md").read_text("utf-8").partition("## A backend of your own")[2].partition("\n## ")[0]
    blocks = dict(re.findall(r"```(python|toml)\n(.*?)```", section, re.DOTALL))
    return blocks["python"], blocks["toml"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the example."""
    build.need_setuptools()
    source, site = tmp_path_factory.mktemp("word"), tmp_path_factory.mktemp("site")
    module, project = example()
    (source / "isthmus_word.py").write_text(module)
    (source / "pyproject.toml").write_text(project)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
         "--disable-pip-version-check", "--target", str(site), str(source)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return site


def isthmus(site: Path, where: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(site)])
    return subprocess.run(
        [sys.executable, "-m", "broker", *arguments, "--conf", str(where / "conf.d"), "--data", str(where / "data")],
        capture_output=True, text=True, timeout=60, input=stdin, env={**os.environ, "PYTHONPATH": paths}, cwd=where,
    )  # fmt: skip


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "word").write_text("swordfish\n")
    (tmp_path / "conf.d" / "10.toml").write_text('[auth.word]\nword = "${file:word}"\ncache_ttl = 5\n')
    return tmp_path


@pytest.mark.timeout(180)
def test_the_example_of_the_readme_is_loaded_and_asked(site: Path, conf: Path) -> None:
    checked = isthmus(site, conf, "check", "--connect")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    right = isthmus(
        site, conf, "auth", "test", "--user", "ann", "--client", "c", "--publish", "own/ann/x", stdin="swordfish\n"
    )
    assert (right.returncode, right.stdout.splitlines()[-1]) == (0, "allow"), right.stdout + right.stderr
    other = isthmus(
        site, conf, "auth", "test", "--user", "ann", "--client", "c", "--publish", "own/bob/x", stdin="swordfish\n"
    )
    assert other.stdout.splitlines()[-1] == "deny"
    wrong = isthmus(site, conf, "auth", "test", "--user", "ann", "--client", "c", stdin="sword\n")
    assert (wrong.returncode, wrong.stdout.splitlines()[-1]) == (1, "deny")
    schema = isthmus(site, conf, "config", "schema")
    assert '"WordConfig"' in schema.stdout


def test_its_keys_are_checked_like_ours(site: Path, conf: Path) -> None:
    (conf / "conf.d" / "20.toml").write_text("[auth.word]\nwrd = 1\n")
    checked = isthmus(site, conf, "check")
    assert checked.returncode == 2
    assert re.search(r"20\.toml:2: auth\.word\.wrd: .*word", checked.stderr), checked.stderr


def test_without_it_the_kind_is_unknown(tmp_path: Path, conf: Path) -> None:
    checked = isthmus(tmp_path, conf, "check")
    assert checked.returncode == 2
    assert "no auth backend is called 'word'" in checked.stderr


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, entry: str, module: str = "") -> None:
        metadata = tmp_path / f"{name}-1.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (metadata / "entry_points.txt").write_text(f"[isthmus.backends]\n{entry}\n")
        if module:
            (tmp_path / f"{name}.py").write_text(module)
        importlib.invalidate_caches()

    return install


GOOD = "from broker.extend.auth import AuthConfig\nfrom broker.extend.registry import Backend\n"


@pytest.mark.parametrize(
    ("module", "say"),
    [
        ("1 / 0\n", "broken_one:BACKEND of broken_one 1 cannot be loaded: ZeroDivisionError"),
        ("import no_such_driver\nBACKEND = 1\n", "No module named 'no_such_driver'"),
        ("BACKEND = object()\n", 'is no registration: write BACKEND = Backend("auth.thing", …)'),
        (GOOD + 'BACKEND = Backend("auth.other", AuthConfig, None)\n', "is no registration"),
    ],
)
def test_what_cannot_be_used_names_its_distribution(
    install: object, monkeypatch: pytest.MonkeyPatch, module: str, say: str
) -> None:
    install("broken_one", "auth.thing = broken_one:BACKEND", module)  # type: ignore[operator]
    monkeypatch.delitem(sys.modules, "broken_one", raising=False)
    with pytest.raises(registry.WrongBackend) as caught:
        registry.load("auth", "thing")
    assert say in str(caught.value)


def test_nobody_takes_the_place_of_another(install: object) -> None:
    install("usurper", "auth.file = usurper:BACKEND", "raise RuntimeError('imported')\n")  # type: ignore[operator]
    assert registry.load("auth", "file").name == "auth.file"
    install("one", "auth.thing = one:BACKEND")  # type: ignore[operator]
    install("two", "auth.thing = two:BACKEND")  # type: ignore[operator]
    assert "thing" in registry.kinds("auth")
    assert "thing" not in registry.kinds("sinks")
    with pytest.raises(registry.WrongBackend, match="registered by one 1 and by two 1"):
        registry.load("auth", "thing")
