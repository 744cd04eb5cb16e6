# The same verbs on kind, for machines with a Docker engine.
# shellcheck shell=bash

kind_is_up() { kind get clusters 2>/dev/null | grep -qx -- "$NAME"; }
kind_node() { say "$NAME-control-plane"; }
kind_need() { kind_is_up || die "cluster $NAME is not up"; }

kind_up() {
  build
  lock "cluster-$NAME"
  if kind_is_up; then
    kind get kubeconfig --name "$NAME" >"$KIND/kubeconfig"
    kubeconfig_write "$KIND/kubeconfig" "$1"
    say "cluster $NAME is up already; kubeconfig: $1"
    return
  fi
  local begun=$SECONDS
  mkdir -p "$KIND/log"
  cp "$HERE/manifests/audit-policy.yaml" "$KIND/audit-policy.yaml"
  sed "s#@DIR@#$KIND#g" "$HERE/manifests/kind.yaml" >"$KIND/kind.yaml"
  kind create cluster --name "$NAME" --config "$KIND/kind.yaml" --kubeconfig "$KIND/kubeconfig" --wait 180s
  kubeconfig_write "$KIND/kubeconfig" "$1"
  say "cluster $NAME is up after $((SECONDS - begun)) s (kind); kubeconfig: $1"
}

kind_down() {
  lock "cluster-$NAME"
  kind delete cluster --name "$NAME"
  # The API server in the node wrote its log as root.
  rm -rf "$KIND" 2>/dev/null || docker run --rm -v "$KIND:/it" busybox:1 sh -c 'rm -rf /it/*' || true
  rm -rf "$KIND" 2>/dev/null || true
}

kind_load() {
  kind_need
  local file
  for file; do kind load image-archive "$file" --name "$NAME"; done
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

# Not under /var/lib: with Docker, no root is needed.
KIND=$CACHE/kind-$NAME
