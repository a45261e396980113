#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Run by action.yml: one check, its findings as annotations, the step summary, the outputs, and last its exit code.
set -uo pipefail

summary_limit=900000 # GitHub takes 1 MiB per step
report=${CKPTGATE_REPORT:-ckptgate-report.json}
work=$(mktemp -d) || exit 4
trap 'rm -rf "$work"' EXIT

arguments=(--depth "${CKPTGATE_DEPTH:-header}" --fail-on "${CKPTGATE_FAIL_ON:-error}")
[ -z "${CKPTGATE_BASE:-}" ] || arguments+=(--base "$CKPTGATE_BASE")
[ -z "${CKPTGATE_MERGED_FROM:-}" ] || arguments+=(--merged-from "$CKPTGATE_MERGED_FROM")
read -r -d '' -a rules <<< "${CKPTGATE_REQUIRE:-}"
for rule in ${rules[@]+"${rules[@]}"}; do arguments+=(--require "$rule"); done
read -r -d '' -a further <<< "${CKPTGATE_ARGS:-}"

"${CKPTGATE:-ckptgate}" check "${arguments[@]}" ${further[@]+"${further[@]}"} \
  --format github --format "markdown=$work/summary.md" --format "text=$work/report.txt" --format "json=$report" \
  -- "${CKPTGATE_URI:?the input uri is empty}"
code=$?

# Tensor names come from the checkpoint: the runner must not execute them as workflow commands.
token=ckptgate-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
if [ -s "$work/report.txt" ]; then
  printf '::stop-commands::%s\n' "$token"
  cat "$work/report.txt"
  printf '::%s::\n' "$token"
fi

case $code in
  0) verdict=passed ;;
  1) verdict=failed ;;
  2) verdict=usage ;;
  3) verdict=inconclusive ;;
  *) verdict=error ;;
esac
if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then
  if [ -s "$work/summary.md" ]; then
    head -c "$summary_limit" "$work/summary.md" >> "$GITHUB_STEP_SUMMARY"
    printf '\n' >> "$GITHUB_STEP_SUMMARY"
  else
    printf '## ckptgate: %s\n\nThere is no report; the log of the step shows why (exit code %d).\n' "$verdict" "$code" \
      >> "$GITHUB_STEP_SUMMARY"
  fi
fi
if [ -n "${GITHUB_OUTPUT:-}" ]; then
  printf 'verdict=%s\nexit-code=%d\n' "$verdict" "$code" >> "$GITHUB_OUTPUT"
  [ ! -f "$report" ] || printf 'report=%s\n' "${report//$'\n'/}" >> "$GITHUB_OUTPUT"
fi
exit "$code"
