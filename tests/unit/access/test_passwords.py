"""Password hashes and the files that hold them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
import time
from pathlib import Path

import bcrypt
import pytest

from broker.access import passwords
from broker.access.bulkhead import Busy
from broker.access.password_file import read_passwords
from broker.access.passwords import BadHash, Form, Hash, Verifier, describes_itself, hash_password
from broker.access.text_file import FileError

# written by mosquitto_passwd 2.0.11 for the password "secret"
REAL_7 = (
    "$7$101$ueXz9A2lprcqG3PG$bH49w56FFB/hU7EoN3WtFkBdIdfZ+wEWj16ZrJAeNB5r3wON9Pkh1MDgsIKuD7zQJC0En++qsmldNQzvhNu2rQ=="
)
REAL_6 = "$6$ovKhwVn5M9Yyiyz2$0dsukWiUU31CMP9MaKMbl82m+MJ3X+vqw6jQ3lP9WcuCPiBj+Y1cT9NIIVZ8NE4C2FxhipesJDhQNPNlb7fcNQ=="
SALT = base64.b64encode(b"saltsaltsalt").decode()
M7 = f"$7$101${SALT}${base64.b64encode(hashlib.pbkdf2_hmac('sha512', b'secret', b'saltsaltsalt', 101, 64)).decode()}"
M6 = f"$6${SALT}${base64.b64encode(hashlib.sha512(b'secretsaltsaltsalt').digest()).decode()}"
BCRYPT = bcrypt.hashpw(b"secret", bcrypt.gensalt(4)).decode()


@pytest.mark.parametrize(
    "text",
    [
        hash_password("secret"),
        REAL_7,
        REAL_6,
        M7,
        M6,
        BCRYPT,
        BCRYPT.replace("$2b$", "$2y$"),
        hash_password("secret", "pbkdf2"),
    ],
)
def test_the_right_password_and_no_other(text: str) -> None:
    hash = Hash(text)
    assert hash.verify(b"secret")
    for wrong in (b"", b"Secret", b"secret\0", b"secret ", b"x" * 100):
        assert not hash.verify(wrong)
    assert text not in repr(hash)


def test_a47_bcrypt_refuses_what_it_would_cut_off() -> None:
    """A-47: beyond 72 bytes and behind a NUL."""
    long = b"a" * 72
    hash = Hash(bcrypt.hashpw(long, bcrypt.gensalt(4)).decode())
    assert hash.verify(long)
    assert not hash.verify(long + b"b")
    assert not Hash(bcrypt.hashpw(b"ab", bcrypt.gensalt(4)).decode()).verify(b"ab\0c")
    with pytest.raises(ValueError, match="72"):
        hash_password(long + b"b", "bcrypt")


@pytest.mark.parametrize(
    ("text", "say"),
    [
        ("", "empty"), ("plain", "no known kind"), ("$1$abc$def", "no known kind"), ("{SSHA}abc", "damaged"),
        ("{SHA999}AAAA", "no known kind"),
        ("$argon2id$v=19$m=4194304,t=3,p=4$c2FsdHNhbHQ$AAAAAAAAAAAAAAAAAAAAAA", "4194304 KiB"),
        ("$argon2id$v=19$m=1024,t=1000000000,p=4$c2FsdHNhbHQ$AAAAAAAAAAAAAAAAAAAAAA", "t=1000000000"),
        ("$argon2id$v=16$m=1024,t=1,p=4$c2FsdHNhbHQ$AAAAAAAAAAAAAAAAAAAAAA", "damaged"),
        ("$argon2id$", "damaged"), ("$2b$31$" + "a" * 53, "cost 31"), ("$2b$10$short", "damaged"),
        (M7.replace("$101$", "$1000000000$"), "iterations"), (M7.replace("$101$", "$0$"), "iterations"),
        (M7.replace("$101$", "$x$"), "iterations"), ("$7$101$AAAA", "4 parts"), ("$6$!!!$AAAA", "damaged"),
        (f"$6${SALT}$AAAA", "damaged"), (f"$6$${M6.split('$')[-1]}", "damaged"),
    ],
)  # fmt: skip
def test_a49_hashes_that_are_damaged_or_cost_too_much_are_refused(text: str, say: str) -> None:
    """A-49: before anything is computed."""
    with pytest.raises(BadHash) as caught:
        Hash(text)
    assert say in str(caught.value)
    assert text not in str(caught.value) or len(text) < 8


def test_a_file_of_users(tmp_path: Path) -> None:
    path = tmp_path / "passwords"
    path.write_bytes(f"# people\r\nalice:{BCRYPT}\r\nbob smith:{M7}\nüser:{M6}".encode())
    users = read_passwords(path)
    assert set(users) == {"alice", "bob smith", "üser"}
    assert users["üser"].verify(b"secret")


@pytest.mark.parametrize(
    ("text", "line", "say"),
    [
        (f"a:{M6}\n\nb:{M6}\n", 2, "blank"), (f"a:{M6}\nnocolon\n", 2, "no colon"), ("a:\n", 1, "empty"),
        (f":{M6}\n", 1, "name is empty"),
        (f"a:{M6}\nb:{M6}\na:{M7}\n", 3, "line 1"), ("a:secret\n", 1, "no known kind"),
        (f"a:{M6}\n   \n", 2, "blank"),
    ],
)  # fmt: skip
def test_a04_a_line_that_is_wrong_is_an_error_never_a_user(tmp_path: Path, text: str, line: int, say: str) -> None:
    """A-04: with its number."""
    path = tmp_path / "passwords"
    path.write_text(text)
    with pytest.raises(FileError) as caught:
        read_passwords(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert say in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_a48_slow_hashes_do_not_stop_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A-48: they are verified in threads, and no more than two at a time."""
    monkeypatch.setattr(passwords, "PATIENCE", 60)  # nobody is told busy
    verifier = Verifier(2)
    running = most = 0

    class Watched(Hash):
        def verify(self, password: bytes) -> bool:
            nonlocal running, most
            running += 1
            most = max(most, running)
            try:
                return super().verify(password)
            finally:
                running -= 1

    hash = Watched(hash_password("secret"))
    logins = [asyncio.create_task(verifier.verify(hash, b"wrong")) for _ in range(20)]
    turns = 0
    while not all(login.done() for login in logins):
        await asyncio.sleep(0.001)
        turns += 1
    assert not any([await login for login in logins])
    assert turns > 20, "the loop ran on"
    assert most <= 2
    verifier.close()


