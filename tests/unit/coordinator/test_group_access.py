"""Files by which a coordinator proves itself, where they are not as they must be."""

from pathlib import Path

import pytest

from coordinator.errors import StartRefused
from coordinator.group_access import GroupAccess
from lockstep.daemon.exit_codes import ExitCode
from lockstep.daemon.tls_files import TlsFiles


def test_a_secret_that_cannot_be_read_stops_the_start_naming_the_file(tmp_path: Path) -> None:
    with pytest.raises(StartRefused, match="no-such-secret") as refused:
        GroupAccess.read(None, str(tmp_path / "no-such-secret"))
    assert refused.value.exit_code == ExitCode.CONFIG


def test_a_certificate_that_cannot_be_read_stops_the_start_naming_the_file(tmp_path: Path) -> None:
    missing = tmp_path / "no-such-cert"
    with pytest.raises(StartRefused, match="no-such-cert") as refused:
        GroupAccess.read(TlsFiles(missing, missing, missing), "")
    assert refused.value.exit_code == ExitCode.CONFIG
