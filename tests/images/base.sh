#!/usr/bin/env bash
# A stand-in for docker.io/library/python:3.11-slim-bookworm where no registry of images can be reached: Debian 12 with
# its own Python 3.11, imported under that name. Arguments: those that podman needs to find its storage.
set -euo pipefail

name=docker.io/library/python:3.11-slim-bookworm
podman "$@" image exists "$name" && exit 0

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mirror=$( (cat /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null || true) |
  sed -n 's/^URIs: *//p; s/^deb *\(\[[^]]*\] *\)\?\([^ ]*\) bookworm main.*/\2/p' | head -n 1)
debootstrap --variant=minbase \
  --include=python3,python3-venv,python3-pip,python-is-python3,ca-certificates \
  bookworm "$scratch/root" "$mirror" >"$scratch/log" 2>&1 || { tail "$scratch/log"; exit 1; }
# What the image it stands for does not have either.
rm -rf "$scratch"/root/var/{cache/apt,lib/apt/lists,log}/* "$scratch"/root/usr/share/{doc,man,locale,info}/*
# What that image does have: Python's headers, here without the compiler's libraries they would bring along.
(cd "$scratch" && apt-get download -qq libpython3.11-dev && dpkg-deb --extract libpython3.11-dev_*.deb dev)
cp -r "$scratch/dev/usr/include/." "$scratch/root/usr/include/"
tar -C "$scratch/root" -cf "$scratch/base.tar" .
podman "$@" import --quiet "$scratch/base.tar" "$name"
