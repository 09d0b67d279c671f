#!/usr/bin/env bash
# Verify an export in any CI: install this checkout into a virtual environment, build and verify a checkpoint (or verify
# an existing bundle), and collect the reports in one folder. Paths are relative to the current folder. If .venv and
# outputs/ are kept between runs, only what changed is built again.
#
# Settings are environment variables. Paths must not begin with a dash.
#   CHECKPOINT  folder or hub id (Org/Name@commit); default: the embedded miniature; for a BUNDLE: none
#   BUNDLE      verify this bundle instead of building; needs CHECKPOINT or GOLDEN
#   RECIPE      name of a shipped recipe, or a .toml file; default fp32
#   GOLDEN      a file written by `qwen3vl-onnx golden`, to compare with too; with BUNDLE alone, no torch is installed
#   CASES       files or folders of cases, one per line; with GOLDEN: those that it was recorded with
#   OUTPUT      where to build; default outputs/<checkpoint>-<recipe>
#   MEMORY      memory limit of verification, e.g. 4GB; default all
#   REPORTS     default reports
#   PYTHON      3.11 or newer; default python3
#   VENV        default .venv
#
# In REPORTS: verdict (passed, partial, failed, error), log.txt, cache-key (changes when a stage was rebuilt), and a
# folder per comparison (genai, genai-golden, …): report.html, report.md, junit.xml, parity.json, parity.txt.
# Exit codes are the builder's (README, «Exit codes»): 0 every gate passes, 20 a gate fails, 2 invalid settings; 1 if the
# installation fails.
# Requires bash 4.4 or newer, Python, and a package index. PIP_EXTRA_INDEX_URL selects the build of torch.
set -euo pipefail
shopt -s nullglob

CHECKPOINT=${CHECKPOINT:-} BUNDLE=${BUNDLE:-} RECIPE=${RECIPE:-fp32} GOLDEN=${GOLDEN:-} CASES=${CASES:-}
OUTPUT=${OUTPUT:-} MEMORY=${MEMORY:-} REPORTS=${REPORTS:-reports} PYTHON=${PYTHON:-python3} VENV=${VENV:-.venv}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
forms=(report.html report.md junit.xml parity.json parity.txt exhibits.json)
status=0
decisive=() # reports that determine the verdict

main() {
  settings
  fresh_reports
  install
  if [[ -n $BUNDLE ]]; then
    compare "$BUNDLE" "$(basename "$BUNDLE")" "$CHECKPOINT"
  else
    build
  fi
  finish "$status"
}

settings() {
  local name
  for name in CHECKPOINT BUNDLE RECIPE GOLDEN CASES OUTPUT MEMORY REPORTS PYTHON VENV; do
    printf '%-10s %s\n' "$name" "${!name:-(default)}"
  done
  if [[ -n $BUNDLE && -z $CHECKPOINT && -z $GOLDEN ]]; then
    refuse "BUNDLE needs something to be compared with: set CHECKPOINT or GOLDEN"
  fi
  for name in CHECKPOINT BUNDLE RECIPE GOLDEN CASES OUTPUT; do
    if [[ ${!name} == -* ]]; then refuse "$name begins with a dash: ${!name}"; fi
  done
}

# Remove reports of an earlier run, but never empty a folder that this script did not write.
fresh_reports() {
  if [[ -e $REPORTS && ! -e $REPORTS/verdict && -n $(ls -A "$REPORTS") ]]; then
    refuse "REPORTS=$REPORTS is not empty and not of an earlier run: name another folder"
  fi
  rm -rf "$REPORTS"
  mkdir -p "$REPORTS"
  echo error >"$REPORTS/verdict"
}

# The constraints are the tested versions; a stamp records that they are installed.
install() {
  local extras="[build]" wanted
  if [[ -n $BUNDLE && -z $CHECKPOINT ]]; then extras=""; fi
  wanted="$root$extras $("$PYTHON" --version) $(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
  if [[ -e $VENV && ! -e $VENV/.verify ]]; then
    refuse "VENV=$VENV exists and is not of an earlier run: name another folder"
  fi
  if [[ $wanted != "$(cat "$VENV/.verify" 2>/dev/null)" ]] || ! "$VENV/bin/python" -c '' 2>/dev/null; then
    mkdir -p "$VENV" && : >"$VENV/.verify"
    "$PYTHON" -m venv --clear "$VENV" && : >"$VENV/.verify"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" -e "$root$extras"
    printf '%s\n' "$wanted" >"$VENV/.verify"
  fi
}

