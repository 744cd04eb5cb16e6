# Names, places, messages and locks: what every other file here uses.
# shellcheck shell=bash

PATH=$PATH:/usr/sbin:/sbin # not everyone's PATH has them, and iptables, ip and modprobe lie there

say() { printf '%s\n' "$*"; }
die() {
  printf 'cluster: %s\n' "$*" >&2
  exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }
need_root() { [ "$(id -u)" = 0 ] || die "$1 needs root (network namespaces, mounts, cgroups)"; }

# --- places -------------------------------------------------------------------

CACHE=$(realpath -m "${WEFT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/weft}")
BIN=$CACHE/bin

# The name of the cluster: given, or made from where this checkout lies, so that
# two checkouts have a cluster each without being told.
NAME=${WEFT_CLUSTER:-c$(printf %s "$HERE" | sha256sum | cut -c1-6)}
[[ $NAME =~ ^[a-z0-9]([-a-z0-9]{0,18}[a-z0-9])?$ ]] ||
  die "WEFT_CLUSTER: '$NAME' is not a name of at most 20 small letters, digits and inner dashes"

# Sockets, pids and keys lie in RUN (a unix socket's path is short); whatever grows lies in DATA.
RUN_ROOT=$(realpath -m "${WEFT_RUN:-/run/weft}")
DATA_ROOT=$(realpath -m "${WEFT_DATA:-/var/lib/weft}")
RUN=$RUN_ROOT/$NAME
DATA=$DATA_ROOT/$NAME
LOG=$DATA/log

# kind where Docker and kind are there, else the local cluster; WEFT_BACKEND overrides.
backend() {
  case ${WEFT_BACKEND:-} in
    kind | local) ;;
    '')
      if have kind && have docker && timeout 10 docker info >/dev/null 2>&1; then
        WEFT_BACKEND=kind
      else
        WEFT_BACKEND=local
      fi
      ;;
    *) die "WEFT_BACKEND is '$WEFT_BACKEND'; it can be kind or local" ;;
  esac
}

# cluster_is WORDS KUBECONFIG: the last words of `up`.
cluster_is() {
  # shellcheck disable=SC2016
  printf 'cluster %s is %s; to use it:\n  export KUBECONFIG=%q PATH=%q:$PATH\n' "$NAME" "$1" "$(realpath "$2")" "$BIN"
}

# --- locks --------------------------------------------------------------------

# lock NAME: waits until no other run holds it; held until this process ends.
# Long-lived children must be started with 9>&- or they would go on holding it.
lock() {
  mkdir -p "$CACHE/locks"
  exec 9>"$CACHE/locks/$1"
  flock -n 9 || {
    say "another run works on '$1'; waiting for it"
    flock 9
  }
}

# --- waiting ------------------------------------------------------------------

# until_ok SECONDS WHAT COMMAND…: tries five times a second, dies when the time is over, or
# earlier when GUARD, a command, says that there is nothing to wait for any more.
GUARD=:
until_ok() {
  local end=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    $GUARD
    [ $SECONDS -lt $end ] || die "waited in vain for $what; see: WEFT_CLUSTER=$NAME $0 logs"
    sleep 0.2
  done
}

# --- stages -------------------------------------------------------------------

# stages N announces N stages; stage NAME COMMAND… runs one, with its number and its time:
#   [1/2] Go modules … 26 s
# The command's output goes to a log, shown when it fails; what it gives to `progress` is shown at once.
STAGES=0 STAGE=0
stages() { STAGES=$1 STAGE=0; }
stage() {
  local what=$1 begun=$SECONDS log
  shift
  STAGE=$((STAGE + 1))
  log=$(mktemp "${TMPDIR:-/tmp}/weft-stage.XXXXXX")
  printf '[%d/%d] %s … ' "$STAGE" "$STAGES" "$what"
  # A subshell of its own, so that set -e holds inside whatever surrounds the call.
  set +e
  (
    set -e
    PROGRESS=$log.progress
    "$@"
  ) 3>&1 >"$log" 2>&1
  local rc=$?
  set -e
  [ ! -f "$log.progress" ] || printf '      %s: ' "$what"
  rm -f "$log.progress"
  if [ $rc != 0 ]; then
    printf 'FAILED after %d s\n' $((SECONDS - begun))
    tail -n 30 "$log" >&2
    die "$what failed; all of its output: $log"
  fi
  printf '%d s\n' $((SECONDS - begun))
  rm -f "$log"
}

# progress TEXT: a line on how far the stage is.
PROGRESS=''
duration() { if [ "$1" -lt 100 ]; then say "$1 s"; else say "$((($1 + 30) / 60)) min"; fi; }
progress() {
  [ -f "$PROGRESS" ] || printf '\n' >&3
  : >"$PROGRESS"
  printf '      %s\n' "$*" >&3
}
