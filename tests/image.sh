#!/bin/sh
# Makes localhost/pocket-tools, an image for Podman with what the tasks need, out of Debian's packages: for machines that
# reach no registry of images.  Needs root, debootstrap, podman and runc.  POCKET_SANDBOX_IMAGE=localhost/pocket-tools
# then lets the tests of containers run.
set -eu
! podman image exists localhost/pocket-tools || exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
debootstrap --variant=minbase --include=git,python3 bookworm "$work/root" >"$work/log" 2>&1 || { tail "$work/log"; exit 1; }
tar -C "$work/root" -c . | podman import -q - localhost/pocket-tools
