# The cluster's programs. Those written in Go are one module (programs/go.mod) and are built by one `go build`, so that what
# they share is compiled once. They lie in $CACHE/programs-<key>/bin, with symlinks to the current ones in $CACHE/bin.
# shellcheck shell=bash

# What each is built of.
declare -A PACKAGES=(
  [kubectl]=k8s.io/kubernetes/cmd/kubectl
  [helm]=helm.sh/helm/v3/cmd/helm
  [etcd]=go.etcd.io/etcd/server/v3
  [kube-apiserver]=k8s.io/kubernetes/cmd/kube-apiserver
  [kube-controller-manager]=k8s.io/kubernetes/cmd/kube-controller-manager
  [kube-scheduler]=k8s.io/kubernetes/cmd/kube-scheduler
  [kubelet]=k8s.io/kubernetes/cmd/kubelet
  [kube-proxy]=k8s.io/kubernetes/cmd/kube-proxy
  [coredns]=./coredns
  [network-policies]=./network-policies
  [volumes]=./volumes
  [nats-server]=github.com/nats-io/nats-server/v2
  [untt]=github.com/helm-unittest/helm-unittest/cmd/helm-unittest
  [kwok]=sigs.k8s.io/kwok/cmd/kwok@v0.8.0 # it does not compile with this Kubernetes: by its own go.mod
  [pause]=pause.c
)
# What a cluster needs. The others are for some tests alone, and are built when they are named.
PROGRAMS_local=(kubectl helm etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy
  coredns network-policies volumes nats-server pause)
PROGRAMS_kind=(kubectl helm)

# Of a build with nothing in Go's cache: seconds on one core.
BUILD_SECONDS_local=820 BUILD_SECONDS_kind=350