async def test_a48_a_password_whose_turn_comes_too_late_is_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """A-48: what one verification takes is a guess when others take the processors; who waited too long is told busy,
    before the login's deadline makes a failure of it."""
    monkeypatch.setattr(passwords, "PATIENCE", 0.05)
    verifier = Verifier(1)

    class Slow(Hash):
        def verify(self, password: bytes) -> bool:
            time.sleep(0.2)
            return True

    first, second = [asyncio.create_task(verifier.verify(Slow(BCRYPT), b"x")) for _ in range(2)]
    assert await first
    with pytest.raises(Busy):
        await second
    verifier.close()


async def test_a48_what_would_wait_too_long_is_told_busy_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passwords, "PATIENCE", 60)
    verifier = Verifier(1)
    verifier._took = 15
    go = threading.Event()

    class Held(Hash):
        def verify(self, password: bytes) -> bool:
            return go.wait(10) and super().verify(password)

    hash = Held(hash_password("secret"))
    logins = [asyncio.create_task(verifier.verify(hash, b"secret")) for _ in range(8)]
    await asyncio.sleep(0)
    assert [login.done() for login in logins] == [False] * 5 + [True] * 3, "60 s, and the one that is being verified"
    go.set()
    for login in logins[5:]:
        with pytest.raises(Busy):
            await login
    assert await asyncio.gather(*logins[:5]) == [True] * 5
    assert await verifier.verify(hash, b"secret"), "nothing is left behind"
    verifier.close()


