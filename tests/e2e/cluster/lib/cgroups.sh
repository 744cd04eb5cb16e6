# The cluster's cgroup, /weft/<name>, in every hierarchy there is: the daemons under node/, the
# pods under kubepods/ (the kubelet's cgroupRoot). Two kubelets that shared one root would
# kill each other's pods as orphans.
# shellcheck shell=bash

CGROUP=/weft/$NAME

cgroup_v2() { [ -f /sys/fs/cgroup/cgroup.controllers ]; }

cgroup_hierarchies() { # the mount point of each
  if cgroup_v2; then
    say /sys/fs/cgroup
  else
    awk '($3 == "cgroup" || $3 == "cgroup2") && $2 ~ /^\/sys\/fs\/cgroup\// { print $2 }' /proc/mounts
  fi
}

# The one whose list of processes counts.
cgroup_main() { if cgroup_v2; then say /sys/fs/cgroup; else say /sys/fs/cgroup/pids; fi; }

cgroups_make() {
  local h d c
  for h in $(cgroup_hierarchies); do
    mkdir -p "$h$CGROUP/node"
    if [ -f "$h/cpuset.cpus" ] && ! cgroup_v2; then # empty in a new cgroup, and nothing can enter it then
      for d in "$h/weft" "$h$CGROUP"; do
        cat "$h/cpuset.cpus" >"$d/cpuset.cpus"
        cat "$h/cpuset.mems" >"$d/cpuset.mems"
      done
    elif cgroup_v2; then
      for d in "$h" "$h/weft" "$h$CGROUP"; do
        for c in $(<"$d/cgroup.controllers"); do echo "+$c" >"$d/cgroup.subtree_control" || true; done
      done 2>/dev/null
    fi
  done
}

cgroup_processes() { find "$(cgroup_main)$CGROUP" -name cgroup.procs -exec cat '{}' + 2>/dev/null; }

# cgroups_clear: kills whatever is in there, and takes the cgroups away.
cgroups_clear() {
  local h pid
  for _ in $(seq 100); do
    for pid in $(cgroup_processes); do kill -9 "$pid" 2>/dev/null || true; done
    [ -n "$(cgroup_processes)" ] || break
    sleep 0.1
  done
  for h in $(cgroup_hierarchies); do
    for _ in $(seq 50); do # a cgroup is busy for a moment after its last process
      [ ! -d "$h$CGROUP" ] && break
      find "$h$CGROUP" -depth -type d -exec rmdir '{}' + 2>/dev/null || sleep 0.1
    done
    rmdir "$h/weft" 2>/dev/null || true # other clusters may still be in it
  done
}
