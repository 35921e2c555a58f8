#!/usr/bin/env bash
# base.sh TAG: a base image for machines that reach no registry, from Debian's packages and this machine's Python 3.12. For
# developers: docker/image.lock names the base of images for others. Needs root, Debian, debootstrap, binutils, `make setup`, docker.
set -euo pipefail
cd "$(dirname "$0")/.."
tag=${1:?usage: docker/base.sh TAG}
engine=${ENGINE:-docker}
prefix=$(.venv/bin/python -c 'import sys; print(sys.base_prefix)')
release=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)   # the libraries that this Python was linked with
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

mapfile -t libraries < <(find "$prefix"/lib/python3.12/lib-dynload -name '*.so' ! -name '_tkinter*' -exec ldd {} + | awk '$2 == "=>" && $3 ~ "^/(usr/)?lib/" {print $3}' | sort -u)
packages=$(for library in "${libraries[@]}"; do dpkg-query --search "$library" "/usr$library" 2>/dev/null || true; done | cut -d: -f1 | sort -u | paste -sd,)
debootstrap --variant=minbase --include="ca-certificates,netbase,tzdata,$packages" "$release" "$root" >/dev/null

# As in Debian's own image: apt keeps nothing that it can download again.
cat >"$root/etc/apt/apt.conf.d/docker-clean" <<'END'
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
END
# As in the official image: no tests, no bytecode, no static library, and pip afresh.
tar -C "$prefix" -c --exclude=__pycache__ --exclude='lib/python3.12/site-packages/*' --exclude='lib/python3.12/config-3.12*' \
  --exclude=lib/python3.12/{test,idlelib,tkinter,turtledemo} --exclude=_tkinter* --exclude='*.a' \
  bin/python3.12 include lib | tar -C "$root/usr/local" -x --no-same-owner
for name in python python3; do ln -s python3.12 "$root/usr/local/bin/$name"; done
find "$root/usr/local" -name '*.so*' -type f -exec strip --strip-unneeded {} +
grep -rlI --null "$prefix" "$root/usr/local/lib" | xargs -0 -r sed -i "s#$prefix#/usr/local#g"
chroot "$root" ldconfig
chroot "$root" python3.12 -m ensurepip >/dev/null 2>&1
rm -rf "$root"/var/cache/* "$root"/var/lib/apt/lists/* "$root"/var/log/* "$root"/usr/share/{doc,man,info,locale}/* "$root"/tmp/*
find "$root/usr/local" -name __pycache__ -prune -exec rm -r {} +

tar -C "$root" -c . | "$engine" import --change 'ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8' --change 'CMD ["python3"]' - "$tag"