# made by the systems named, or by the formula their documentation gives, for the password "secret"
B64 = {
    "ssha": base64.b64encode(hashlib.sha1(b"secretsalt").digest() + b"salt").decode(),
    "ssha256": base64.b64encode(hashlib.sha256(b"secretsalt").digest() + b"salt").decode(),
    "ssha512": base64.b64encode(hashlib.sha512(b"secretsalt").digest() + b"salt").decode(),
    "sha": base64.b64encode(hashlib.sha1(b"secret").digest()).decode(),
    "smd5": base64.b64encode(hashlib.md5(b"secretsalt").digest() + b"salt").decode(),
    "md5": base64.b64encode(hashlib.md5(b"secret").digest()).decode(),
}


def derived(mac: str, salt: bytes, iterations: int, length: int | None = None) -> bytes:
    return hashlib.pbkdf2_hmac(mac, b"secret", salt, iterations, length)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def ab64(data: bytes) -> str:
    return b64(data).rstrip("=").replace("+", ".")


SELF_DESCRIBING = {
    "mosquitto-go-auth": f"PBKDF2$sha512$100${b64(b'salt')}${b64(derived('sha512', b'salt', 100))}",
    "mosquitto-auth-plug": f"PBKDF2$sha256$901$5nH8dWZV${b64(derived('sha256', b'5nH8dWZV', 901, 24))}",
    "Django": f"pbkdf2_sha256$100$salt${b64(derived('sha256', b'salt', 100))}",
    "Django sha1": f"pbkdf2_sha1$100$salt${b64(derived('sha1', b'salt', 100))}",
    "Django argon2": "argon2" + hash_password("secret"),
    "Django bcrypt": "bcrypt$" + BCRYPT,
    "Django bcrypt_sha256": "bcrypt_sha256$"
    + bcrypt.hashpw(hashlib.sha256(b"secret").hexdigest().encode(), bcrypt.gensalt(4)).decode(),
    "Django scrypt": f"scrypt$1024$salt$8$1${b64(hashlib.scrypt(b'secret', salt=b'salt', n=1024, r=8, p=1, dklen=64))}",
    "Werkzeug": f"pbkdf2:sha256:100$salt${derived('sha256', b'salt', 100).hex()}",
    "Werkzeug scrypt": f"scrypt:1024:8:1$salt${hashlib.scrypt(b'secret', salt=b'salt', n=1024, r=8, p=1).hex()}",
    "passlib": f"$pbkdf2-sha256$100${ab64(b'salt')}${ab64(derived('sha256', b'salt', 100))}",
    "passlib scrypt": f"$scrypt$ln=10,r=8,p=1${ab64(b'salt')}"
    f"${ab64(hashlib.scrypt(b'secret', salt=b'salt', n=1024, r=8, p=1, dklen=32))}",
    "PHP": BCRYPT.replace("$2b$", "$2y$"),
    "SSHA": "{SSHA}" + B64["ssha"],
    "ssha": "{SSHA}" + B64["ssha"].rstrip("="),
    "SSHA256": "{SSHA256}" + B64["ssha256"],
    "SSHA512": "{SSHA512}" + B64["ssha512"],
    "SHA": "{SHA}" + B64["sha"],
    "SMD5": "{SMD5}" + B64["smd5"],
    "MD5": "{MD5}" + B64["md5"],
    "CRYPT": "{CRYPT}" + BCRYPT,
    "ARGON2": "{ARGON2}" + hash_password("secret"),
    "OpenLDAP pbkdf2": f"{{PBKDF2-SHA512}}100${ab64(b'salt')}${ab64(derived('sha512', b'salt', 100))}",
}


@pytest.mark.parametrize("system", SELF_DESCRIBING)
def test_hashes_of_other_systems(system: str) -> None:
    hash = Hash(SELF_DESCRIBING[system])
    assert hash.verify(b"secret")
    for wrong in (b"", b"Secret", b"secret\0", b"secretsalt", b"x" * 100):
        assert not hash.verify(wrong), wrong
    assert describes_itself(SELF_DESCRIBING[system])
    assert not hash.current
    for form in ("auto", "salt,sha256", "md5", "pbkdf2,sha256,1000,32"):
        assert Form(form).read(SELF_DESCRIBING[system], "ignored").verify(b"secret"), (
            "old and new may stand in one table"
        )


