#!/usr/bin/env bash
# Runs make targets one after the other, stops at the first that fails, and ends with the minutes of each part and
# the closing line of each pytest run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
log=$(mktemp "${TMPDIR:-/tmp}/topkd-check.XXXXXX")
trap 'rm -f "$log"' EXIT

rows=()
failed=""
began=$SECONDS
scripts/setup.sh dev >/dev/null || exit 2
rows+=("$(printf '%-12s %7s   %s' set-up "$(awk "BEGIN { printf \"%.1f\", ($SECONDS - $began) / 60 }")" ok)")
for part in "$@"; do
  printf '\n== make %s\n' "$part"
  start=$SECONDS
  "${MAKE:-make}" --no-print-directory "$part" 2>&1 | tee "$log"
  status=${PIPESTATUS[0]}
  minutes=$(awk "BEGIN { printf \"%.1f\", ($SECONDS - $start) / 60 }")
  closing=$(grep -E '^=* ?[0-9]+ (passed|failed|skipped|error|deselected|xfailed).* in [0-9]' "$log" | tr -d '=' | paste -sd '|' -)
  [ "$status" = 0 ] && result=ok || result=FAILED
  rows+=("$(printf '%-12s %7s   %s %s' "$part" "$minutes" "$result" "$closing")")
  [ "$status" = 0 ] || { failed=$part; break; }
done

printf '\n%-12s %7s   %s\n' part minutes result
printf '%s\n' "${rows[@]}"
printf '%-12s %7s\n' total "$(awk "BEGIN { printf \"%.1f\", ($SECONDS - $began) / 60 }")"
[ -z "$failed" ] || { printf 'check: make %s failed\n' "$failed" >&2; exit 1; }
