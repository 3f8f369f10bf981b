"""How the coordinator reaches the workers of a group, and proves itself to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from coordinator.errors import StartRefused
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.flags import FlagError
from lockstep.daemon.group_secret import TOKEN_KEY, join_token, read_group_secret
from lockstep.daemon.tls_files import TlsFileError, TlsFiles, TlsMaterial, read_tls_files


@dataclass(frozen=True)
class GroupAccess:
    """What a coordinator shows to every worker; by default nothing, in the clear."""

    tls: TlsMaterial | None = None
    secret: bytes | None = field(default=None, repr=False)

    @classmethod
    def read(cls, tls: TlsFiles | None, secret_path: str) -> GroupAccess:
        """Reads the files as they are now. Raises StartRefused."""
        try:
            material = None if tls is None else read_tls_files(tls, is_server=False)
            return cls(material, read_group_secret(secret_path))
        except (FlagError, TlsFileError) as error:
            raise StartRefused(ExitCode.CONFIG, str(error)) from error

    def channel(self, address: str, options: Sequence[tuple[str, Any]]) -> Any:
        """A grpc.aio channel; with TLS the worker must be of our CA and of the name dialled."""
        if self.tls is None:
            return grpc.aio.insecure_channel(address, options=options)
        credentials = grpc.ssl_channel_credentials(self.tls.ca, self.tls.key, self.tls.cert)
        return grpc.aio.secure_channel(address, credentials, options=options)

    def metadata(self, epoch: int) -> tuple[tuple[str, str], ...]:
        """What goes with every call of that epoch."""
        return () if self.secret is None else ((TOKEN_KEY, join_token(self.secret, epoch)),)