@pytest.mark.parametrize(
    ("text", "say"),
    [
        ("PBKDF2$sha512$1000000000$c2FsdA==$" + "A" * 88, "iterations"), ("PBKDF2$rot13$1$a$b", "PBKDF2$sha512"),
        ("pbkdf2_sha256$9999999999$salt$" + "A" * 44, "iterations"), ("pbkdf2_sha256$10$salt", "damaged"),
        ("pbkdf2_sha256$10$salt$AAAA", "3 bytes"), (f"pbkdf2:sha1:4000000$salt${'00' * 128}", "iterations"),
        ("scrypt:1073741824:8:1$salt$" + "00" * 64, "N is not"), ("scrypt:16777216:8:1$salt$" + "00" * 64, "KiB"),
        ("scrypt:1000:8:1$salt$" + "00" * 64, "power of two"), ("scrypt:1024:8:99$salt$" + "00" * 64, "p is not"),
        ("$scrypt$ln=30,r=8,p=1$c2FsdA$AAAAAAAAAAAAAAAA", "N is not"), ("{SSHA}" + B64["sha"], "damaged"),
        ("{SHA}" + B64["ssha"], "damaged"), ("{CRYPT}$1$abc$def", "no known kind"), ("{SSHA}!", "damaged"),
        ("{PBKDF2-SHA512}x", "iterations"), ("{ARGON2}$argon2id$v=19$m=4194304,t=3,p=4$c2FsdHNhbHQ$" + "A" * 22, "KiB"),
        ("bcrypt$$2b$31$" + "a" * 53, "cost 31"),
    ],
)  # fmt: skip
def test_a49_of_other_systems_too(text: str, say: str) -> None:
    with pytest.raises(BadHash) as caught:
        Hash(text)
    assert say in str(caught.value)
    assert text not in str(caught.value)


@pytest.mark.parametrize("name", ["md5", "sha", "sha256", "sha512"])
def test_columns_of_emq(name: str) -> None:
    def digest(data: bytes) -> str:
        return hashlib.new({"sha": "sha1"}.get(name, name), data).hexdigest()

    for text, stored, salt in (
        (name, digest(b"secret"), "ignored"), (name, digest(b"secret").upper(), None),
        (f"salt,{name}", digest(b"saltsecret"), "salt"), (f"salt,{name}", digest(b"secret"), None),
        (f"{name},salt", digest(b"secretsalt"), "salt"), (f"{name}:salt", digest(b"secretsalt"), b"salt"),
    ):  # fmt: skip
        for value in (stored, stored.encode()):
            hash = Form(text).read(value, salt)
            assert hash.quick
            assert hash.verify(b"secret"), text
            for wrong in (b"", b"Secret", b"secretsalt", b"saltsecret", b"secret\0"):
                assert not hash.verify(wrong), (text, wrong)
    with pytest.raises(BadHash, match="no password"):
        Form(name).read("")
    with pytest.raises(BadHash, match="not a"):
        Form(name).read("00")
    with pytest.raises(BadHash, match="hexadecimal"):
        Form(name).read("secret")


def test_the_empty_password_is_nobodys() -> None:
    for text in ("md5", "salt,sha256", "plain"):
        stored = {"md5": hashlib.md5(b"").hexdigest(), "salt,sha256": hashlib.sha256(b"salt").hexdigest(), "plain": " "}
        assert not Form(text).read(stored[text], "salt").verify(b"")


