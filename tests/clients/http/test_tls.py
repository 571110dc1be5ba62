"""TLS on loopback with a certificate authority made on the spot: verified always, and no key before it is."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.clients.fleet.test_fleet import IDS, QUICK
from tests.faults.server import KEY, FaultyServer, actual_logp
from topkd.clients import VllmCompletions
from topkd.topk.errors import FinalServerError

OPENSSL = shutil.which("openssl")
pytestmark = pytest.mark.skipif(OPENSSL is None, reason="certificates are made with the openssl command")


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run([str(OPENSSL), *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``ca.pem``, and certificates of it for ``here`` (127.0.0.1) and for ``elsewhere``."""
    folder = tmp_path_factory.mktemp("authority")
    new = ("-newkey", "rsa:2048", "-nodes")
    usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
    openssl(
        folder, "req", "-x509", *new, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=topkd", *usage
    )
    for name, place in (("here", "IP:127.0.0.1"), ("elsewhere", "DNS:elsewhere.example")):
        (folder / "ext").write_text(f"subjectAltName={place}\nauthorityKeyIdentifier=keyid\n")
        openssl(folder, "req", *new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "ext")
        openssl(folder, "x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
    return folder


def server(authority: Path, name: str) -> FaultyServer:
    up = FaultyServer()
    up.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    up.tls.load_cert_chain(authority / f"{name}.pem", authority / f"{name}.key")
    return up


async def test_a_certificate_nobody_vouches_for_is_final_and_no_key_is_sent(authority: Path):
    async with server(authority, "here") as up, VllmCompletions(up.url, model="t", api_key=KEY, config=QUICK) as client:
        with pytest.raises(FinalServerError, match=r"certificate is not trusted.*SSL_CERT_FILE") as caught:
            await client.score(IDS, 3, 4)
        assert KEY not in str(caught.value)
        assert up.headers == [], "not a byte of a request left before the certificate was believed"
        assert client.metrics["tries"] == 1


async def test_a_private_authority_named_by_the_environment_is_trusted(
    authority: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "ca.pem"))
    async with server(authority, "here") as up, VllmCompletions(up.url, model="t", api_key=KEY, config=QUICK) as client:
        assert np.array_equal((await client.score(IDS, 3, 4)).actual_logp, actual_logp(IDS, 3, 4))
        assert up.headers[-1]["authorization"] == f"Bearer {KEY}"


async def test_a_trusted_certificate_of_another_host_is_refused(authority: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(authority / "ca.pem"))
    async with (
        server(authority, "elsewhere") as up,
        VllmCompletions(up.url, model="t", api_key=KEY, config=QUICK) as client,
    ):
        with pytest.raises(FinalServerError, match="certificate is not trusted"):
            await client.score(IDS, 3, 4)
        assert up.headers == []


async def test_verification_is_only_off_when_the_config_says_so(authority: Path):
    config = QUICK.model_copy(update={"verify_tls": False})
    async with server(authority, "here") as up, VllmCompletions(up.url, model="t", config=config) as client:
        assert (await client.score(IDS, 3, 4)).rows == len(IDS) - 4
