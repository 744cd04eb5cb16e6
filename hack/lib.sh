# What the scripts of this folder share: places, messages, stages.
# shellcheck shell=bash disable=SC2034

ROOT=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
CLUSTER=$ROOT/tests/e2e/cluster/cluster
CACHE=$(realpath -m "${WEFT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/weft}")
IMAGES=${CARGO_TARGET_DIR:-$ROOT/target}/images
RELEASE=${CARGO_TARGET_DIR:-$ROOT/target}/release
# kubectl, helm and the rest are the ones that the cluster tool builds
PATH=$CACHE/bin:$PATH
export PATH
# Never the cluster that a developer's own $KUBECONFIG names: this is for clusters that the cluster tool made.
export KUBECONFIG=${WEFT_KUBECONFIG:-$ROOT/kubeconfig}

say() { printf '%s\n' "$@"; }
die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

# Of a build from nothing: seconds on one core.
RELEASE_SECONDS=790 TESTS_SECONDS=670

# missing: SECONDS WHAT, a line for each thing that is built from nothing before anything runs.
missing() {
  "$CLUSTER" missing
  [ -x "$RELEASE/weft" ] || [ -f "$IMAGES/weft.oci.tar" ] || say "$((RELEASE_SECONDS / $(nproc))) Weft and its images"
}

# announce SECONDS [LINE…]: says how long all of it takes on this machine: so long when everything is built, and what is missing,
# LINEs as those of `missing` included. Sets EXPECTED.
announce() {
  local seconds what parts='' built
  built=$(duration "$1")
  EXPECTED=$1
  while read -r seconds what; do
    EXPECTED=$((EXPECTED + seconds))
    parts+="${parts:+, }$what ($(duration "$seconds"))"
  done < <(missing; [ $# = 1 ] || say "${@:2}")
  if [ -n "$parts" ]; then
    say "This takes about $(duration "$EXPECTED"), because these are built first: $parts. The next time: $built."
  else
    say "This takes about $built."
  fi
}

# duration SECONDS, as people say it
duration() { if [ "$1" -lt 100 ]; then say "$1 s"; else say "$((($1 + 30) / 60)) min"; fi; }

# stage NAME COMMAND…: runs one, with its number of STAGES and its time:
#   [3/9] the operator … 12 s
# The output goes to $STAGE_LOG, of which a failing stage shows the end. Returns the command's status.
# With LIVE=1 the output is shown as well, for what takes minutes the first time.
# With EXPECTED=SECONDS, how long all of it should have lasted at the end, each line says how far it is.
# Not to be called before `||` or in a condition, where bash ignores `set -e` in all that is called: use `try_stage`.
STAGES=0 STAGE=0
stage() {
  local what=$1 begun=$SECONDS status seen='' options=$-
  shift
  STAGE=$((STAGE + 1))
  mkdir -p "$ROOT/.run/log"
  STAGE_LOG=$ROOT/.run/log/$(basename "$0")-$STAGE.log
  printf '[%d/%d] %s … ' "$STAGE" "$STAGES" "$what"
  set +e
  if [ -n "${LIVE:-}" ]; then
    (trap - EXIT && set -e && "$@") 2>&1 | tee "$STAGE_LOG" | sed -u 's/^/      /; 1s/^/\n/'
    status=${PIPESTATUS[0]}
    [ ! -s "$STAGE_LOG" ] || seen=$(printf '      %s: ' "$what")
  else
    (trap - EXIT && set -e && "$@") >"$STAGE_LOG" 2>&1
    status=$?
  fi
  case $options in *e*) set -e ;; esac
  if [ "$status" = 0 ]; then
    printf '%s%d s%s\n' "$seen" $((SECONDS - begun)) "${EXPECTED:+ ($(duration $SECONDS) of about $(duration "$EXPECTED"))}"
  else
    printf '%sFAILED after %d s\n' "$seen" $((SECONDS - begun))
    [ -n "${LIVE:-}" ] || tail -n "${STAGE_TAIL:-40}" "$STAGE_LOG"
    say "the whole output: $STAGE_LOG"
  fi
  return "$status"
}

# try_stage NAME COMMAND…: as `stage`, but goes on; whether it passed is in $passed.
passed=yes
try_stage() {
  passed=''
  set +e
  stage "$@"
  case $? in 0) passed=yes ;; esac
  set -e
}
