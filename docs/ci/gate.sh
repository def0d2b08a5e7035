#!/usr/bin/env bash
# The regression gate in any CI: this checkout against an earlier state of it, on this machine, now.
# Needs git, and Python 3.11 or newer with venv. The exit code is that of `vqbench gate`: 0 pass,
# 1 slower, 2 the gate can't run, 3 wrong results, 4 no verdict possible.
#
#   docs/ci/gate.sh                        # against the previous commit
#   BASELINE=origin/main SELECTION='-w llama2-7b -f aqlm-2x8 -m 1 -m 8' docs/ci/gate.sh --pairs 9
#
# Arguments go to `vqbench gate`. From the environment:
#   BASELINE    what to compare with: a revision, a folder, a results file (HEAD~1)
#   SELECTION   options that select cases, parted by spaces; no quotes, no expansion (the gate's own)
#   OUT         folder for gate.json, gate.xml, gate.md and the records (gate-report)
#   STRICT      not empty: what is inconclusive fails too
#   VENV        environment to use; made where there is none, kept for the next run (.venv-gate)
#   PYTHON      the interpreter it is made from (python3)
#   TORCH_ARGS  for pip when it installs torch (a CPU build: --index-url https://...)
#   VQBENCH     a vqbench that is installed already; then no environment is made
# On GitHub the Markdown goes to the step's summary instead of gate.md.
set -euo pipefail
cd "$(dirname "$0")/../.."

BASELINE=${BASELINE:-HEAD~1}
OUT=${OUT:-gate-report}
VENV=${VENV:-.venv-gate}
PYTHON=${PYTHON:-python3}

fail() {
  echo "gate: $*" >&2
  exit 2
}

# A folder and a file are vqbench's to judge; a revision that a shallow clone lacks is told here.
check_baseline() {
  [ ! -e "$BASELINE" ] || return 0
  git rev-parse --git-dir >/dev/null 2>&1 || fail "this is no git checkout: name a folder as BASELINE"
  git rev-parse --verify --quiet "$BASELINE^{commit}" >/dev/null && return 0
  if [ "$(git rev-parse --is-shallow-repository)" = true ]; then
    fail "$BASELINE isn't in this shallow clone: fetch the whole history (depth 0)"
  fi
  fail "there is no revision $BASELINE here: name another one as BASELINE"
}

# What is installed follows from these; a change of them installs again into the same folder.
stamp() {
  cat pyproject.toml constraints.txt
  "$PYTHON" --version
  echo "$1"
}

make_environment() {
  local extras=cpu,real wanted torch
  local pip=("$VENV/bin/python" -m pip --disable-pip-version-check --no-input --quiet install)
  ! nvidia-smi >/dev/null 2>&1 || extras+=,triton,cuda
  wanted=$(stamp "$extras $PWD" | cksum)
  [ "$(cat "$VENV/.gate-stamp" 2>/dev/null)" != "$wanted" ] || return 0
  torch=$(grep '^torch==' constraints.txt)
  # torch first and by exactly this pin: the Makefile says why. The stamp last: an install that was
  # cut short is done again.
  # shellcheck disable=SC2086 # TORCH_ARGS are several arguments
  "$PYTHON" -m venv "$VENV" &&
    "${pip[@]}" "$torch" ${TORCH_ARGS:-} -c constraints.txt &&
    "${pip[@]}" -e ".[$extras]" -c constraints.txt &&
    echo "$wanted" >"$VENV/.gate-stamp"
}

check_baseline
if [ -z "${VQBENCH:-}" ]; then
  make_environment >&2 || fail "the environment $VENV can't be made (see above)"
  VQBENCH=$VENV/bin/vqbench
fi
mkdir -p "$OUT" || fail "$OUT can't be made: name another folder as OUT"
read -r -a selection <<<"${SELECTION:-}"
exec "$VQBENCH" gate --baseline "$BASELINE" "${selection[@]}" ${STRICT:+--strict} "$@" \
  --results "$OUT/records" --json "$OUT/gate.json" --junit "$OUT/gate.xml" \
  --md "${GITHUB_STEP_SUMMARY:-$OUT/gate.md}"
