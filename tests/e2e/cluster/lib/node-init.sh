#!/usr/bin/env bash
# The first process of a node, in new net, mount, pid, ipc and uts namespaces: gives the node
# folders of its own where programs have fixed paths, and then sleeps. When this process is
# killed, the kernel takes down everything in the node: processes, mounts and network.
# Called by local_node_make with RUN, DATA, CACHE, NAME in the environment.
set -euo pipefail

read -r pid _ </proc/self/stat # /proc is still the machine's, so this is the machine's number for us
mount -t proc proc /proc
hostname "$NAME"

# hide DIR: an empty folder in place of the machine's, with what we need of it inside.
hide() {
  local dir=$1 own=$DATA/node$1 keep
  mkdir -p "$own"
  for keep in "$RUN" "$DATA" "$CACHE"; do
    [[ $keep/ == "$dir"/* ]] || continue
    mkdir -p "$own${keep#"$dir"}"
    mount --rbind "$keep" "$own${keep#"$dir"}"
  done
  mount --rbind "$own" "$dir"
}
hide /run     # containerd's shims, xtables.lock
hide /var/log # links to the containers' logs
hide /var/lib # the network plugins' results

# The kubelet sets these for the whole machine, unless they are as it wants: let it read so.
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
  kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
  file=$DATA/node/sysctl/${setting%=*}
  mkdir -p "${file%/*}"
  echo "${setting#*=}" >"$file"
  mount --bind "$file" "/proc/sys/${setting%=*}"
done

# Volumes that are to show later mounts need a shared mount to begin with.
mount --make-rshared /

echo "$pid" >"$RUN/init.pid.new"
mv "$RUN/init.pid.new" "$RUN/init.pid"
exec "$CACHE/bin/pause"
