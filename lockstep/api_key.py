"""`lockstep api-key TENANT`: a new API key, and the line for the server's --api-keys file."""

import argparse
import hashlib
import secrets
import sys
from collections.abc import Sequence

_PREFIX = "lk-"
_MAX_TENANT_CHARS = 64


def main(argv: Sequence[str]) -> int:
    """Prints the key's line on stdout and the key, which is stored nowhere, on stderr."""
    parser = argparse.ArgumentParser(prog="lockstep api-key", description=__doc__)
    parser.add_argument("tenant", metavar="TENANT", help="whom the key is for")
    tenant = parser.parse_args(list(argv)).tenant
    if len(tenant.split()) != 1 or tenant.startswith("#") or len(tenant) > _MAX_TENANT_CHARS:
        parser.error(f"TENANT is {tenant!r}; it must be one word of at most {_MAX_TENANT_CHARS}")
    key = _PREFIX + secrets.token_urlsafe(32)
    print(f"{tenant} sha256:{hashlib.sha256(key.encode()).hexdigest()}")
    print(f"the key, shown this once: {key}", file=sys.stderr)
    return 0
