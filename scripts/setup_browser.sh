#!/usr/bin/env bash
# Makes sure that the browser tests find a Chromium: Debian's own, through apt, where there is none and we may install.
# The driver (playwright, a wheel of the dev extra) brings no browser of its own here: nothing else is downloaded.
#
#   TOPKD_CHROMIUM   a Chromium or Chrome of yours; nothing is installed then
set -euo pipefail

say() { printf 'setup_browser: %s\n' "$*" >&2; }

if [ -n "${TOPKD_CHROMIUM:-}" ]; then
  [ -x "$TOPKD_CHROMIUM" ] && exit 0
  say "TOPKD_CHROMIUM=$TOPKD_CHROMIUM is no program"
  exit 1
fi
for name in chromium chromium-browser google-chrome; do
  command -v "$name" >/dev/null && exit 0
done
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
  say "no Chromium here: install one (Debian: apt-get install chromium), or name yours in TOPKD_CHROMIUM"
  exit 1
fi
say "installing Debian's chromium, and fonts for it"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq >&2
apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core fonts-liberation >/dev/null
command -v chromium >/dev/null || { say "apt installed no chromium"; exit 1; }
