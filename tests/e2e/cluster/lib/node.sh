# The node of the local cluster: one tree of processes in namespaces of its own.
# shellcheck shell=bash

# --- addresses: all from 198.18.0.0/15 (benchmarking), a /20 of it for each cluster -----------

# addresses INDEX
addresses() {
  local base=198.$((18 + $1 / 16)) third=$(($1 % 16 * 16))
  LINK=weft$1
  HOST_IP=$base.$third.1 NODE_IP=$base.$third.2
  PODS=$base.$((third + 4)).0/22
  SERVICES=$base.$((third + 8)).0/21
  API_IP=$base.$((third + 8)).1 DNS_IP=$base.$((third + 8)).10
}

# index_choose: the first of 32 that no other cluster has.
index_choose() {
  local i
  for i in $(seq 0 31); do
    grep -qsx "$i" "$RUN_ROOT"/*/index && continue
    ip link show "weft$i" >/dev/null 2>&1 && continue
    echo "$i" >"$RUN/index"
    return
  done
  die 'there are 32 clusters on this machine already'
}

# --- the node's life --------------------------------------------------------------------

# node_init prints the process that holds the namespaces, if it lives and is ours.
node_init() {
  local pid
  pid=$(cat "$RUN/init.pid" 2>/dev/null) || return
  grep -qs ":$CGROUP/node\$" "/proc/$pid/cgroup" && say "$pid"
}

# node COMMAND…: runs in the node.
node() { nsenter -t "$(node_init)" --net --mount --pid --ipc --uts -- "$@"; }

node_make() {
  need_root up
  mkdir -p "$RUN" "$DATA/node" "$LOG"
  chmod 0700 "$RUN"
  (
    lock indexes
    index_choose
  )
  addresses "$(<"$RUN/index")"
  cgroups_make
  export RUN DATA CACHE NAME
  (
    cgroup_enter
    exec setsid unshare --net --mount --pid --ipc --uts --fork -- bash "$HERE/lib/node-init.sh"
  ) >"$LOG/init.log" 2>&1 9>&- </dev/null &
  until_ok 10 'the start of the node' test -s "$RUN/init.pid"

  ip link add "$LINK" type veth peer name eth0 netns "$(node_init)"
  ip addr add "$HOST_IP/30" dev "$LINK"
  ip link set "$LINK" up
  # shellcheck disable=SC2016
  # There is no way out. Services get a route to nowhere, because some route must be there before
  # their addresses are rewritten; all else is refused at once.
  node sh -euc '
    ip link set lo up
    ip addr add "$1/30" dev eth0
    ip link set eth0 up
    ip link add nowhere0 type veth peer name nowhere1
    ip link set nowhere0 up
    ip link set nowhere1 up
    ip route add "$2" dev nowhere0
    ip route add unreachable default
    sysctl -qw net.ipv4.ip_forward=1
    for m in overlay br_netfilter; do modprobe -q $m || true; done
  ' sh "$NODE_IP" "$SERVICES"
}

cgroup_enter() {
  local h
  for h in $(cgroup_main); do echo 0 >"$h$CGROUP/node/cgroup.procs"; done
}

# start NAME COMMAND…: a daemon in the node, with its log and its pid (the node's number for it).
start() {
  local name=$1
  shift
  # shellcheck disable=SC2016
  (
    cgroup_enter
    node bash -c 'name=$1 run=$2 log=$3; shift 3
      setsid "$@" >>"$log/$name.log" 2>&1 </dev/null &
      echo $! >"$run/$name.pid"' bash "$name" "$RUN" "$LOG" "$@"
  ) 9>&-
}

DAEMONS=(etcd apiserver controller-manager scheduler containerd kubelet kube-proxy network-policies volumes)

# daemons_dead [started] prints those that do not run (of those that were started at all).
daemons_dead() {
  local name of=()
  for name in "${DAEMONS[@]}"; do
    if [ $# = 0 ] || [ -f "$RUN/$name.pid" ]; then of+=("$name"); fi
  done
  [ ${#of[@]} -gt 0 ] || return 0
  # shellcheck disable=SC2016
  node bash -c 'run=$1; shift
    for name; do kill -0 "$(cat "$run/$name.pid" 2>/dev/null)" 2>/dev/null || printf "%s " "$name"; done
  ' bash "$RUN" "${of[@]}"
}

# node_clear: takes away the node and all that a killed run may have left of it.
node_clear() {
  local init
  init=$(node_init) && kill -9 "$init" 2>/dev/null
  cgroups_clear
  if [ -f "$RUN/index" ]; then # goes with the node's network namespace, but not at once
    addresses "$(<"$RUN/index")"
    ip link del "$LINK" 2>/dev/null || true
  fi
  awk -v run="$RUN/" -v data="$DATA/" 'index($2, run) == 1 || index($2, data) == 1 { print $2 }' /proc/mounts |
    sort -r | xargs -r umount -l
  rm -rf --one-file-system "$RUN" "$DATA"
  rmdir "$RUN_ROOT" "$DATA_ROOT" 2>/dev/null || true
}
