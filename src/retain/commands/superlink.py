"""The connection to a SuperLink, tried once before Flower's programs are started; and what these need around them.

Flower tries again for ever where nobody listens. Here an address, a certificate or a missing program is one sentence.
"""

from __future__ import annotations

import json
import os
import socket
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path

from retain.federated.flower import flower
from retain.types import RetainError

PATIENCE = 10.0
"""Seconds for a first connection."""

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
"""Flower's programs tell nobody about the run, and ask nobody for a newer version."""


@dataclass(frozen=True)
class Link:
    """A SuperLink: where it is, and how it is trusted. `roots`: the CA's certificate; None with `insecure`."""

    host: str
    port: int
    roots: Path | None
    insecure: bool

    @staticmethod
    def parse(address: str, roots: Path | None, insecure: bool) -> Link:
        """From the command's options."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise RetainError(f"--superlink: {address!r:.80}: write host:port, such as fed.example.org:8000")
        if insecure and roots is not None:
            raise RetainError(
                "--insecure: without TLS there is nothing to verify; leave out --root-certificates"
            )
        if roots is not None and not roots.is_file():
            raise RetainError(f"--root-certificates: no such file {roots}")
        return Link(host.strip("[]"), int(port), roots.resolve() if roots else None, insecure)

    @property
    def address(self) -> str:
        """As Flower wants it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def reach(self) -> None:
        """Connect once. RetainError that says what is wrong: nobody listens, another CA, no TLS there."""
        try:
            with socket.create_connection((self.host, self.port), PATIENCE) as plain:
                self._greet(plain)
        except (ssl.SSLError, RetainError):
            raise
        except OSError as error:
            raise RetainError(
                f"--superlink: {self.address} cannot be reached ({error.strerror or error}); is flower-superlink running "
                "there, and the port open?"
            ) from None

    def _greet(self, plain: socket.socket) -> None:
        context = self._context()
        try:
            with context.wrap_socket(plain, server_hostname=self.host):
                speaks = True
        except ssl.SSLCertVerificationError as error:
            clock = "; is this machine's clock right?" if error.verify_code in (9, 10) else ""
            raise RetainError(
                f"--root-certificates: the certificate of {self.address} is not one that "
                f"{self.roots or 'this machine'} vouches for ({error.verify_message}){clock}"
            ) from None
        except (ssl.SSLError, OSError):  # no TLS there: reset, an answer in plain HTTP, or none
            speaks = False
        if speaks and self.insecure:
            raise RetainError(f"--insecure: {self.address} speaks TLS; give its CA with --root-certificates")
        if not speaks and not self.insecure:
            raise RetainError(
                f"--superlink: {self.address} speaks no TLS; give it certificates, or add --insecure"
            )

    def _context(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=str(self.roots) if self.roots else None)
        except ssl.SSLError as error:
            raise RetainError(
                f"--root-certificates: {self.roots} holds no certificate in PEM ({error.reason})"
            ) from None
        if self.insecure:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context

    def toml(self) -> str:
        """As an entry of Flower's address book."""
        trust = "insecure = true" if self.insecure else ""
        if self.roots:
            trust = f"root-certificates = {json.dumps(str(self.roots))}"
        return f'[superlink]\ndefault = "retain"\n\n[superlink.retain]\naddress = "{self.address}"\n{trust}\n'

    def arguments(self) -> list[str]:
        """For flower-supernode."""
        trust = ["--insecure"] if self.insecure else []
        return [
            "--superlink",
            self.address,
            *trust,
            *(["--root-certificates", str(self.roots)] if self.roots else []),
        ]


def program(name: str) -> str:
    """One of Flower's programs, beside this Python."""
    flower()
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise RetainError(
            f"federated: {name} is not beside {sys.executable}; pip install 'retain[federated]' there"
        )
    return str(path)


def surroundings(home: Path) -> dict[str, str]:
    """The environment of Flower's programs: they start each other by name, and keep what they install under `home`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **QUIET, "PATH": path, "FLWR_HOME": str(home)}
