# The images of the test cluster, made from Debian's packages and the built programs:
# OCI archives under $CACHE/images, and a containerd store with all of them unpacked.
# shellcheck shell=bash

IMAGES=$CACHE/images

# name:tag of each, in the order of its making
base_images() {
  printf '%s\n' localhost/weft-pause:1 docker.io/library/busybox:1 "localhost/weft-coredns:$COREDNS" \
    "docker.io/library/nats:${NATS%.*}" "docker.io/library/postgres:$POSTGRES"
}

# images: makes what is missing. On kind there is nothing to make: it pulls the official ones.
images() {
  backend
  [ "$WEFT_BACKEND" = local ] || return 0
  need_root images
  build
  debian_install "${DEBIAN_IMAGES[@]}" "${DEBIAN_NODE[@]}" # also beside a cache that came from elsewhere
  [ ! -d "$(image_store)" ] || return 0
  lock images
  rm -rf "$IMAGES"/.root.* "$IMAGES"/*.oci.tar.* # of a run that was killed
  local name missing=()
  for name in $(base_images); do [ -f "$(image_file "$name")" ] || missing+=("$name"); done
  stages $((${#missing[@]} + 1))
  for name in "${missing[@]}"; do stage "$name" image_make "$name"; done
  stage 'all of them unpacked' image_store_make
}

# image_file NAME:TAG: the archive's name has a digest of all that it is made from, but
# Debian's packages: so it is made anew when an ingredient changes.
image_file() {
  local base=${1##*/}
  printf '%s/%s-%s.oci.tar' "$IMAGES" "${base/:/-}" "$(image_key "${base%:*}")"
}
image_key() {
  {
    declare -f "image_of_$1" image_make
    case $1 in
      weft-coredns) cat "$HERE/programs/coredns/main.go" && say "$COREDNS $KUBERNETES" ;;
      weft-pause) cat "$HERE/programs/pause.c" ;;
      postgres) cat "$HERE/images/postgres-entrypoint.sh" && say "$POSTGRES_SUITE" ;;
      nats) cat "$HERE/images/nats-entrypoint.sh" && say "$NATS" && declare -f image_of_busybox ;;
    esac
  } | sha256sum | cut -c1-8
}

