# A folder becomes an OCI image archive, without a container engine.
# shellcheck shell=bash

# oci --name NAME:TAG --rootfs DIR [--rootfs DIR…] --output FILE [--entrypoint WORD]… [--cmd WORD]…
#     [--env K=V]… [--user U] [--workdir DIR] [--stop-signal S] [--label K=V]…
# Every --rootfs is one layer. The archive carries its full name (io.containerd.image.name),
# so that containerd, kind and Docker load it under that name.
oci() {
  local name='' output='' roots=() config=()
  while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || die "oci: $1 needs a value"
    case $1 in
      --name) name=$2 ;;
      --output) output=$2 ;;
      --rootfs)
        [ -d "$2" ] || die "oci: there is no folder $2"
        roots+=("$2")
        ;;
      --entrypoint) config+=(--config.entrypoint "$2") ;;
      --cmd) config+=(--config.cmd "$2") ;;
      --env) config+=(--config.env "$2") ;;
      --user) config+=(--config.user "$2") ;;
      --workdir) config+=(--config.workingdir "$2") ;;
      --stop-signal) config+=(--config.stopsignal "$2") ;;
      --label) config+=(--config.label "$2") ;;
      *) die "oci: unknown option $1" ;;
    esac
    shift 2
  done
  [[ $name == *:* ]] || die 'oci: --name NAME:TAG is missing'
  [ -n "$output" ] || die 'oci: --output FILE is missing'
  [ ${#roots[@]} -gt 0 ] || die 'oci: --rootfs DIR is missing'
  have umoci || debian_install umoci:umoci

  local work root rootless=()
  # A user who is not root gives the image root's files all the same.
  [ "$(id -u)" = 0 ] || rootless=(--rootless --uid-map "0:$(id -u):1" --gid-map "0:$(id -g):1")
  mkdir -p "$(dirname "$output")"
  work=$(mktemp -d "$output.XXXXXX")
  (
    set -e
    umoci init --layout "$work/oci"
    umoci new --image "$work/oci:image"
    for root in "${roots[@]}"; do
      umoci insert "${rootless[@]}" --image "$work/oci:image" "$root" /
    done
    umoci config --image "$work/oci:image" "${config[@]}"
    umoci gc --layout "$work/oci" # the steps in between
    oci_rename "$work/oci" "$name"
    oci_pack "$work/oci" "$work/archive"
    chmod 0644 "$work/archive"
    mv "$work/archive" "$output"
  ) || {
    rm -rf "$work"
    die "oci: $name could not be made"
  }
  rm -rf "$work"
  say "$name: $(du -h --apparent-size "$output" | cut -f1) in $output"
}

oci_pack() { tar -C "$1" --sort=name --owner=0 --group=0 --numeric-owner -cf "$2" .; }

# oci_rename LAYOUT NAME:TAG: writes the full name into the layout's index. `docker save` has a list of its own beside it,
# and until Docker 25 nothing but that.
oci_rename() {
  local index=$1/index.json list=$1/manifest.json name=$2 ref=org.opencontainers.image.ref.name full=io.containerd.image.name
  if [ -f "$list" ]; then
    sed -i -E "s#\"RepoTags\":\[[^]]*\]#\"RepoTags\":[\"$name\"]#" "$list"
    grep -q "\"RepoTags\":\[\"$name\"\]" "$list" || die "$list has no image to name $name"
    [ -f "$index" ] || return 0
  fi
  sed -i -E -e "s#\"$full\":\"[^\"]*\",##; s#,\"$full\":\"[^\"]*\"##" -e "s#\"$ref\":\"[^\"]*\"#\"$ref\":\"${name##*:}\",\"$full\":\"$name\"#" "$index"
  grep -q "\"$full\":\"$name\"" "$index" || die "$index has no image to name $name"
}
