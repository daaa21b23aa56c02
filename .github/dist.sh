#!/usr/bin/env bash
# Hand the built files of one repository from one job of a release to the next, in one file.
#
#   .github/dist.sh pack FILE DIST REPOSITORY   write FILE, and its sha256 as an output of the step
#   .github/dist.sh unpack FILE                 compare FILE with DIST_SHA256, then write ./dist
#
# Any job of a run can replace the run's artifacts; the output of a job, which names the digest, only that job can set.
# With ARTIFACT_KEY the file is encrypted: everybody with an account can download the artifacts of a public repository.
set -euo pipefail

# The digest above shows a change, so the cipher need not.
cipher() { openssl enc -aes-256-ctr -pbkdf2 -iter 600000 -pass env:ARTIFACT_KEY "$@"; }

case "$1" in
pack)
  if [ -n "${ARTIFACT_KEY:-}" ]; then
    tar -C "$3" -cf - "builds/$4" "receipts/$4" | cipher -out "$2"
  else
    echo "::notice::there is no secret ARTIFACT_KEY: who can read this repository can download the built files for a day"
    tar -C "$3" -cf "$2" "builds/$4" "receipts/$4"
  fi
  echo "sha256=$(sha256sum "$2" | cut -d ' ' -f 1)" >> "$GITHUB_OUTPUT"
  ;;
unpack)
  echo "$DIST_SHA256  $2" | sha256sum --check --strict
  mkdir dist
  if [ -n "${ARTIFACT_KEY:-}" ]; then
    cipher -d -in "$2" | tar -C dist -xf - --no-same-owner
  else
    tar -C dist -xf "$2" --no-same-owner
  fi
  rm "$2"
  if odd=$(find dist ! -type f ! -type d -print -quit) && [ -n "$odd" ]; then
    echo "::error::$odd is neither a file nor a folder: a build makes no such thing"
    exit 1
  fi
  ;;
*)
  echo "usage: $0 pack FILE DIST REPOSITORY | unpack FILE" >&2
  exit 2
  ;;
esac