image_make() { # NAME:TAG
  local name=$1 base=${1##*/} root
  mkdir -p "$IMAGES"
  root=$(mktemp -d "$IMAGES/.root.XXXXXX")
  chmod 0755 "$root"
  local options=()
  "image_of_${base%:*}" "$root"
  oci --name "$name" --rootfs "$root" --output "$(image_file "$name")" "${options[@]}"
  rm -rf "$root"
}

# image_of_<name> ROOT: fills the folder, and sets options for oci.

image_of_weft-pause() {
  cp -L "$BIN/pause" "$1/pause"
  options=(--entrypoint /pause)
}

image_of_weft-coredns() {
  cp -L "$BIN/coredns" "$1/coredns"
  options=(--entrypoint /coredns --user 65532)
}

image_of_busybox() {
  local applet
  mkdir -p "$1"/{bin,etc,root,tmp,usr/bin,var}
  chmod 1777 "$1/tmp"
  cp -L "$(command -v busybox)" "$1/bin/busybox"
  for applet in $(busybox --list); do [ "$applet" = busybox ] || ln -s busybox "$1/bin/$applet"; done
  ln -s ../../bin/env "$1/usr/bin/env"
  printf '%s\n' root:x:0:0:root:/root:/bin/sh nobody:x:65534:65534:nobody:/:/bin/false >"$1/etc/passwd"
  printf '%s\n' root:x:0: nobody:x:65534: >"$1/etc/group"
  options=(--cmd sh --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
}

image_of_nats() { # like the official Alpine one
  image_of_busybox "$1"
  mkdir -p "$1"/{usr/local/bin,etc/nats}
  cp -L "$BIN/nats-server" "$1/usr/local/bin/nats-server"
  install -m 0755 "$HERE/images/nats-entrypoint.sh" "$1/usr/local/bin/docker-entrypoint.sh"
  printf '%s\n' 'port: 4222' 'monitor_port: 8222' >"$1/etc/nats/nats-server.conf"
  options=(--entrypoint docker-entrypoint.sh --cmd nats-server --cmd --config --cmd /etc/nats/nats-server.conf
    --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin)
}

image_of_postgres() { # like the official Debian one, but for LANG (C.UTF-8) and the just-in-time compiler
  local lib=/usr/lib/postgresql/$POSTGRES pattern exclude=()
  # libLLVM is for the just-in-time compiler alone and would be most of the image;
  # PostgreSQL goes without when llvmjit.so is not there.
  for pattern in '/usr/share/man/*' '/usr/share/doc/*' '/usr/share/locale/*' '/usr/share/info/*' \
    '/usr/lib/*/libLLVM*' '/usr/lib/*/libz3*' "$lib/lib/llvmjit*" "$lib/lib/bitcode/*"; do
    exclude+=("--dpkgopt=path-exclude=$pattern")
  done
  # The user is made before the package can make it with another id, and no cluster in /var/lib.
  # shellcheck disable=SC2016
  mmdebstrap --variant=minbase --include="postgresql-$POSTGRES" "${exclude[@]}" \
    --essential-hook='echo "postgres:x:999:999:PostgreSQL:/var/lib/postgresql:/bin/bash" >>"$1/etc/passwd"' \
    --essential-hook='echo "postgres:x:999:" >>"$1/etc/group"' \
    --essential-hook='mkdir -p "$1/etc/postgresql-common/createcluster.d"' \
    --essential-hook='echo "create_main_cluster = false" >"$1/etc/postgresql-common/createcluster.d/none.conf"' \
    "$POSTGRES_SUITE" "$1.tar"
  tar -C "$1" -xf "$1.tar" --exclude='./dev/*'
  rm -f "$1.tar"
  rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/* "$1"/var/log/* "$1/etc/apt/sources.list" \
    "$1"/etc/apt/sources.list.d/*
  install -m 0755 "$HERE/images/postgres-entrypoint.sh" "$1/usr/local/bin/docker-entrypoint.sh"
  ln -s docker-entrypoint.sh "$1/usr/local/bin/docker-ensure-initdb.sh"
  mkdir -p "$1/docker-entrypoint-initdb.d"
  install -d -o 999 -g 999 -m 0755 "$1/var/lib/postgresql"
  install -d -o 999 -g 999 -m 1777 "$1/var/lib/postgresql/data"
  install -d -o 999 -g 999 -m 3777 "$1/run/postgresql" # not by /var/run, a link that would lead out of the root
  sed -i "s/^#listen_addresses = .*/listen_addresses = '*'/" "$1/usr/share/postgresql/$POSTGRES/postgresql.conf.sample"
  grep -q "^listen_addresses = '\*'" "$1/usr/share/postgresql/$POSTGRES/postgresql.conf.sample"
  options=(--entrypoint docker-entrypoint.sh --cmd postgres --stop-signal SIGINT
    --env "PATH=/usr/local/sbin:/usr/local/bin:$lib/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    --env LANG=C.UTF-8 --env "PG_MAJOR=$POSTGRES" --env PGDATA=/var/lib/postgresql/data)
}

# --- the store: a containerd root with all images unpacked, which `up` copies ------------

image_store() {
  local name
  printf '%s/containerd-%s' "$CACHE" "$(for name in $(base_images); do image_file "$name"; done | sha256sum | cut -c1-8)"
}

image_store_make() {
  local tmp=$CACHE/.building-store name pid
  rm -rf "$tmp"
  mkdir -p "$tmp/root" "$tmp/state"
  cat >"$tmp/config.toml" <<END
version = 2
root = "$tmp/root"
state = "$tmp/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "$tmp/sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "$tmp/opt"
END
  containerd --config "$tmp/config.toml" 9>&- &
  pid=$!
  # shellcheck disable=SC2064
  trap "kill $pid" EXIT
  until_ok 30 'an answer from containerd' ctr -a "$tmp/sock" version
  for name in $(base_images); do ctr -a "$tmp/sock" -n k8s.io images import "$(image_file "$name")"; done
  kill $pid
  wait $pid || true
  trap - EXIT
  rm -rf "$(image_store)"
  mv -T "$tmp/root" "$(image_store)"
  rm -rf "$tmp"
}

# image_store_copy DIR: containerd never changes an unpacked file or a blob, it only makes and
# deletes them, so these are hard links where they can be; its databases are copied.
image_store_copy() {
  local from d
  from=$(image_store)
  mkdir -p "$1"
  for d in content.v1.content/blobs snapshotter.v1.overlayfs/snapshots; do
    mkdir -p "$1/io.containerd.${d%/*}"
    cp -al "$from/io.containerd.$d" "$1/io.containerd.${d%/*}/" 2>/dev/null || {
      rm -rf "$1/io.containerd.$d"
      cp -a "$from/io.containerd.$d" "$1/io.containerd.${d%/*}/"
    }
  done
  cp -a "$from/io.containerd.snapshotter.v1.overlayfs/metadata.db" "$1/io.containerd.snapshotter.v1.overlayfs/"
  cp -a "$from/io.containerd.metadata.v1.bolt" "$1/"
}

# --- a root folder for our own programs ----------------------------------------------

# base_rootfs DIR [PACKAGE…]: the least a glibc program needs: the C library, libgcc_s, certificates,
# and a user 65532 (nonroot); or that and packages of Debian, with what they depend on. The packages are those of this
# machine's own release, whose C library is the one that programs built here are linked with.
base_rootfs() {
  [ $# -ge 1 ] || die 'base-rootfs DIR [PACKAGE…]'
  local dir=$1 made key
  shift
  have dpkg-deb || die 'base-rootfs needs a Debian'
  key=$({
    apt-cache policy libc6 libgcc-s1 ca-certificates "$@" | grep -E '^[a-z]|Candidate'
    declare -f base_rootfs_make base_rootfs_of_packages base_rootfs_users
  } | sha256sum | cut -c1-8)
  made=$CACHE/base-rootfs-$key
  if [ ! -d "$made" ]; then
    [ $# = 0 ] || need_root 'base-rootfs with packages'
    [ $# = 0 ] || debian_install mmdebstrap:mmdebstrap
    lock base-rootfs
    stages 1
    if [ $# = 0 ]; then stage 'base root folder' base_rootfs_make "$made"; else stage "root folder with $*" base_rootfs_of_packages "$made" "$@"; fi
  fi
  mkdir -p "$dir"
  cp -a "$made/." "$dir/"
}

base_rootfs_of_packages() { # MADE PACKAGE…
  local tmp=$CACHE/.building-rootfs pattern exclude=() suite
  suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
  for pattern in '/usr/share/man/*' '/usr/share/doc/*' '/usr/share/locale/*' '/usr/share/info/*'; do
    exclude+=("--dpkgopt=path-exclude=$pattern")
  done
  rm -rf "$tmp"
  mkdir -p "$tmp/root"
  chmod 0755 "$tmp/root"
  mmdebstrap --variant=essential --include="ca-certificates $(printf '%s ' "${@:2}")" "${exclude[@]}" "$suite" "$tmp/root.tar"
  tar -C "$tmp/root" -xf "$tmp/root.tar" --exclude='./dev/*'
  rm -rf "$tmp"/root/var/lib/apt/lists/* "$tmp"/root/var/cache/apt/* "$tmp"/root/var/log/*
  base_rootfs_users "$tmp/root"
  rm -rf "$1"
  mv -T "$tmp/root" "$1"
  rm -rf "$tmp"
}

base_rootfs_users() { # ROOT
  mkdir -p "$1/home/nonroot"
  printf '%s\n' root:x:0:0:root:/root:/sbin/nologin nonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin \
    nobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin >"$1/etc/passwd"
  printf '%s\n' root:x:0: nonroot:x:65532: nobody:x:65534: >"$1/etc/group"
  [ "$(id -u)" != 0 ] || chown 65532:65532 "$1/home/nonroot"
}

base_rootfs_make() {
  local tmp=$CACHE/.building-rootfs deb root
  root=$tmp/root
  rm -rf "$tmp"
  mkdir -p "$tmp" "$root"/{etc/ssl/certs,tmp}
  chmod 0755 "$root"
  (cd "$tmp" && with_package_lists apt-get download libc6 libgcc-s1 ca-certificates)
  for deb in "$tmp"/*.deb; do dpkg-deb -x "$deb" "$root"; done
  # ca-certificates puts its file together when it is installed
  find "$root/usr/share/ca-certificates" -name '*.crt' | sort | xargs cat >"$root/etc/ssl/certs/ca-certificates.crt"
  rm -rf "$root"/usr/share/{doc,man,lintian,locale,ca-certificates,bug} "$root"/usr/lib/*/{gconv,audit} "$root"/usr/sbin \
    "$root"/etc/{ld.so.conf.d,ca-certificates}
  chmod 1777 "$root/tmp"
  base_rootfs_users "$root"
  printf 'hosts: files dns\n' >"$root/etc/nsswitch.conf"
  rm -rf "$1"
  mv -T "$root" "$1"
  rm -rf "$tmp"
}
