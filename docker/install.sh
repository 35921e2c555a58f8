#!/bin/sh
# install.sh LOCK: installs exactly the packages of a lock file into /opt/venv, while an image is built.
set -eu
export SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt UV_LINK_MODE=copy UV_CACHE_DIR=/cache UV_PYTHON_DOWNLOADS=never
test -d /opt/venv || /opt/tools/bin/uv venv --quiet --python /usr/local/bin/python3.12 /opt/venv
# Compile now: the root file system is read-only later, and importing torch from source takes three times as long.
exec /opt/tools/bin/uv pip install --quiet --python /opt/venv --no-deps --no-build --require-hashes --compile-bytecode -r "$1"
