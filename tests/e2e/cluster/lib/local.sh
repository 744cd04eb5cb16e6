# The local cluster: a real one, on one node, without a container engine.
# shellcheck shell=bash

kubectl() { "$BIN/kubectl" --kubeconfig "$PKI/admin.kubeconfig" "$@"; }

local_is_up() {
  [ -n "$(node_init)" ] && [ -f "$RUN/up" ] && [ -z "$(daemons_dead)" ] &&
    kubectl get --raw /readyz --request-timeout 5s >/dev/null 2>&1
}

local_up() {
  need_root up
  build
  images
  debian_install "${DEBIAN_NODE[@]}"
  local begun=$SECONDS
  lock "cluster-$NAME"
  if local_is_up; then
    kubeconfig_write "$PKI/admin.kubeconfig" "$1"
    cluster_is 'up already' "$1"
    return
  fi
  node_clear
  # Half a cluster is no use to anyone, and its logs are: they stay until the next up or down.
  trap 'say "cluster $NAME did not start; its logs: $LOG" >&2' EXIT
  GUARD=none_died
  node_make
  (exec 9>&- && image_store_copy "$DATA/containerd") &
  local copying=$!
  pki_make
  control_plane_start
  wait $copying
  containerd_start
  until_ok 60 'an answer from the API server' kubectl get --raw /readyz
  control_plane_rest
  kubelet_start
  kubectl apply --server-side -f <(base_manifests) >"$LOG/base.log" 2>&1 || {
    cat "$LOG/base.log" >&2
    die 'the base manifests were refused'
  }
  until_ok 60 'the node to be there' kubectl get node "$NAME" # network-policies gives up without it
  node_rest
  until_ok 90 'a ready node' ready_node
  kubectl -n kube-system rollout status --timeout 90s deployment/coredns >>"$LOG/base.log" 2>&1 ||
    die "CoreDNS did not get ready; see $0 logs"
  until_ok 30 'the default service account' kubectl get serviceaccount default
  touch "$RUN/up"
  kubeconfig_write "$PKI/admin.kubeconfig" "$1"
  trap - EXIT
  cluster_is "up after $((SECONDS - begun)) s" "$1"
}

none_died() {
  local dead
  dead=$(daemons_dead started)
  [ -z "$dead" ] || {
    tail -n 5 "$LOG/${dead%% *}.log" >&2
    die "died: $dead"
  }
}
ready_node() { kubectl get node "$NAME" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}' | grep -qx True; }

kubeconfig_write() { # FROM TO
  mkdir -p "$(dirname "$2")"
  (umask 077 && cat "$1" >"$2.new" && mv "$2.new" "$2")
}

local_down() {
  need_root down
  lock "cluster-$NAME"
  if [ -d "$RUN" ] || [ -d "$DATA" ] || [ -d "$(cgroup_main)$CGROUP" ]; then
    node_clear
    say "cluster $NAME is gone"
  else
    say "there is no cluster $NAME"
  fi
}

local_load() {
  need_root load
  [ -n "$(node_init)" ] || die "cluster $NAME is not up"
  local file
  for file; do
    ctr -a "$RUN/containerd.sock" -n k8s.io images import "$file"
  done
}

local_status() {
  local init dead state='starting, or failed to start'
  init=$(node_init) || {
    say "cluster $NAME (local): down"
    return 1
  }
  addresses "$(<"$RUN/index")"
  dead=$(daemons_dead)
  if [ -f "$RUN/up" ]; then state=up; fi
  say "cluster $NAME (local): $state"
  say "  node      $NODE_IP, process $init, pods $PODS, services $SERVICES"
  say "  daemons   ${dead:+dead: }${dead:-all run}"
  say "  folders   $RUN, $DATA ($(du -sh --one-file-system "$DATA" 2>/dev/null | cut -f1))"
  [ -z "$dead" ] || return 1
  kubectl get nodes -o wide
  kubectl get pods -A --no-headers | awk '{ n[$4]++ } END { for (s in n) printf "  pods %s: %d\n", s, n[s] }'
}

