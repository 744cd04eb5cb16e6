# What is needed from Debian.
# shellcheck shell=bash

# command:package pairs. A command that is there, from wherever, is good enough.
DEBIAN_TOOLS=(gcc:gcc flock:util-linux)
DEBIAN_IMAGES=(umoci:umoci mmdebstrap:mmdebstrap busybox:busybox-static)
DEBIAN_NODE=(openssl:openssl containerd:containerd ctr:containerd runc:runc iptables:iptables conntrack:conntrack
  ebtables:ebtables socat:socat ipset:ipset ip:iproute2 modprobe:kmod nsenter:util-linux setpriv:util-linux sysctl:procps)

# debian_install PAIR…: installs what is missing; not root, it says so in one line.
debian_install() {
  local pair missing=()
  for pair in "$@"; do
    have "${pair%%:*}" || missing+=("${pair#*:}")
  done
  case " $* " in *" containerd:"*)
    [ -x /usr/lib/cni/bridge ] || missing+=(containernetworking-plugins)
    ;;
  esac
  case " $* " in *" gcc:"*) # the node's pause program is linked statically
    gcc -print-file-name=libc.a 2>/dev/null | grep -q / || missing+=(libc6-dev)
    ;;
  esac
  [ ${#missing[@]} -gt 0 ] || return 0
  mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
  have apt-get || die "missing, and this is no Debian: ${missing[*]}"
  [ "$(id -u)" = 0 ] || die "missing; as root: apt-get install --no-install-recommends ${missing[*]}"
  say "from Debian: ${missing[*]}"
  local log
  log=$(mktemp "${TMPDIR:-/tmp}/weft-apt.XXXXXX")
  # Package lists may be old or not there at all: only then are they fetched.
  with_package_lists apt_install "${missing[@]}" >"$log" 2>&1 || {
    tail -n 20 "$log" >&2
    die "apt-get could not install: ${missing[*]}"
  }
  rm -f "$log"
}

apt_install() { DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends -o DPkg::Lock::Timeout=600 "$@"; }

# with_package_lists COMMAND…: again with new lists when it fails, for a while: another program may hold their lock.
with_package_lists() {
  local pause
  "$@" && return
  for pause in 0 10 60 120; do
    sleep "$pause"
    apt-get update && "$@" && return
  done
  return 1
}
