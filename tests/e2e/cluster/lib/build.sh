# The cluster's programs, built from Go modules into the cache:
#   $CACHE/<name>-<version>/bin/<program>, and symlinks to the current ones in $CACHE/bin.
# shellcheck shell=bash

# Every program, in the order of need: name:version.
PROGRAMS=(
  "kubectl:$KUBERNETES" "helm:$HELM" "untt:$HELM_UNITTEST"
  "nats-server:$NATS" "etcd:$ETCD"
  "kube-apiserver:$KUBERNETES" "kube-controller-manager:$KUBERNETES" "kube-scheduler:$KUBERNETES"
  "kubelet:$KUBERNETES" "kube-proxy:$KUBERNETES"
  "coredns:$COREDNS" "local-path-provisioner:$LOCAL_PATH_PROVISIONER" "kube-router:$KUBE_ROUTER"
  "pause:1"
)
# What a machine with kind needs: kind brings the rest.
PROGRAMS_BESIDE_KIND=" kubectl helm untt "

# build [PROGRAM…]: builds what is missing (of the named programs, or of all).
build() {
  backend
  local entry name version todo=()
  for entry in "${PROGRAMS[@]}"; do
    name=${entry%%:*} version=${entry#*:}
    if [ $# -gt 0 ]; then
      case " $* " in *" $name "*) ;; *) continue ;; esac
    elif [ "$WEFT_BACKEND" = kind ]; then
      case $PROGRAMS_BESIDE_KIND in *" $name "*) ;; *) continue ;; esac
    fi
    [ -x "$(program_path "$name" "$version")" ] && program_link "$name" "$version" && continue
    todo+=("$entry")
  done
  for name in "$@"; do
    case " ${PROGRAMS[*]}" in *" $name:"*) ;; *) die "build: there is no program '$name'" ;; esac
  done
  [ ${#todo[@]} -gt 0 ] || return 0

  lock build
  [ "$WEFT_BACKEND" = kind ] || debian_install "${DEBIAN_TOOLS[@]}" # a C compiler and library, for pause alone
  need_go
  stages ${#todo[@]}
  for entry in "${todo[@]}"; do
    name=${entry%%:*} version=${entry#*:}
    # Another run may have built it while this one waited for the lock.
    if [ ! -x "$(program_path "$name" "$version")" ]; then
      stage "$name $version" program_build "$name" "$version"
    else
      STAGE=$((STAGE + 1))
    fi
    program_link "$name" "$version"
  done
}

program_path() { printf '%s' "$CACHE/$1-$2/bin/$1"; }

program_link() {
  local link="../$1-$2/bin/$1"
  [ "$(readlink "$BIN/$1" 2>/dev/null)" = "$link" ] && return
  mkdir -p "$BIN"
  ln -sfn "$link" "$BIN/$1.new" && mv -T "$BIN/$1.new" "$BIN/$1" # at no moment without a program
}

# program_build NAME VERSION: in a temporary folder, which gets the final name when all went well.
program_build() {
  local name=$1 version=$2 tmp=$CACHE/.building-$1
  rm -rf "$tmp"
  mkdir -p "$tmp/bin" "$tmp/module"
  (
    cd "$tmp/module" || exit
    export CGO_ENABLED=0 GOFLAGS=-mod=mod GOBIN=$tmp/bin GOWORK=off
    go() { command go "$@" || (sleep 10 && command go "$@") || (sleep 60 && command go "$@"); } # hundreds of downloads
    "build_$name" "$version" "$tmp/bin/$name"
  )
  [ -x "$tmp/bin/$name" ]
  rm -rf "$tmp/module" "${CACHE:?}/$name-$version"
  mv -T "$tmp" "$CACHE/$name-$version"
}

need_go() {
  have go || die "missing: Go $GO_AT_LEAST or newer (https://go.dev/dl)"
  local is
  is=$(go env GOVERSION)
  is=${is#go}
  [ "$(printf '%s\n%s\n' "$GO_AT_LEAST" "$is" | sort -V | head -n1)" = "$GO_AT_LEAST" ] ||
    [ "$(go env GOTOOLCHAIN)" != local ] || die "Go is $is; $GO_AT_LEAST or newer is needed (https://go.dev/dl)"
}

# --- one function for each program: build_<name> VERSION OUTPUT --------------------

# Modules that build by themselves.
build_helm() { go install -trimpath -ldflags "-s -w -X helm.sh/helm/v3/internal/version.version=v$1" "helm.sh/helm/v3/cmd/helm@v$1"; }
build_nats-server() { go install -trimpath -ldflags '-s -w' "github.com/nats-io/nats-server/v2@v$1"; }

# Modules whose go.mod replaces others by folders of their own repository: those replacements
# count only in the main module, so a wrapper module requires the published versions instead.
wrapped() { # OUTPUT PACKAGE MODULE VERSION LDFLAGS [REPLACEMENT…]
  local output=$1 package=$2 module=$3 version=$4 ldflags=$5 replacement
  shift 5
  go mod init wrapper
  go mod edit -require "$module@$version"
  for replacement in "$@"; do go mod edit -replace "$replacement"; done
  go build -trimpath -ldflags "-s -w $ldflags" -o "$output" "$package"
}
build_etcd() { wrapped "$2" go.etcd.io/etcd/server/v3 go.etcd.io/etcd/server/v3 "v$1" ''; }
build_coredns() { wrapped "$2" github.com/coredns/coredns github.com/coredns/coredns "v$1" ''; }
build_local-path-provisioner() {
  local m=github.com/rancher/local-path-provisioner
  wrapped "$2" $m $m "v$1" "-X main.VERSION=v$1"
}
build_untt() {
  local m=github.com/helm-unittest/helm-unittest
  wrapped "$2" $m/cmd/helm-unittest $m "v$1" '' \
    github.com/vmware-labs/yaml-jsonpath=github.com/helm-unittest/yaml-jsonpath@v0.4.0
}
build_kube-router() { # the fork's go.mod keeps the original's path
  local m=github.com/cloudnativelabs/kube-router/v2
  wrapped "$2" $m/cmd/kube-router $m "v$1" '' "$m=github.com/k3s-io/kube-router/v2@v$1"
}

# Kubernetes 1.x is published with its staging repositories beside it as 0.x.
kubernetes() { # PROGRAM VERSION OUTPUT
  local dir m replacements=() minor=${2#1.}
  dir=$(go mod download -json "k8s.io/kubernetes@v$2" | sed -n 's/.*"Dir": "\(.*\)".*/\1/p')
  while read -r m _; do replacements+=("$m=$m@v0.$minor"); done < <(grep -oE 'k8s.io/[a-z0-9-]+ => \./staging' "$dir/go.mod")
  local x=k8s.io/component-base/version y=k8s.io/client-go/pkg/version p ldflags=''
  for p in $x $y; do # without them every program says it is v0.0.0
    ldflags+=" -X $p.gitVersion=v$2 -X $p.gitMajor=1 -X $p.gitMinor=${minor%%.*}"
  done
  wrapped "$3" "k8s.io/kubernetes/cmd/$1" k8s.io/kubernetes "v$2" "$ldflags" "${replacements[@]}"
}
build_kubectl() { kubernetes kubectl "$@"; }
build_kube-apiserver() { kubernetes kube-apiserver "$@"; }
build_kube-controller-manager() { kubernetes kube-controller-manager "$@"; }
build_kube-scheduler() { kubernetes kube-scheduler "$@"; }
build_kubelet() { kubernetes kubelet "$@"; }
build_kube-proxy() { kubernetes kube-proxy "$@"; }

# The program that holds a pod's namespaces, and the node's.
build_pause() { gcc -Os -static -s -o "$2" "$HERE/images/pause.c"; }
