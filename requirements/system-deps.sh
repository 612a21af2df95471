#!/bin/sh
# Debian packages for `SYSTEM=1 make test` and `make bench`.  Root.
set -eu
packages="iproute2 iptables procps curl nginx faketime docker-registry containerd docker.io podman skopeo"
missing=""
for package in $packages; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
if [ -z "$missing" ]; then
    echo "system packages are installed: $packages"
    exit 0
fi
if [ "$(id -u)" != 0 ]; then
    echo "these Debian packages are missing:$missing; run as root: make system-deps" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
# Keep Debian from starting the services it installs: the tests start their own.
if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d
    chmod +x /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
apt-get update -qq
# shellcheck disable=SC2086  # a list of package names
apt-get install -y -qq --no-install-recommends $missing
