"""What of a URL may stand in a manifest, a log or a message."""

from __future__ import annotations

import re

_SECRETS = re.compile("sig|token|key|cred|secret|passw|auth|access", re.IGNORECASE)


def public_url(url: str) -> str:
    """The URL for a manifest or a log: without a user's name, and with signatures and keys blanked."""
    scheme, separator, place = url.partition("://")
    host, slash, path = place.partition("/")
    if not separator or ("@" not in host and "?" not in path):
        return url
    path, mark, query = path.partition("?")
    pairs = [pair.partition("=") for pair in query.split("&")]
    query = "&".join(name + equals + ("..." if _SECRETS.search(name) else value) for name, equals, value in pairs)
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}{mark}{query}"
