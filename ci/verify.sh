#!/usr/bin/env bash
# Proves an export in any CI: installs this checkout into a virtual environment, builds and verifies a checkpoint (or
# verifies a bundle that is there already), and puts the reports into one folder. Run it from where paths are to count
# from; keep .venv and outputs/ between runs, and only what changed is done again.
#
# Settings are environment variables. Paths must not begin with a dash.
#   CHECKPOINT  folder or hub id (Org/Name@commit); default: the embedded miniature; for a BUNDLE: none
#   BUNDLE      verify this bundle and build nothing; needs CHECKPOINT or GOLDEN
#   RECIPE      name of a shipped recipe, or a .toml file; default fp32
#   GOLDEN      a file of `qwen3vl-onnx golden`, compared with too; with BUNDLE alone, no torch is installed
#   CASES       files or folders of cases, one a line; with GOLDEN: those that it was made with
#   OUTPUT      where to build; default outputs/<checkpoint>-<recipe>
#   MEMORY      what verification may use, e.g. 4GB; default all
#   REPORTS     default reports
#   PYTHON      3.11 or newer; default python3
#   VENV        default .venv
#
# In REPORTS: verdict (passed, partial, failed, error), log.txt, cache-key (changes when a stage was rebuilt), and a
# folder a comparison (genai, genai-golden, …): report.html, report.md, junit.xml, parity.json, parity.txt.
# Exit codes are the builder's (README, «Exit codes»): 0 every gate holds, 20 one does not, 2 wrong settings; 1 where it
# could not be installed.
# Needs: bash 4.4 or newer, Python, a package index. Torch comes from pip's index: PIP_EXTRA_INDEX_URL chooses.
set -euo pipefail
shopt -s nullglob

CHECKPOINT=${CHECKPOINT:-} BUNDLE=${BUNDLE:-} RECIPE=${RECIPE:-fp32} GOLDEN=${GOLDEN:-} CASES=${CASES:-}
OUTPUT=${OUTPUT:-} MEMORY=${MEMORY:-} REPORTS=${REPORTS:-reports} PYTHON=${PYTHON:-python3} VENV=${VENV:-.venv}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
forms=(report.html report.md junit.xml parity.json parity.txt exhibits.json)
status=0
decisive=() # the reports that the verdict is read from

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

# Reports of an earlier run must not pass for this one's, and a folder that is someone else's must not be emptied.
fresh_reports() {
  if [[ -e $REPORTS && ! -e $REPORTS/verdict && -n $(ls -A "$REPORTS") ]]; then
    refuse "REPORTS=$REPORTS is not empty and not of an earlier run: name another folder"
  fi
  rm -rf "$REPORTS"
  mkdir -p "$REPORTS"
  echo error >"$REPORTS/verdict"
}

# The constraints are the exact versions that everything was tested with; a stamp tells whether they are in.
install() {
  local extras="[build]" wanted
  if [[ -n $BUNDLE && -z $CHECKPOINT ]]; then extras=""; fi
  wanted="$root$extras $("$PYTHON" --version) $(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
  if [[ -e $VENV && ! -e $VENV/.verify ]]; then
    refuse "VENV=$VENV is there and not of an earlier run: name another folder"
  fi
  if [[ $wanted != "$(cat "$VENV/.verify" 2>/dev/null)" ]] || ! "$VENV/bin/python" -c '' 2>/dev/null; then
    mkdir -p "$VENV" && : >"$VENV/.verify"
    "$PYTHON" -m venv --clear "$VENV" && : >"$VENV/.verify"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" -e "$root$extras"
    printf '%s\n' "$wanted" >"$VENV/.verify"
  fi
}

# The console script, unlike `python -m builder`, leaves the current folder out of what is imported.
builder() {
  "$VENV/bin/qwen3vl-onnx" "$@" 2>&1 | tee -a "$REPORTS/log.txt"
}

explain() {
  "$VENV/bin/qwen3vl-onnx" explain --json "$@" 2>"$REPORTS/log.txt"
}

build() {
  local asked=(--recipe "$RECIPE") explained output target folder bundle=""
  # A clone's files are as old as the clone: only their bytes tell whether a local checkpoint is the same.
  if [[ -z $CHECKPOINT || -e $CHECKPOINT ]]; then asked+=(--rehash); fi
  if [[ -n $OUTPUT ]]; then asked+=(--output "$OUTPUT"); fi
  if [[ -n $CHECKPOINT ]]; then asked+=("$CHECKPOINT"); fi
  explained=$(explain "${asked[@]}") || {
    # A download that was not kept, beside an output that was: error 10 says to fetch it again.
    if (($? == 10)) && [[ " ${asked[*]} " != *" --rehash "* ]]; then asked+=(--force fetch); fi
    explained=$(explain "${asked[@]}") || {
      status=$?
      cat "$REPORTS/log.txt" >&2
      return
    }
  }
  output=$("$VENV/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["output"])' <<<"$explained")

  builder build ${MEMORY:+--memory "$MEMORY"} "${asked[@]}" || status=$?
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
    # What is shipped keeps the report of its own build.
    cp -R "$REPORTS/.evidence/." "$bundle/evidence" && rm -rf "$REPORTS/.evidence"
  done
}

# compare BUNDLE NAME CHECKPOINT: verify a bundle; its report becomes NAME. The first failure is the exit code.
compare() {
  local bundle=$1 name=$2 checkpoint=$3 asked=() one code=0
  if [[ -n $checkpoint ]]; then asked+=(--reference "$checkpoint"); fi
  if [[ -n $GOLDEN ]]; then asked+=(--golden "$GOLDEN"); fi
  if [[ -n $MEMORY && -z $GOLDEN ]]; then asked+=(--memory "$MEMORY"); fi
  while IFS= read -r one; do
    if [[ -n $one ]]; then asked+=(--cases "$one"); fi
  done <<<"$CASES"
  builder verify "$bundle" "${asked[@]}" || code=$?
  if ((code == 0 || code == 20)); then collect "$bundle/evidence${GOLDEN:+/golden}" "$name"; fi
  # What a golden alone leaves out, PyTorch has compared where there was a build.
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
keys = [json.loads(one.read_bytes())["key"] for one in stages if not one.parent.name.endswith(".part")]
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
    # A run that compared nothing must not look like one that passed.
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
