"""Creates the cluster's certificate authority, and a key and certificate for each of its programs, with
openssl.

Each cluster gets new ones. They are made in a new folder each time: if `up` is killed, its openssl process
goes on for a moment, and must not write among the files of the next `up`.
"""

import base64
import ipaddress
import subprocess
import tempfile
from pathlib import Path

from devcluster import ClusterError, configuration, needs

DAYS = 365
ELLIPTIC, RSA = ("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"), ("rsa:2048",)


def make(folder: Path) -> None:
    """Create `folder` with ca, apiserver, service-accounts and every user of configuration.USERS as .crt and
    .key files (0600)."""
    made = new_folder(folder)
    # `kubernetes.default` resolves to the first address.
    first_service = next(ipaddress.ip_network(configuration.SERVICES).hosts())
    names = [
        "kubernetes",
        "kubernetes.default",
        "kubernetes.default.svc",
        "kubernetes.default.svc.cluster.local",
        "localhost",
    ]
    server = [
        *(f"DNS:{name}" for name in names),
        *(f"IP:{address}" for address in ("127.0.0.1", configuration.NODE, first_service)),
    ]
    authority(made, "devcluster-ca")
    certificate(made, "service-accounts", "/CN=service-accounts")
    certificate(made, "apiserver", "/CN=kube-apiserver", f"subjectAltName={','.join(server)}")
    for user, (name, group) in configuration.USERS.items():
        certificate(
            made, user, f"/O={group}/CN={name}" if group else f"/CN={name}", "extendedKeyUsage=clientAuth"
        )
    made.rename(folder)


def make_webhook(folder: Path, authority_name: str, service: str, namespace: str) -> None:
    """Create `folder` with ca and tls for the webhook of a controller that checks its own certificates.

    Without them it makes its own, and waits 90 s until the kubelet has updated its Secret.
    """
    # Such a controller checks the authority under its name and reads only the traditional key format.
    made = new_folder(folder)
    authority(made, authority_name, f"subjectAltName=DNS:{authority_name}", key=RSA)
    run("rsa", "-traditional", "-in", f"{made}/ca.key", "-out", f"{made}/ca.key")
    certificate(made, "tls", f"/CN={service}", f"subjectAltName=DNS:{service}.{namespace}.svc")
    made.rename(folder)


def new_folder(folder: Path) -> Path:
    """A new folder (0700) beside `folder`, to be renamed to it when all files are written."""
    return Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))


def authority(folder: Path, name: str, *extensions: str, key: tuple[str, ...] = ELLIPTIC) -> None:
    """Write a self-signed ca.crt and ca.key."""
    request(folder, "ca", f"/CN={name}", key, "basicConstraints=critical,CA:TRUE", *extensions)


def certificate(folder: Path, name: str, subject: str, *extensions: str) -> None:
    """Write a certificate and key, signed by the authority in the same folder."""
    signer = ("-CA", f"{folder}/ca.crt", "-CAkey", f"{folder}/ca.key")
    request(folder, name, subject, ELLIPTIC, "basicConstraints=CA:FALSE", *extensions, signer=signer)


def request(
    folder: Path,
    name: str,
    subject: str,
    key: tuple[str, ...],
    *extensions: str,
    signer: tuple[str, ...] = (),
) -> None:
    files = ("-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.crt")
    added = [argument for extension in extensions for argument in ("-addext", extension)]
    run(
        "req",
        "-x509",
        "-newkey",
        *key,
        "-nodes",
        *files,
        "-days",
        str(DAYS),
        "-subj",
        subject,
        *signer,
        *added,
    )


def run(*arguments: str) -> None:
    ended = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise ClusterError(
            f"openssl {' '.join(arguments)} failed (version 3 is needed): {needs.last_lines(ended.stderr)}"
        )


def admin_kubeconfig(folder: Path) -> str:
    """The user's kubeconfig. It refers to no other file, so it can be copied."""
    data = {
        suffix: base64.b64encode((folder / suffix).read_bytes()).decode()
        for suffix in ("ca.crt", "admin.crt", "admin.key")
    }
    certificate = {"client-certificate-data": data["admin.crt"], "client-key-data": data["admin.key"]}
    return configuration.as_json(
        configuration.kubeconfig("admin", {"certificate-authority-data": data["ca.crt"]}, certificate)
    )