def test_columns_with_pbkdf2() -> None:
    for text in ("pbkdf2,sha256,1000,20", "pbkdf2:sha256:1000:20", "salt,pbkdf2,sha256,1000,20"):
        hash = Form(text).read(derived("sha256", b"salt", 1000, 20).hex(), "salt")
        assert not hash.quick
        assert hash.verify(b"secret")
        assert not hash.verify(b"Secret")
    assert Form("pbkdf2,sha512,10").read(derived("sha512", b"salt", 10).hex(), "salt").verify(b"secret")
    for stored, salt, say in (("00" * 32, "salt", "20 bytes"), ("00" * 20, "", "needs a salt")):
        with pytest.raises(BadHash, match=say):
            Form("pbkdf2,sha256,1000,20").read(stored, salt)


def test_a20_plain_must_be_written() -> None:
    """A-20: and compared byte for byte."""
    hash = Form("plain").read("Secret")
    assert hash.verify(b"Secret")
    assert not any(hash.verify(wrong) for wrong in (b"secret", b"", b"Secret "))
    assert Form("plain").weak
    for other in ("auto", "salt,sha256", "bcrypt"):
        with pytest.raises(BadHash):
            Form(other).read("Secret")
    assert Form("plain").read(hash_password("Secret")).verify(b"Secret"), "stored anew at login"


def test_columns_that_describe_themselves() -> None:
    assert Form("bcrypt").read(BCRYPT).verify(b"secret")
    assert Form("salt,bcrypt").read(BCRYPT, BCRYPT[:29]).verify(b"secret"), "EMQ's column with the salt besides"
    assert Form("argon2id").read(hash_password("secret")).verify(b"secret")
    assert Form("argon2id").read(hash_password("secret")).current


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ({"name": "sha256"}, "salt,sha256"), ({"name": "sha256", "salt_position": "suffix"}, "sha256,salt"),
        ({"name": "md5", "salt_position": "disable"}, "md5"), ({"name": "plain"}, "plain"),
        ({"name": "bcrypt", "salt_rounds": 10}, "bcrypt"),
        ({"name": "pbkdf2", "mac_fun": "sha256", "iterations": 4096}, "pbkdf2,sha256,4096"),
        ({"name": "pbkdf2", "mac_fun": "sha", "iterations": 10, "dk_length": 32}, "pbkdf2,sha,10,32"),
    ],
)  # fmt: skip
def test_emqx_5_writes_the_form_as_a_table(table: dict[str, object], text: str) -> None:
    assert Form.of(table) == Form(text)


@pytest.mark.parametrize(
    "text",
    ["", "rot13", "salt", "salt,salt", "sha256,salt,salt", "salt,plain", "pbkdf2", "pbkdf2,sha256", "pbkdf2,rot13,10",
     "pbkdf2,sha256,x", "pbkdf2,sha256,0", "pbkdf2,sha256,1000000000,32", "pbkdf2,sha256,10,4", "sha256,pepper"],
)  # fmt: skip
def test_forms_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        Form(text)
    for table in ({"name": text}, {"name": "sha256", "salt_position": "middle"}, {"name": "sha256", "rounds": 1}, {}):
        with pytest.raises(ValueError):
            Form.of(table)


def test_samples_cost_what_their_form_costs() -> None:
    for text, quick in (("md5", True), ("plain", True), ("bcrypt", False), ("pbkdf2,sha256,10", False), ("auto", False),
                        ("argon2id", False), ("scrypt", False)):  # fmt: skip
        sample = Form(text).sample()
        assert sample.quick is quick
        assert not sample.verify(b"secret")
        assert not sample.verify(b"")


async def test_quick_hashes_need_no_thread() -> None:
    verifier = Verifier(1)
    verifier.close()
    assert await verifier.verify(Form("md5").read(hashlib.md5(b"secret").hexdigest()), b"secret")
    with pytest.raises(RuntimeError):
        await verifier.verify(Hash(BCRYPT), b"secret")


def test_ways_to_hash() -> None:
    assert hash_password("x").startswith("$argon2id$")
    assert hash_password("x", "bcrypt").startswith("$2b$12$")
    with pytest.raises(ValueError, match="empty"):
        hash_password("")
    with pytest.raises(ValueError, match="md5"):
        hash_password("x", "md5")