# build [PROGRAM…]: builds what is missing (of the named programs, or of what a cluster needs).
build() {
  local name missing packages=() alone=()
  for name; do [ -n "${PACKAGES[$name]:-}" ] || die "build: there is no program '$name'; there are: ${!PACKAGES[*]}"; done
  mapfile -t missing < <(programs_missing "$@")
  [ ${#missing[@]} -gt 0 ] || return 0
  lock build
  mapfile -t missing < <(programs_missing "$@") # another run may have built them while this one waited
  [ ${#missing[@]} -gt 0 ] || return 0

  case " ${missing[*]} " in *' pause '*) debian_install "${DEBIAN_TOOLS[@]}" ;; esac
  need_go
  rm -rf "$PROGRAMS/.new"
  mkdir -p "$PROGRAMS/.new" "$PROGRAMS/bin"
  for name in "${missing[@]}"; do
    case ${PACKAGES[$name]} in *@*) alone+=("${PACKAGES[$name]}") ;; *.c) ;; *) packages+=("${PACKAGES[$name]}") ;; esac
  done
  if [ ${#packages[@]} -gt 0 ]; then
    stages 2
    stage 'Go modules' go_download "${packages[@]}"
    stage "${#packages[@]} programs" go_build "${packages[@]}"
  fi
  [ ${#alone[@]} = 0 ] || CGO_ENABLED=0 GOFLAGS='' GOWORK=off GOBIN=$PROGRAMS/.new go install -trimpath -ldflags '-s -w' "${alone[@]}"
  for name in "${missing[@]}"; do
    [ "$name" != pause ] || gcc -Os -static -s -o "$PROGRAMS/.new/pause" "$HERE/programs/pause.c"
    mv -T "$PROGRAMS/.new/$(go_name "${PACKAGES[$name]}")" "$PROGRAMS/bin/$name"
    program_link "$name"
  done
  rm -rf "$PROGRAMS/.new"
}

# programs_missing [PROGRAM…]: those of them that have to be built; links the others.
programs_missing() {
  local name
  backend
  if [ $# = 0 ]; then
    local -n needed=PROGRAMS_$WEFT_BACKEND
    set -- "${needed[@]}"
  fi
  for name; do
    if [ -x "$PROGRAMS/bin/$name" ]; then
      program_link "$name"
    elif [ "$WEFT_BACKEND" = local ] || ! on_path "$name"; then
      say "$name"
    fi
  done
}

program_link() {
  local link="../${PROGRAMS##*/}/bin/$1"
  [ "$(readlink "$BIN/$1" 2>/dev/null)" = "$link" ] && return
  mkdir -p "$BIN"
  ln -sfn "$link" "$BIN/$1.new" && mv -T "$BIN/$1.new" "$BIN/$1" # at no moment without a program
}

# on_path PROGRAM: the machine has one that is good enough beside kind, whose Kubernetes may be newer than ours.
on_path() {
  local version
  case $1 in
    kubectl)
      version=$(command kubectl version --client -o json 2>/dev/null | sed -nE 's/.*"gitVersion": "v(1\.[0-9]+)\..*/\1/p')
      at_least "${KUBERNETES%.*}" "$version"
      ;;
    helm) # 3.17 is the first with --take-ownership
      version=$(command helm version --short 2>/dev/null | sed -nE 's/^v(3\.[0-9]+)\..*/\1/p')
      at_least 3.17 "$version"
      ;;
    *) return 1 ;;
  esac
}
at_least() { [ -n "$2" ] && [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

need_go() {
  have go || die "missing: Go $GO_AT_LEAST or newer (https://go.dev/dl)"
  local is
  is=$(go env GOVERSION)
  at_least "$GO_AT_LEAST" "${is#go}" || [ "$(go env GOTOOLCHAIN)" != local ] ||
    die "Go is ${is#go}; $GO_AT_LEAST or newer is needed (https://go.dev/dl)"
}

# --- Go ---------------------------------------------------------------------------

go_here() { (cd "$HERE/programs" && CGO_ENABLED=0 GOFLAGS='' GOWORK=off go "$@"); }

# go_name PACKAGE: the file that `go build` writes.
go_name() { sed -E 's#@.*##; s#/v[0-9]+$##; s#.*/##; s#\.c$##' <<<"$1"; }

# Hundreds of small downloads: one that fails is tried again.
go_download() {
  go_here list -deps "$@" >/dev/null || (sleep 10 && go_here list -deps "$@" >/dev/null) || (sleep 60 && go_here list -deps "$@" >/dev/null)
}

go_build() { # PACKAGE…
  local p flags='-s -w' minor=${KUBERNETES#1.}
  for p in k8s.io/component-base/version k8s.io/client-go/pkg/version; do # without them every program says it is v0.0.0
    flags+=" -X $p.gitVersion=v$KUBERNETES -X $p.gitMajor=1 -X $p.gitMinor=${minor%%.*}"
  done
  flags+=" -X helm.sh/helm/v3/internal/version.version=v$HELM"
  local total
  total=$(go_here list -deps -trimpath -f '{{if .Stale}}{{.ImportPath}}{{end}}' "$@" | wc -l)
  go_here build -v -trimpath -ldflags "$flags" -o "$PROGRAMS/.new/" "$@" 2>&1 | go_progress "$total"
}

# go_progress TOTAL: of the names of packages, one a line as they are compiled, makes a line every half minute.
go_progress() {
  local total=$1 count=0 begun=$SECONDS next=$((SECONDS + 30)) line past
  while IFS= read -r line; do
    say "$line"
    case $line in *' '* | '#'*) continue ;; esac
    count=$((count + 1))
    [ $SECONDS -ge $next ] || continue
    next=$((SECONDS + 30)) past=$((SECONDS - begun))
    progress "$count of $total packages after $(duration $past); about $(duration $((past * (total - count) / count))) more"
  done
}

# What the programs are made from, the recipe included, so that a change of it is a new folder.
PROGRAMS=$CACHE/programs-$({
  find "$HERE/programs" -type f -print0 | sort -z | xargs -0 cat
  declare -f go_build
} | sha256sum | cut -c1-8)
