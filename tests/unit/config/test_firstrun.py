"""The shipped fragments and the user the first run makes."""

from __future__ import annotations

from pathlib import Path

import argon2
import pytest

from broker.config import firstrun
from broker.config.difference import diff
from broker.config.options import PACKAGED, Options
from broker.config.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _backends() -> None:
    """These tests use the real ones."""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return _load(tmp_path)


def _load(tmp_path: Path) -> Settings:
    return load_settings(PACKAGED, base=tmp_path, environ={})


def test_the_packaged_fragments_are_those_of_the_repository() -> None:
    packaged = {path.name: path.read_bytes() for path in PACKAGED.glob("*.toml")}
    shipped = {path.name: path.read_bytes() for path in (ROOT / "conf.d").glob("*.toml")}
    assert packaged == shipped
    assert len(packaged) >= 3


def test_the_shipped_fragments_have_no_problem_and_no_warning(settings: Settings) -> None:
    assert settings.warnings == []
    assert [str(listener.bind) for listener in settings.listeners.values()] == ["127.0.0.1:1883"]
    assert (list(settings.auth), list(settings.sinks)) == (["accounts"], ["sqlite"])


def test_the_shipped_values_are_the_defaults(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    default = load_settings(tmp_path / "conf.d", environ={})
    for section in ("broker", "access", "limits", "workers"):
        assert getattr(settings, section) == getattr(default, section)


def test_the_first_run_makes_user_password_and_rule(settings: Settings, tmp_path: Path) -> None:
    lines = firstrun.prepare(settings)
    data = tmp_path / "data"
    password = (data / "demo-password").read_text().strip()
    name, _, hashed = (data / "passwords").read_text().strip().partition(":")
    assert name == "demo"
    assert argon2.PasswordHasher().verify(hashed, password)
    assert "telemetry/demo/#" in (data / "acl.conf").read_text()
    assert all((data / file).stat().st_mode & 0o777 == 0o600 for file in ("demo-password", "passwords", "acl.conf"))
    assert password not in "\n".join(lines)
    assert any("mosquitto_pub" in line and str(data / "demo-password") in line for line in lines)
    assert any("python3 -c" in line and str(data / "telemetry.db") in line for line in lines)


def test_it_happens_once(settings: Settings, tmp_path: Path) -> None:
    firstrun.prepare(settings)
    before = (tmp_path / "data" / "passwords").read_bytes()
    assert firstrun.prepare(settings) == []
    assert firstrun.prepare(_load(tmp_path)) == []
    assert (tmp_path / "data" / "passwords").read_bytes() == before


def test_rules_somebody_wrote_before_are_kept(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "acl.conf").write_text("# mine\n")
    firstrun.prepare(settings)
    assert (tmp_path / "data" / "acl.conf").read_text() == "# mine\n"


def test_what_it_made_is_no_change_for_the_next_reload(settings: Settings, tmp_path: Path) -> None:
    firstrun.prepare(settings)
    assert diff(settings, _load(tmp_path)).empty


def test_a_passwords_file_outside_the_data_folder_is_never_made(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "users").write_text("")
    (tmp_path / "conf.d" / "a.toml").write_text('[auth.accounts]\nkind = "file"\npasswords = "users"\n')
    settings = load_settings(tmp_path / "conf.d", environ={})
    (tmp_path / "users").unlink()
    assert firstrun.prepare(settings) == []
    assert not (tmp_path / "data").exists()


def test_loading_has_no_side_effects(settings: Settings, tmp_path: Path) -> None:
    assert firstrun.pending(settings) is settings.auth["accounts"]
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_fragments_is_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("broker.config.options.SYSTEM", tmp_path / "etc" / "conf.d")
    assert Options().folder() == (PACKAGED, tmp_path)
    (tmp_path / "etc" / "conf.d").mkdir(parents=True)
    assert Options().folder() == (tmp_path / "etc" / "conf.d", tmp_path / "etc")
    (tmp_path / "conf.d").mkdir()
    assert Options().folder() == (tmp_path / "conf.d", tmp_path)
    assert Options(conf=Path("other")).folder() == (tmp_path / "other", tmp_path)


def test_the_control_socket_is_found_although_a_fragment_is_broken(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "a.toml").write_text('[broker]\ndata = "var"\nnonsense = 1\n')
    (tmp_path / "conf.d" / "b.toml").write_text("not TOML [")
    assert Options(conf=tmp_path / "conf.d").data_folder() == tmp_path / "var"
