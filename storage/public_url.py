"""What of a URL may stand in a manifest, a log or a message, and what of it names an object."""

from __future__ import annotations

import re
from urllib.parse import quote, unquote_to_bytes, urlsplit

_SECRETS = re.compile("sig|token|key|cred|secret|passw|auth|access", re.IGNORECASE)
_CHAIN = re.compile(r"::(?=[a-z][a-z0-9+.-]*::?//|[a-z][a-z0-9+.-]*::)")  # between the file systems of one URL
_CODES = re.compile("(%[0-9a-fA-F]{2})+")
_WEB = ("http", "https")  # whose URLs have a query; elsewhere `?` is a character of a name
_WITHOUT_USERS = ("file", "local", "memory", "package", "az", "abfs", "abfss")  # of these, `@` is part of a name
# What signs a request, by the parameter that tells that one is signed in this way: it differs each time.
_SIGNING = {
    "x-amz-signature": re.compile("x-amz-.*"),
    "x-goog-signature": re.compile("x-goog-.*"),
    "signature": re.compile("awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id|x-amz-security-token"),
    "sig": re.compile("sig|s[erstv]|sp|spr|sip|ske|skoid|sks|skt|sktid|skv"),
}


def public_url(url: str) -> str:
    """The URL for a manifest or a log: without a user's name, and with signatures and keys blanked."""
    if _is_bare(url):
        return url
    return "::".join(map(_public, _CHAIN.split(url)))


def public_below(base: str, url: str) -> str:
    """The same of a URL that may be relative to `base`, which tells whether `?` begins a query in it."""
    is_web = base.startswith(tuple(f"{scheme}://" for scheme in _WEB)) and "://" not in url
    return public_url(f"http://-/{url}").removeprefix("http://-/") if is_web else public_url(url)


def object_url(url: str) -> str:
    """What names an object, whoever opens it and however: its public URL without what signs a request for it."""
    return public_url(unsigned_url(url))


def unsigned_url(url: str) -> str:
    """The URL without a user's name and without what signs a request, but with all else that opens it.

    The path of a web address is written out: its percent codes stand for no more than what would end it.
    """
    if _is_bare(url):
        return url
    scheme, host, path, query = _split(url)
    if scheme.removesuffix("://") in _WEB:
        path = _CODES.sub(_written_out, path)
    pairs = query.split("&") if query else []
    names = {pair.partition("=")[0].lower() for pair in pairs}
    signing = [pattern for mark, pattern in _SIGNING.items() if mark in names]
    kept = [pair for pair in pairs if not any(one.fullmatch(pair.partition("=")[0].lower()) for one in signing)]
    return f"{scheme}{_without_user(scheme, host)}{path}{'?' if kept else ''}{'&'.join(kept)}"


def without_query(url: str) -> str:
    """The URL without the query of a web address."""
    return url if _is_bare(url) else "".join(_split(url)[:3])


def path_of(url: str) -> str:
    """The path of a web address, which its extension ends; of any other URL all."""
    if _is_bare(url):
        return url
    parts = urlsplit(url)
    return parts.path if parts.scheme in _WEB else url


def with_user(url: str, signed: str) -> str:
    """The URL with the user's name and password of another one for the same place; as it is where they differ in it."""
    (scheme, host, _, _), (other, named, _, _) = _split(url), _split(signed)
    is_same = (scheme, host) == (other, _without_user(other, named))
    return f"{scheme}{named}{url[len(scheme) + len(host) :]}" if is_same else url


def _is_bare(url: str) -> bool:
    """Whether nothing in it can be a user's name, a query or a chain: true of most of a million listed objects."""
    return "@" not in url and "::" not in url and url[:4].lower() != "http"


def _split(url: str) -> tuple[str, str, str, str]:
    """Scheme with its `://`, host with a user's name, path, and the query of a web address."""
    scheme, separator, place = url.partition("://")
    if not separator:
        return "", "", url, ""
    query = ""
    if scheme in _WEB:
        place, _, query = place.partition("?")
    host, slash, path = place.partition("/")
    return scheme + separator, host, slash + path, query


def _written_out(codes: re.Match[str]) -> str:
    try:
        text = unquote_to_bytes(codes[0]).decode()
    except UnicodeDecodeError:
        return codes[0]
    return "".join(quote(one, safe="") if one in "%/?#" or not one.isprintable() else one for one in text)


def _without_user(scheme: str, host: str) -> str:
    return host if scheme.removesuffix("://") in _WITHOUT_USERS else host.rpartition("@")[2]


def _public(url: str) -> str:
    scheme, host, path, query = _split(url)
    pairs = [pair.partition("=") for pair in query.split("&")] if query else []
    query = "&".join(name + equals + ("..." if _SECRETS.search(name) else value) for name, equals, value in pairs)
    return f"{scheme}{_without_user(scheme, host)}{path}{'?' if query else ''}{query}"
