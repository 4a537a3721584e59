#!/bin/sh
# Install what tests/slurm needs: Debian's Slurm and munge. None of their services is started; the tests start daemons of their own.
set -eu
if command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v sbatch >/dev/null && command -v munged >/dev/null; then
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "tests/slurm needs slurmctld, slurmd, sbatch and munged. This machine has no apt-get; install Slurm in its own way and try again." >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "tests/slurm needs Slurm and root: sudo make slurm-test, or first sudo apt-get install slurm-client slurmctld slurmd munge" >&2
    exit 1
fi
policy=/usr/sbin/policy-rc.d        # Debian's way of saying that an installed service is not to be started
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' > "$policy"
    chmod 755 "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends slurm-client slurmctld slurmd munge
