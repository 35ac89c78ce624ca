#!/bin/sh
# Makes localhost/pocket-tools, an image for Podman, and for Docker where it runs, with what the tasks need, out of Debian's
# packages: for machines that reach no registry of images.  Needs root, debootstrap, podman and runc.
# POCKET_SANDBOX_IMAGE=localhost/pocket-tools then lets the tests of containers run.
set -eu
image=localhost/pocket-tools
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if ! podman image exists $image; then
    debootstrap --variant=minbase --include=git,python3 bookworm "$work/root" >"$work/log" 2>&1 || { tail "$work/log"; exit 1; }
    tar -C "$work/root" -c . | podman import -q - $image
fi
if docker info >/dev/null 2>&1 && ! docker image inspect $image >/dev/null 2>&1; then
    container=$(podman create $image true)
    podman export "$container" | docker import - $image
    podman rm "$container"
fi
