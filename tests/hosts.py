"""Hosts for the tests: Linux namespaces on this machine, each with a network and a name of its own.

Two hosts are joined by a link (veth) and see the same files. Nothing of them is left once the test's process has ended.
Root is not needed where the kernel allows user namespaces to all.
"""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TOOLS = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}  # and the packages that have them
ADDRESSES = {"one": "10.77.0.1", "two": "10.77.0.2"}
LINK = "wire"  # the network interface, on each host
# cat ends when this process does.
INIT = "hostname $0 && mount --bind $1 /etc/hosts && ip link set lo up && echo ready && exec cat"


class Host:
    """name: what it calls itself, and what the other one finds in /etc/hosts, the file `hosts`. owner: the host with
    which it shares its users."""

    def __init__(self, name: str, hosts: Path, owner: "Host | None" = None) -> None:
        self.name = name
        start = [*owner.enter("--user"), "unshare"] if owner else ["unshare", "--map-root-user"]
        command = [*start, "--net", "--uts", "--mount", "sh", "-c", INIT, name, str(hosts)]
        pipe = subprocess.PIPE
        self.keeper = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert self.keeper.stdout is not None
        assert self.keeper.stderr is not None
        if self.keeper.stdout.readline() != "ready\n":
            pytest.skip(f"namespaces cannot be made here: {self.keeper.stderr.read().strip()}")

    def enter(self, *kinds: str) -> list[str]:
        """What to write before a command so that it runs on this host, or only in these of its namespaces."""
        found = kinds or ("--user", "--net", "--uts", "--mount")
        return ["nsenter", "--target", str(self.keeper.pid), "--preserve-credentials", *found]

    def start(self, command: list[str], **options: Any) -> "subprocess.Popen[str]":
        """Starts a command. Killing it kills all that it has started, too."""
        alone = ["unshare", "--pid", "--fork", "--kill-child"]
        return subprocess.Popen([*self.enter(), *alone, *command], text=True, **options)

    def ip(self, *arguments: str) -> None:
        command = [*self.enter("--user", "--net"), "ip", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"`ip {' '.join(arguments)}` fails: {done.stderr.strip()}")

    def received(self) -> int:
        """Bytes that came over the link, with the headers of the network."""
        rows = [row.split() for row in Path(f"/proc/{self.keeper.pid}/net/dev").read_text().splitlines()]
        return next(int(row[1]) for row in rows if row[0] == f"{LINK}:")

    def plug(self, up: bool) -> None:
        """Cuts the link, without a word to the other host, or lays it again."""
        self.ip("link", "set", LINK, "up" if up else "down")


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """The hosts "one" and "two". Skips the test, with the reason, where they cannot be made."""
    for tool, package in TOOLS.items():
        if shutil.which(tool) is None:
            pytest.skip(f"there is no `{tool}`: apt install {package}")
    file, found = folder / "hosts", list[Host]()
    file.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in ADDRESSES.items()))
    try:
        for name in ADDRESSES:
            found.append(Host(name, file, found[0] if found else None))
        one, two = found
        one.ip("link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", str(two.keeper.pid))
        for host in found:
            host.ip("addr", "add", f"{ADDRESSES[host.name]}/24", "dev", LINK)
            host.plug(up=True)
        yield one, two
    finally:
        for host in found:
            host.keeper.kill()
            host.keeper.communicate()
