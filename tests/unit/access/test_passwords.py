"""Password hashes and the files that hold them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from pathlib import Path

import bcrypt
import pytest

from broker.access.password_file import read_passwords
from broker.access.passwords import BadHash, Hash, Verifier, hash_password
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
        ("", "empty"), ("plain", "no known kind"), ("$1$abc$def", "no known kind"), ("{SSHA}abc", "no known kind"),
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
    path = tmp_path / "passwords"
    path.write_text(text)
    with pytest.raises(FileError) as caught:
        read_passwords(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert say in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_a48_slow_hashes_do_not_stop_the_loop() -> None:
    verifier = Verifier(2)
    hash = Hash(hash_password("secret"))
    loop = asyncio.get_running_loop()
    logins = [asyncio.create_task(verifier.verify(hash, b"wrong")) for _ in range(20)]
    worst, last = 0.0, loop.time()
    while not all(login.done() for login in logins):
        await asyncio.sleep(0.001)
        worst, last = max(worst, loop.time() - last), loop.time()
    assert not any([await login for login in logins])
    assert worst < 0.5, "the loop ran on"
    verifier.close()


def test_ways_to_hash() -> None:
    assert hash_password("x").startswith("$argon2id$")
    assert hash_password("x", "bcrypt").startswith("$2b$12$")
    with pytest.raises(ValueError, match="empty"):
        hash_password("")
    with pytest.raises(ValueError, match="md5"):
        hash_password("x", "md5")
