"""Which of the configured groups an entry of a directory belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.connectors import ldap
from broker.extend.auth import BackendUnavailable, note

if TYPE_CHECKING:
    from auth.ldap import LdapConfig

DEPTH = 10
"""Levels of groups in groups that are followed."""
MANY = 1_000
"""Groups of one entry that are looked at."""
BATCH = 20
"""Groups asked about in one search."""

IN_CHAIN = "1.2.840.113556.1.4.1941"
ACTIVE_DIRECTORY = "1.2.840.113556.1.4.800"
PRIMARY_GROUP = ("objectSid", "primaryGroupID")
"""Attributes of an entry of Active Directory that tell its primary group, of which it is no `member`."""


class TooManyGroups(Exception):
    """More groups than are looked at; a denial might be among those left out."""


async def find_groups(config: LdapConfig, searcher: ldap.Searcher, entry: ldap.Entry, username: str) -> list[str]:
    """Names of the `groups` tables the entry belongs to, in their order. Raises TooManyGroups rather than leave one
    out."""
    try:
        if config.nested_groups == "memberof":
            found = await _memberof(searcher, entry)
        elif config.nested_groups == "ad":
            found = await _active_directory(config, searcher, entry)
        else:
            found = await _walk(config, searcher, entry, username)
    except ldap.TooMany as error:
        raise TooManyGroups(str(error)) from None
    return [name for name, group in config.groups.items() if ldap.normalize_dn(group.dn) in found]


async def _walk(config: LdapConfig, searcher: ldap.Searcher, entry: ldap.Entry, username: str) -> set[str]:
    base = config.group_base_dn or common_base([group.dn for group in config.groups.values()])
    query = config.group_filter.render({"dn": entry.dn, "username": username}, escape=ldap.escape)
    level = await searcher.find(base, query, limit=MANY)
    found = {ldap.normalize_dn(group.dn) for group in level}
    note(f"{query} finds {len(level)} groups below {base}")
    depth = 1
    while config.nested_groups == "walk" and level and depth < DEPTH:
        above: list[ldap.Entry] = []
        for start in range(0, len(level), BATCH):
            members = "".join(
                f"(member={ldap.escape(group.dn)})(uniqueMember={ldap.escape(group.dn)})"
                for group in level[start : start + BATCH]
            )
            above += await searcher.find(base, f"(|{members})", limit=MANY)
        level = []
        for group in above:
            name = ldap.normalize_dn(group.dn)
            if name not in found:  # a circle of groups ends here
                found.add(name)
                level.append(group)
        depth += 1
        if len(found) > MANY:
            raise TooManyGroups(f"in more than {MANY} groups")
    return found


async def _memberof(searcher: ldap.Searcher, entry: ldap.Entry) -> set[str]:
    waiting = _member_of(entry)
    found: set[str] = set()
    for _ in range(DEPTH):
        above: list[str] = []
        for dn in waiting:
            name = ldap.normalize_dn(dn)
            if name in found:
                continue
            found.add(name)
            if len(found) > MANY:
                raise TooManyGroups(f"in more than {MANY} groups")
            for group in await searcher.find(dn, "(objectClass=*)", ["memberOf"], scope="base", limit=1):
                above += _member_of(group)
        if not above:
            break
        waiting = above
    return found


def _member_of(entry: ldap.Entry) -> list[str]:
    """The groups an entry names; some servers give no more than a part of very many (``memberOf;range=0-1499``)."""
    if any(name.startswith("memberof;range=") for name in entry.attributes):
        raise TooManyGroups("in more groups than the directory lists at once")
    return entry.texts("memberOf")


async def _active_directory(config: LdapConfig, searcher: ldap.Searcher, entry: ldap.Entry) -> set[str]:
    root = await searcher.find("", "(objectClass=*)", ["supportedCapabilities"], scope="base", limit=1)
    if not root or ACTIVE_DIRECTORY not in root[0].texts("supportedCapabilities"):
        # other servers answer the rule with silence, which must not be taken for "in no group"
        raise BackendUnavailable('nested_groups = "ad", but the server is no Active Directory; use "walk"')
    base = config.group_base_dn or common_base([group.dn for group in config.groups.values()])
    primary = await _primary_group(searcher, entry)
    members = "".join(f"(member:{IN_CHAIN}:={ldap.escape(dn)})" for dn in (entry.dn, primary))
    groups = await searcher.find(base, f"(|{members})", limit=MANY)
    note(f"its primary group is {primary}; with it, the entry is in {len(groups)} groups below {base}")
    return {ldap.normalize_dn(primary), *(ldap.normalize_dn(group.dn) for group in groups)}


async def _primary_group(searcher: ldap.Searcher, entry: ldap.Entry) -> str:
    """The DN of the group whose number the entry holds; it is in the entry's own domain."""
    sids, numbers = entry.attributes.get("objectsid", []), entry.texts("primaryGroupID")
    if len(sids) != 1 or len(sids[0]) < 12 or len(numbers) != 1 or not numbers[0].isascii() or not numbers[0].isdigit():
        raise BackendUnavailable(f"{entry.dn} does not show its primaryGroupID; bind_dn needs the right to read it")
    sid = sids[0][:-4] + int(numbers[0]).to_bytes(4, "little")
    domain = ",".join(part for part in ldap.split_dn(entry.dn) if part.casefold().startswith("dc="))
    value = "".join(f"\\{byte:02x}" for byte in sid)
    found = await searcher.find(domain, f"(objectSid={value})", limit=1)
    if not found:
        raise BackendUnavailable(f"the primary group of {entry.dn} cannot be found below {domain}")
    return found[0].dn


def common_base(dns: list[str]) -> str:
    """The longest DN all of these lie below."""
    first, *others = [ldap.split_dn(dn)[1:] for dn in dns]
    common: list[str] = []
    for back in range(1, len(first) + 1):
        part = first[-back]
        if any(len(other) < back or ldap.normalize_dn(other[-back]) != ldap.normalize_dn(part) for other in others):
            break
        common.insert(0, part)
    return ",".join(common)