# Unlike `python -m builder`, the console script does not import from the current folder.
builder() {
  "$VENV/bin/qwen3vl-onnx" "$@" 2>&1 | tee -a "$REPORTS/log.txt"
}

explain() {
  "$VENV/bin/qwen3vl-onnx" explain --json "$@" 2>"$REPORTS/log.txt"
}

build() {
  local options=(--recipe "$RECIPE") explained output target folder bundle=""
  # File times are those of the clone: only the bytes tell whether a local checkpoint is unchanged.
  if [[ -z $CHECKPOINT || -e $CHECKPOINT ]]; then options+=(--rehash); fi
  if [[ -n $OUTPUT ]]; then options+=(--output "$OUTPUT"); fi
  if [[ -n $CHECKPOINT ]]; then options+=("$CHECKPOINT"); fi
  explained=$(explain "${options[@]}") || {
    # The output was cached but the download was not: on error 10, fetch it again.
    if (($? == 10)) && [[ " ${options[*]} " != *" --rehash "* ]]; then options+=(--force fetch); fi
    explained=$(explain "${options[@]}") || {
      status=$?
      cat "$REPORTS/log.txt" >&2
      return
    }
  }
  output=$("$VENV/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["output"])' <<<"$explained")

  builder build ${MEMORY:+--memory "$MEMORY"} "${options[@]}" || status=$?
  folder=$output/7-verify
  if ((status == 20)); then folder+=.part; fi
  if ((status == 0 || status == 20)); then
    for target in "$folder"/*/; do collect "$target" "$(basename "$target")"; done
    decisive+=("$REPORTS"/*/parity.json)
  fi
  cache_key "$output"
  if ((status != 0)) || [[ -z $GOLDEN$CASES ]]; then return; fi
  for bundle in "$output"/8-bundle/*/; do
    cp -R "$bundle/evidence" "$REPORTS/.evidence"
    compare "$bundle" "$(basename "$bundle")-$([[ -n $GOLDEN ]] && echo golden || echo cases)" \
      "${CHECKPOINT:-$root/builder/miniature/checkpoint}"
    # The bundle keeps the report of its own build.
    cp -R "$REPORTS/.evidence/." "$bundle/evidence" && rm -rf "$REPORTS/.evidence"
  done
}

# compare BUNDLE NAME CHECKPOINT: verify a bundle; its report becomes NAME. The first failure is the exit code.
compare() {
  local bundle=$1 name=$2 checkpoint=$3 options=() path code=0
  if [[ -n $checkpoint ]]; then options+=(--reference "$checkpoint"); fi
  if [[ -n $GOLDEN ]]; then options+=(--golden "$GOLDEN"); fi
  if [[ -n $MEMORY && -z $GOLDEN ]]; then options+=(--memory "$MEMORY"); fi
  while IFS= read -r path; do
    if [[ -n $path ]]; then options+=(--cases "$path"); fi
  done <<<"$CASES"
  builder verify "$bundle" "${options[@]}" || code=$?
  if ((code == 0 || code == 20)); then collect "$bundle/evidence${GOLDEN:+/golden}" "$name"; fi
  # After a build, PyTorch has compared what a golden leaves out.
  if [[ -n $BUNDLE || -z $GOLDEN ]]; then decisive+=("$REPORTS/$name/parity.json"); fi
  if ((status == 0)); then status=$code; fi
}

collect() {
  local form
  mkdir -p "$REPORTS/$2"
  for form in "${forms[@]}"; do
    if [[ -e $1/$form ]]; then cp "$1/$form" "$REPORTS/$2/"; fi
  done
}

cache_key() {
  "$VENV/bin/python" - "$1" >"$REPORTS/cache-key" <<'PYTHON'
import hashlib, json, pathlib, sys
stages = sorted(pathlib.Path(sys.argv[1]).glob("[0-9]-*/stage.json"))
keys = [json.loads(stage.read_bytes())["key"] for stage in stages if not stage.parent.name.endswith(".part")]
print(hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16])
PYTHON
}

finish() {
  local code=$1 verdict=error report
  if ((code == 20)); then verdict=failed; fi
  if ((code == 0)); then
    verdict=passed
    for report in "${decisive[@]:-none}"; do
      if grep -qs '"verdict": "partial"' "$report"; then verdict=partial; fi
    done
    # A run that compared nothing must not pass.
    for report in "${decisive[@]:-none}"; do
      if [[ ! -s $report ]]; then verdict=error code=70; fi
    done
  fi
  echo "$verdict" >"$REPORTS/verdict"
  echo "verdict: $verdict (exit code $code); reports: $REPORTS"
  exit "$code"
}

refuse() {
  echo "error: $1" >&2
  exit 2
}

main
