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

say() { printf '%s\n' "$*"; }
die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

# stage NAME COMMAND…: runs one, with its number of STAGES and its time:
#   [3/9] the operator … 12 s
# The output goes to a log, of which a failing stage shows the end. Returns the command's status.
# With LIVE=1 the output is shown as well, for what takes minutes the first time.
STAGES=0 STAGE=0
stage() {
  local what=$1 begun=$SECONDS log status=0 seen=''
  shift
  STAGE=$((STAGE + 1))
  mkdir -p "$ROOT/.run/log"
  log=$ROOT/.run/log/$(basename "$0")-$STAGE.log
  printf '[%d/%d] %s … ' "$STAGE" "$STAGES" "$what"
  # a process of its own, so that `set -e` holds in it
  if [ -n "${LIVE:-}" ]; then
    { (trap - EXIT && set -e && "$@") 2>&1 & wait $! || echo $? >"$log.status"; } | tee "$log" | sed -u '1s/^/\n/; s/^/      /'
    [ ! -f "$log.status" ] || status=$(cat "$log.status")
    rm -f "$log.status"
    [ ! -s "$log" ] || seen=$(printf '      %s: ' "$what")
  else
    (trap - EXIT && set -e && "$@") >"$log" 2>&1 &
    wait $! || status=$?
  fi
  if [ "$status" = 0 ]; then
    printf '%s%d s\n' "$seen" $((SECONDS - begun))
  else
    printf '%sFAILED after %d s\n' "$seen" $((SECONDS - begun))
    tail -n "${STAGE_TAIL:-40}" "$log"
    say "the whole output: $log"
  fi
  return "$status"
}
