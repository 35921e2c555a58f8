#!/usr/bin/env bash
# images.sh build|push|names: the images operator, trainer and inference of the commit that is checked out. `make images` builds them.
# The environment chooses ENGINE (docker, podman, buildah), REGISTRY, TAG, BASE, VARIANT (cuda, cpu: of inference) and BUILD_FLAGS.
set -euo pipefail
cd "$(dirname "$0")/.."
sources=(.dockerignore docker jobs operator vpmoe pyproject.toml README.md LICENSE)
engine=${ENGINE:-docker} registry=${REGISTRY:-localhost/vpmoe} variant=${VARIANT:-cuda}
case $variant in
  cuda) suffix= ;;
  cpu) suffix=-cpu ;;
  *) echo "VARIANT=$variant: choose cuda or cpu." >&2; exit 64 ;;
esac
commit=$(git rev-parse HEAD)
tag=${TAG:-${commit:0:12}$suffix}
base=${BASE:-$(sed -n 's/^BASE=//p' docker/image.lock)}

build() {
  if [ -n "$(git status --porcelain -- "${sources[@]}")" ]; then
    echo "Images are built from a commit, and these files differ from it. Commit or stash them, and run again:" >&2
    git status --short -- "${sources[@]}" >&2
    exit 65
  fi
  if ! command -v "$engine" >/dev/null; then
    echo "$engine is not installed. Install Docker, podman or buildah, and name it: make images ENGINE=podman" >&2
    exit 69
  fi
  context=$(mktemp -d)
  trap 'rm -rf "$context"' EXIT
  git archive "$commit" "${sources[@]}" | tar -x -C "$context"
  command=("$engine" build)
  case ${engine##*/} in
    docker*) export DOCKER_BUILDKIT=1 ;;  # the Dockerfiles mount caches and secrets
    *) command+=(--layers) ;;
  esac
  read -ra flags <<<"${BUILD_FLAGS:-}"
  digest=${base##*@}
  for name in operator trainer inference; do
    "${command[@]}" "${flags[@]}" --file "$context/docker/$name.Dockerfile" --tag "$registry/$name:$tag" \
      --build-arg "BASE=$base" --build-arg "BASE_NAME=${base%@*}" --build-arg "BASE_DIGEST=${digest#"$base"}" \
      --build-arg "COMMIT=$commit" --build-arg "VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" \
      --build-arg "VARIANT=$variant" "$context"
  done
  "$engine" images --filter "reference=$registry/*:$tag"
}

case ${1:-} in
  build) build ;;
  push) for name in operator trainer inference; do "$engine" push "$registry/$name:$tag"; done ;;
  names) for name in operator trainer inference; do echo "$registry/$name:$tag"; done ;;
  *) echo "usage: docker/images.sh build|push|names" >&2; exit 64 ;;
esac
