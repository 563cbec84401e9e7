"""A SuperLink and SuperNodes on this machine as processes of their own, with certificates and keys made here."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import limits
import retain
from retain.commands.superlink import surroundings

BIN = Path(sys.executable).parent
PEM, DAY = serialization.Encoding.PEM, datetime.timedelta(days=1)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def certificates(folder: Path, *, now: datetime.datetime | None = None) -> Path:
    """A CA and a server's certificate for this machine: ca.crt, server.pem, server.key."""
    folder.mkdir(parents=True)
    now = now or datetime.datetime.now(datetime.UTC)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"retain test {folder.name}")])
    me = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])

    def made(
        subject: x509.Name, public: ec.EllipticCurvePublicKey, of: x509.ExtensionType, critical: bool
    ) -> bytes:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(ca).public_key(public)
        builder = builder.serial_number(x509.random_serial_number())
        builder = (
            builder.not_valid_before(now - DAY).not_valid_after(now + 30 * DAY).add_extension(of, critical)
        )
        if subject == ca:
            usage = dict.fromkeys(
                ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
                 "encipher_only", "decipher_only"), False,
            )  # fmt: skip
            builder = builder.add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), True)
        return builder.sign(ca_key, hashes.SHA256()).public_bytes(PEM)

    names = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    )
    (folder / "ca.crt").write_bytes(made(ca, ca_key.public_key(), x509.BasicConstraints(True, None), True))
    (folder / "server.pem").write_bytes(made(me, key.public_key(), names, False))
    secret = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "server.key").write_bytes(secret)
    return folder


def node_key(path: Path) -> Path:
    """A SuperNode's key pair, as ssh-keygen writes it."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(
        key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public)
    return path


@dataclass
class Loop:
    """A federation on loopback. Everything that it starts has a group of its own, and is ended by `close`."""

    work: Path
    certs: Path | None = None
    port: int = field(default_factory=free_port)
    children: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def trust(self) -> list[str]:
        return ["--root-certificates", str(self.certs / "ca.crt")] if self.certs else ["--insecure"]

    @property
    def env(self) -> dict[str, str]:
        source = str(Path(retain.__file__).parent.parent)
        return {**surroundings(self.work / "home"), "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}

    def start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        """A process whose output is in NAME.log."""
        (self.work / "home").mkdir(parents=True, exist_ok=True)
        with (self.work / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True)
        self.children[name] = child
        return child

    def link(self) -> None:
        """The SuperLink, waited for."""
        c = self.certs
        trust = ["--insecure"]
        if c:
            trust = ["--ssl-ca-certfile", str(c / "ca.crt"), "--ssl-certfile", str(c / "server.pem")]
            trust += ["--ssl-keyfile", str(c / "server.key"), "--enable-supernode-auth"]
        self.start("link", [
            str(BIN / "flower-superlink"), *trust, "--host", "127.0.0.1", "--port", str(self.port),
            "--database", str(self.work / "state.db"), "--disable-runtime-dependency-installation",
        ])  # fmt: skip
        self.until("the SuperLink listens", self._listens)

    def _listens(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 1.0) as plain:
                if self.certs:
                    context = ssl.create_default_context(cafile=str(self.certs / "ca.crt"))
                    context.wrap_socket(plain, server_hostname="127.0.0.1").close()
                return True
        except OSError:
            return False

    def register(self, key: Path) -> None:
        """Let a node's key in."""
        home = self.work / "home"
        trust = f'root-certificates = "{self.certs}/ca.crt"' if self.certs else "insecure = true"
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "loop"\n\n[superlink.loop]\naddress = "127.0.0.1:{self.port}"\n{trust}\n'
        )
        command = [str(BIN / "flwr"), "supernode", "register", str(key.with_suffix(".pub")), "loop"]
        limits.finished(command, limits.FEDERATION, "FEDERATION", env=self.env, check=True)

    def retain(self, *words: str) -> list[str]:
        """The command, with this federation's address."""
        address = ["--superlink", f"127.0.0.1:{self.port}", *self.trust]
        return [sys.executable, "-m", "retain.cli", "federate", *words, *address]

    def log(self, name: str) -> str:
        return (self.work / f"{name}.log").read_text(errors="replace")

    def until(self, what: str, there: Callable[[], bool], *alive: str) -> None:
        """Wait; a child that ends meanwhile, or too long a wait, fails with what was said."""

        def done() -> bool:
            if there():
                return True
            dead = [n for n in alive if self.children[n].poll() is not None]
            assert not dead, f"{dead[0]} ended: {self.log(dead[0])[-3000:]}"
            return False

        said = lambda: (what, [self.log(n)[-1000:] for n in self.children])  # noqa: E731
        limits.until(done, limits.FEDERATION, "FEDERATION", said)

    def kill(self, name: str, how: int = signal.SIGKILL) -> None:
        """A process with all that it started."""
        child = self.children.pop(name)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, how)
        child.wait(60)

    def close(self) -> None:
        for name in list(self.children):
            self.kill(name)


def rounds(run: Path) -> list[dict[str, object]]:
    """The events of whole rounds so far."""
    file = run / "events.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return [e for e in found if e["kind"] == "round"]


def processes_of(folder: Path) -> list[str]:
    """Command lines of living processes that name a folder; where there is no /proc nobody can say."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            found += [line] if str(folder) in line and int(file.parent.name) != os.getpid() else []
    return found