local_logs() {
  [ -d "$LOG" ] || die "cluster $NAME has no logs"
  if [ $# = 0 ]; then
    for name in init "${DAEMONS[@]}" base; do
      say "== $name ($LOG/$name.log)"
      tail -n "${LINES_OF_EACH:-10}" "$LOG/$name.log" 2>/dev/null || true
    done
  else
    [ -f "$LOG/$1.log" ] || die "there is no log of '$1'; there are: ${DAEMONS[*]} init base audit"
    cat "$LOG/$1.log"
  fi
}

local_exec_node() {
  need_root exec-node
  [ -n "$(node_init)" ] || die "cluster $NAME is not up"
  # where ctr asks, on kind without being told
  CONTAINERD_ADDRESS=$RUN/containerd.sock node "$@"
}
local_audit_log() { say "$LOG/audit.log"; }

# --- the daemons ------------------------------------------------------------------------

control_plane_start() {
  # Nothing of worth is ever in this etcd, so it need not wait for the disk.
  start etcd "$BIN/etcd" --data-dir "$DATA/etcd" --unsafe-no-fsync --log-level warn \
    --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
    --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 \
    --initial-cluster default=http://127.0.0.1:2380
  cp "$HERE/manifests/audit-policy.yaml" "$RUN/audit-policy.yaml" # the checkout may lie in a hidden folder
  # Preferring InternalIP: or logs and exec would look up the node's name, which no one knows.
  start apiserver "$BIN/kube-apiserver" --v=1 --etcd-servers=http://127.0.0.1:2379 \
    --bind-address=0.0.0.0 --advertise-address="$NODE_IP" --secure-port=6443 --service-cluster-ip-range="$SERVICES" \
    --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" \
    --token-auth-file="$PKI/tokens.csv" --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
    --kubelet-preferred-address-types=InternalIP --kubelet-certificate-authority="$PKI/ca.crt" \
    --kubelet-client-certificate="$PKI/apiserver-to-kubelet.crt" --kubelet-client-key="$PKI/apiserver-to-kubelet.key" \
    --service-account-key-file="$PKI/sa.pub" --service-account-signing-key-file="$PKI/sa.key" \
    --service-account-issuer=https://kubernetes.default.svc --allow-privileged \
    --audit-policy-file="$RUN/audit-policy.yaml" --audit-log-path="$LOG/audit.log" \
    --audit-log-maxsize=1000 --audit-log-maxbackup=1 \
    --feature-gates=MutatingAdmissionPolicy=true --runtime-config=admissionregistration.k8s.io/v1beta1=true # beta in 1.34
}

control_plane_rest() {
  start controller-manager "$BIN/kube-controller-manager" --v=1 --kubeconfig="$PKI/kcm.kubeconfig" \
    --root-ca-file="$PKI/ca.crt" --service-account-private-key-file="$PKI/sa.key" --use-service-account-credentials \
    --allocate-node-cidrs --cluster-cidr="$PODS" --node-cidr-mask-size="${PODS#*/}" \
    --service-cluster-ip-range="$SERVICES" --leader-elect=false
  start scheduler "$BIN/kube-scheduler" --v=1 --kubeconfig="$PKI/scheduler.kubeconfig" --leader-elect=false
  start kube-proxy "$BIN/kube-proxy" --v=1 --kubeconfig="$PKI/proxy.kubeconfig" --proxy-mode=iptables \
    --cluster-cidr="$PODS" --hostname-override="$NAME" --conntrack-max-per-core=0
}

containerd_start() {
  mkdir -p "$RUN/cni" "$RUN/state"
  cat >"$RUN/cni/10-weft.conflist" <<END
{"cniVersion": "0.4.0", "name": "weft", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "$PODS"}]], "routes": [{"dst": "0.0.0.0/0"}], "dataDir": "$DATA/cni"}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
END
  cat >"$RUN/containerd.toml" <<END
version = 2
root = "$DATA/containerd"
state = "$RUN/state"
[grpc]
  address = "$RUN/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "$DATA/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/weft-pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$RUN/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
END
  start containerd containerd --log-level warn --config "$RUN/containerd.toml"
}

kubelet_start() {
  cat >"$RUN/kubelet.yaml" <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
cgroupRoot: $CGROUP
failCgroupV1: false
failSwapOn: false
containerRuntimeEndpoint: unix://$RUN/containerd.sock
clusterDNS: [$DNS_IP]
clusterDomain: cluster.local
resolvConf: /dev/null
podLogsDir: $DATA/pods
tlsCertFile: $PKI/kubelet.crt
tlsPrivateKeyFile: $PKI/kubelet.key
authentication: {anonymous: {enabled: false}, webhook: {enabled: false}, x509: {clientCAFile: $PKI/ca.crt}}
authorization: {mode: AlwaysAllow}
maxPods: 250
podPidsLimit: -1
registryPullQPS: 0
serializeImagePulls: false
containerLogMaxSize: 20Mi
containerLogMaxFiles: 3
# The machine's disk is not ours to judge: no images are thrown away, and no pods for want of space.
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}
# Tests kill programs: what dies again and again waits 1 s, 2, 4, 8 and at most 10 s, not 5 minutes
# (the kubelet looks at such a pod every 10 to 15 s, so that it can be that much later).
featureGates: {KubeletCrashLoopBackOffMax: true, ReduceDefaultCrashLoopBackOffDecay: true}
crashLoopBackOff: {maxContainerRestartPeriod: 10s}
END
  until_ok 30 'an answer from containerd' ctr -a "$RUN/containerd.sock" version # the kubelet would give up without it
  start kubelet "$BIN/kubelet" --v=1 --kubeconfig="$PKI/node.kubeconfig" --config="$RUN/kubelet.yaml" \
    --root-dir="$DATA/kubelet" --hostname-override="$NAME" --node-ip="$NODE_IP"
}

# What other clusters run in pods: NetworkPolicies, which the bridge plugin does not know, and volumes.
node_rest() {
  start network-policies "$BIN/network-policies" --kubeconfig "$PKI/network-policies.kubeconfig" --node "$NAME" --services "$SERVICES"
  start volumes "$BIN/volumes" --kubeconfig "$PKI/volumes.kubeconfig" --node "$NAME" --folder "$DATA/volumes" \
    --provisioner weft.dev/folders
}

base_manifests() { sed -e "s#@DNS_IP@#$DNS_IP#" -e "s#@COREDNS@#$COREDNS#" "$HERE/manifests/base.yaml"; }
