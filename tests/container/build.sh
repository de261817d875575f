#!/usr/bin/env bash
# Build the Dockerfile as it is, without docker and without a registry: Debian 13 is made here from
# packages, as a base that knows this machine's certificates and package index. Needs root, buildah,
# podman, runc and mmdebstrap.
#
#   build.sh STORAGE    the image is localhost/immunity in STORAGE; layers are kept there
#
# Afterwards: CONTAINERS_STORAGE_CONF=STORAGE/storage.conf CONTAINERS_CONF=STORAGE/containers.conf \
#     podman run --rm localhost/immunity --help
set -euo pipefail
storage=$(realpath -m "$1")
project=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
mkdir -p "$storage"

cat > "$storage/storage.conf" <<END
[storage]
driver = "overlay"
graphroot = "$storage/graph"
runroot = "$storage/run"
END
cat > "$storage/containers.conf" <<END
[containers]
default_ulimits = ["nofile=$(ulimit -Hn):$(ulimit -Hn)", "nproc=30000:30000"]
netns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
END
export CONTAINERS_STORAGE_CONF=$storage/storage.conf CONTAINERS_CONF=$storage/containers.conf

base=localhost/base
if ! buildah inspect --type image "$base" > /dev/null 2>&1; then
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Label: Debian' | head -n 1)
    mmdebstrap --quiet --variant=minbase --include=ca-certificates trixie "$storage/base.tar" \
        "${mirror:?no mirror of Debian in the apt configuration of this machine}"
    bare=$(podman import --quiet "$storage/base.tar")
    rm "$storage/base.tar"
    container=$(buildah from "$bare")
    for certificate in /usr/local/share/ca-certificates/*.crt; do
        [ ! -e "$certificate" ] ||
            buildah copy --quiet "$container" "$certificate" /usr/local/share/ca-certificates/
    done
    buildah run --isolation chroot "$container" -- update-ca-certificates
    bundle=/etc/ssl/certs/ca-certificates.crt
    for variable in SSL_CERT_FILE PIP_CERT REQUESTS_CA_BUNDLE; do
        buildah config --env "$variable=$bundle" "$container"
    done
    index=$(python3 -m pip config get global.index-url 2> /dev/null || true)
    index=${PIP_INDEX_URL:-$index}
    [ -z "$index" ] || buildah config --env "PIP_INDEX_URL=$index" --env "UV_DEFAULT_INDEX=$index" "$container"
    buildah commit --quiet --format docker "$container" "$base"
    buildah rm "$container" > /dev/null
fi

buildah bud --isolation chroot --format docker --layers --build-arg BASE_IMAGE="$base" \
    --build-arg COMMIT="$(git -C "$project" rev-parse HEAD)" --tag localhost/immunity "$project"
