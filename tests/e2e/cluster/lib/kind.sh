# The same verbs on kind, for machines with a Docker engine.
# shellcheck shell=bash

KIND_NAME=weft-$NAME # beside clusters of other projects
KIND=$CACHE/kind-$NAME # its folder; not under /var/lib, because with Docker no root is needed

kind_is_up() { kind get clusters 2>/dev/null | grep -qx "$KIND_NAME"; }
kind_node() { say "$KIND_NAME-control-plane"; }
kind_need() { kind_is_up || die "cluster $NAME is not up"; }

kind_up() {
  build
  lock "cluster-$NAME"
  if kind_is_up; then
    kind get kubeconfig --name "$KIND_NAME" >"$KIND/kubeconfig"
    kubeconfig_write "$KIND/kubeconfig" "$1"
    cluster_is 'up already' "$1"
    return
  fi
  local begun=$SECONDS
  mkdir -p "$KIND/log"
  : >"$KIND/log/audit.log" # ours to read, which it would not be if the API server made it
  cp "$HERE/manifests/audit-policy.yaml" "$KIND/audit-policy.yaml"
  sed "s#@DIR@#$KIND#g" "$HERE/manifests/kind.yaml" >"$KIND/kind.yaml"
  kind create cluster --name "$KIND_NAME" --config "$KIND/kind.yaml" --kubeconfig "$KIND/kubeconfig" --wait 180s
  kubeconfig_write "$KIND/kubeconfig" "$1"
  cluster_is "up after $((SECONDS - begun)) s (kind)" "$1"
}

kind_down() {
  lock "cluster-$NAME"
  kind delete cluster --name "$KIND_NAME"
  rm -rf "$KIND"
}

kind_load() {
  kind_need
  local file
  for file; do kind load image-archive "$file" --name "$KIND_NAME"; done
}

kind_status() {
  if ! kind_is_up; then
    say "cluster $NAME (kind): down"
    return 1
  fi
  say "cluster $NAME (kind): up"
  docker exec "$(kind_node)" kubectl --kubeconfig /etc/kubernetes/admin.conf get nodes -o wide
}

kind_logs() {
  kind_need
  case ${1:-} in
    '') docker exec "$(kind_node)" sh -c 'for f in /var/log/containers/*_kube-system_*.log; do echo "== $f"; tail -n 10 "$f"; done' ;;
    kubelet | containerd) docker exec "$(kind_node)" journalctl --no-pager -u "$1" ;;
    *) docker exec "$(kind_node)" sh -c 'cat /var/log/containers/*"$1"*_kube-system_*.log' sh "$1" ;;
  esac
}

kind_exec_node() {
  kind_need
  docker exec -i "$(kind_node)" "$@"
}
kind_audit_log() { say "$KIND/log/audit.log"; }
