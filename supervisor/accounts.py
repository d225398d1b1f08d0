"""Users and groups of the machine. Every question may block: the database may be on another machine."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from supervisor.errors import SpawnFailed, did_you_mean
from supervisor.spec import shown


@dataclass(frozen=True)
class User:
    """A user: its number, its own group (None where nothing is known of it), and what its environment says of it."""

    uid: int
    gid: int | None
    name: str = ""
    environment: dict[str, str] = field(default_factory=dict)


class Identity(NamedTuple):
    """Whom a process runs as; `groups` are all its supplementary groups."""

    uid: int
    gid: int
    groups: tuple[int, ...]


def identity_of(user: str | None, group: str | None, groups: Sequence[str]) -> Identity | None:
    """Whom a child runs as; None where that is who we are.

    Raises SpawnFailed for a user or a group that is not there, and where only root might do it.
    """
    if user is None and group is None and not groups:
        return None
    who = user_of(user)
    gid = who.gid if group is None else gid_of(group)
    if gid is None:
        raise SpawnFailed(f"nothing is known of the user {who.uid}, so its group must be given: group")
    more = [gid_of(each) for each in groups]
    if os.geteuid() != 0:
        if who.uid == os.geteuid() and gid == os.getegid() and {gid, *os.getgroups()}.issuperset(more):
            return None
        raise SpawnFailed("only root may run a job as another user, or in other groups")
    own = os.getgroups() if user is None else os.getgrouplist(who.name, gid) if who.name else [gid]
    return Identity(who.uid, gid, tuple(dict.fromkeys([*own, *more])))


def user_of(account: str | None) -> User:
    """The user of this name or number; our own for None. Raises SpawnFailed for a name that nobody has."""
    try:
        found = pwd.getpwnam(account) if account is not None and not account.isdecimal() else pwd.getpwuid(_number(account))
    except KeyError:
        if account is None or account.isdecimal():
            return User(_number(account), None)
        known = [entry.pw_name for entry in pwd.getpwall()]
        raise SpawnFailed(f'no user "{shown(account)}"{did_you_mean(account, known)}') from None
    environment = {"HOME": found.pw_dir, "USER": found.pw_name, "LOGNAME": found.pw_name, "SHELL": found.pw_shell or "/bin/sh"}
    return User(found.pw_uid, found.pw_gid, found.pw_name, environment)


def gid_of(account: str) -> int:
    """The number of this group. Raises SpawnFailed for a name that no group has."""
    if account.isdecimal():
        return int(account)
    try:
        return grp.getgrnam(account).gr_gid
    except KeyError:
        known = [entry.gr_name for entry in grp.getgrall()]
        raise SpawnFailed(f'no group "{shown(account)}"{did_you_mean(account, known)}') from None


def _number(account: str | None) -> int:
    return os.geteuid() if account is None else int(account)
