# Keys, certificates and tokens of the local cluster.
# shellcheck shell=bash

PKI=$RUN/pki

pki_make() {
  mkdir -p "$PKI"
  local subject name uid group token
  openssl_key sa
  openssl pkey -in "$PKI/sa.key" -pubout -out "$PKI/sa.pub"
  openssl_key ca
  openssl req -x509 -new -key "$PKI/ca.key" -days 3650 -subj "/CN=weft-$NAME" -out "$PKI/ca.crt"
  certificate apiserver /CN=kube-apiserver serverAuth \
    "DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local,DNS:localhost,IP:127.0.0.1,IP:$NODE_IP,IP:$API_IP"
  certificate kubelet "/CN=$NAME" serverAuth "DNS:$NAME,IP:$NODE_IP"
  certificate apiserver-to-kubelet /O=system:masters/CN=apiserver clientAuth DNS:apiserver
  while read -r name uid subject group; do
    token=$(openssl rand -hex 24)
    say "$token,$subject,$uid${group:+,$group}" >>"$PKI/tokens.csv"
    kubeconfig "$token" >"$PKI/$name.kubeconfig"
  done <<END
admin 1 admin system:masters
kcm 2 system:kube-controller-manager
scheduler 3 system:kube-scheduler
proxy 4 system:kube-proxy
node 5 system:node:$NAME system:nodes
network-policies 6 system:network-policies
volumes 7 system:volumes
END
}

openssl_key() { openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$PKI/$1.key" 2>/dev/null; }

certificate() { # NAME SUBJECT USE ALTERNATIVE-NAMES
  openssl_key "$1"
  openssl req -new -key "$PKI/$1.key" -subj "$2" |
    openssl x509 -req -CA "$PKI/ca.crt" -CAkey "$PKI/ca.key" -CAcreateserial -days 3650 -out "$PKI/$1.crt" \
      -extfile <(printf '%s\n' "subjectAltName=$4" "extendedKeyUsage=$3" basicConstraints=CA:FALSE) 2>/dev/null
}

kubeconfig() { # TOKEN: a file that needs no other
  cat <<END
apiVersion: v1
kind: Config
current-context: weft-$NAME
contexts: [{name: weft-$NAME, context: {cluster: weft-$NAME, user: weft-$NAME}}]
clusters: [{name: weft-$NAME, cluster: {server: "https://$NODE_IP:6443", certificate-authority-data: $(base64 -w0 "$PKI/ca.crt")}}]
users: [{name: weft-$NAME, user: {token: $1}}]
END
}
