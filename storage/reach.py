"""What a URL that data name may reach: what is beside the file that names it, public web servers, what a recipe allows.

In: the URL of a file of records, and the prefixes that its source allows. Out: whether a URL is within them, by its
text here, and by the address that its host turns out to have in `storage.web_client`.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote, urlsplit

from storage.errors import BadData
from storage.packages import package_folder
from storage.public_url import public_url

PUBLIC_WEB = ("http://", "https://")
"""Prefixes without a host: every web server that has a public address."""

Place = Literal["own", "allowed", "public"]
"""own: on the host of the file of records itself. allowed: on a host that the recipe names. public: neither, so that
only a public address may be connected to."""

_ONE_STORE = {"gcs": "gs", "abfs": "az", "abfss": "az", "s3a": "s3"}  # schemes of the same buckets
_PORTS = {"http": 80, "https": 443}
# Reserved ranges that ipaddress calls global in some versions of Python: the first has a metadata service of a cloud,
# and the single address, which is registered as public, is another's.
_NEVER_V4 = tuple(map(ipaddress.IPv4Network, ("192.0.0.0/24", "168.63.129.16/32")))
_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
_NEVER_V6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


@dataclass(frozen=True)
class Reach:
    """What the records of a file may name. home: the file's URL. allowed: URL prefixes beyond what is beside it."""

    home: str
    allowed: tuple[str, ...] = PUBLIC_WEB

    def checked(self, url: str) -> str:
        """The URL to open for an absolute one, with symbolic links followed. Raises BadData where it is out of reach.

        Of a web server only the scheme and the host are checked: each request checks its address with `place_on_web`.
        """
        scheme, _, place = scheme_and_place(url)
        if scheme in PUBLIC_SCHEMES:
            return url
        if scheme in ("", "file"):
            path = os.path.realpath(place)
            if any(_is_below(path, os.path.realpath(root)) for root in self._roots()):
                return path
        elif scheme == "package":
            folder = os.path.realpath(package_folder(url))
            path = os.path.realpath(os.path.join(folder, place.partition("/")[2]))
            if _is_below(path, folder) and self._has_prefix_of(url):
                return url
        elif ".." not in place.split("/") and self._has_prefix_of(_named(url)):
            return url
        raise self._refusal(url)

    def place_on_web(self, scheme: str, host: str, port: int | None, path: str) -> Place:
        """Whose web server it is. Raises BadData where records may not name one."""
        where = scheme, host.lower().rstrip("."), port or _PORTS.get(scheme)
        if where == _origin(self.home):
            return "own"
        named = [prefix for prefix in self.allowed if _origin(prefix) == where]
        parts = unquote(path)
        if ".." not in parts.split("/") and any(_is_below(parts, urlsplit(prefix).path) for prefix in named):
            return "allowed"
        if scheme in PUBLIC_SCHEMES and f"{scheme}://" in self.allowed:
            return "public"
        raise self._refusal(f"{scheme}://{host}{f':{port}' if port not in (None, _PORTS.get(scheme)) else ''}{path}")

    def _has_prefix_of(self, url: str) -> bool:
        """Whether a URL is in the bucket or package of the file of records, or below what is allowed."""
        scheme, _, place = scheme_and_place(self.home)
        own = f"{scheme}://{place.partition('/')[0]}/"
        return any(_is_below(url, _named(prefix)) for prefix in (own, *self.allowed) if "://" in prefix)

    def _roots(self) -> list[str]:
        """The same of this machine: the folder of the file of records."""
        roots = [prefix.removeprefix("file://") for prefix in self.allowed if _is_local(prefix)]
        return [os.path.dirname(self.home.removeprefix("file://")), *roots] if _is_local(self.home) else roots

    def _refusal(self, url: str) -> BadData:
        beside = "folder" if _is_local(self.home) else "host" if _origin(self.home) else "bucket or package"
        return BadData(
            f"{public_url(url)}: not read for a record: it is outside the {beside} of the file that names it, and its "
            f"source's media_from does not allow it"
        )


PUBLIC_SCHEMES = frozenset(_PORTS)


def scheme_and_place(url: str) -> tuple[str, str, str]:
    """The parts of a URL before and after its `://`: the last one, of a chain's last file system. A web address, which
    is of no chain, may have others in its path and query.
    """
    return url.partition("://") if url.lower().startswith(PUBLIC_WEB) else url.rpartition("://")


def is_public(address: str) -> bool:
    """Whether an IP address, as a socket has it, is one of the public Internet: unicast, and not this machine's, its
    network's, its cloud's or a reserved one, in whichever way of writing one address inside another.
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not ip.is_multicast and not any(ip in network for network in _NEVER_V4)
    inside = ip.ipv4_mapped or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
    if inside is not None:
        return is_public(str(inside))
    return ip in _UNICAST_V6 and ip.is_global and not any(ip in network for network in _NEVER_V6)


def _is_local(url: str) -> bool:
    return "://" not in url or url.startswith("file://")


def _named(url: str) -> str:
    """A bucket's URL with one scheme for each kind of store."""
    scheme, separator, place = url.rpartition("://")
    return f"{_ONE_STORE.get(scheme, scheme)}{separator}{place}"


def _origin(url: str) -> tuple[str, str, int | None] | None:
    """Scheme, host and port of a web address that has a host."""
    parts = urlsplit(url) if url.startswith(PUBLIC_WEB) else None
    if parts is None or not parts.hostname:
        return None
    return parts.scheme, parts.hostname.rstrip("."), parts.port or _PORTS[parts.scheme]


def _is_below(path: str, root: str) -> bool:
    """Whether a path is a root or below it; what only begins with the same letters is not."""
    return path == root or path.startswith(root.rstrip("/") + "/")
