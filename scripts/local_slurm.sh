#!/usr/bin/env bash
# A Slurm cluster of one node on this machine, for trying `hydra/launcher=slurm` and for its test.
#
#   scripts/local_slurm.sh install        Debian or Ubuntu packages (needs root)
#   scripts/local_slurm.sh start FOLDER   munge, MariaDB, slurmdbd, slurmctld and slurmd, with all their state in FOLDER
#   scripts/local_slurm.sh stop FOLDER
#
# Then `export SLURM_CONF=FOLDER/slurm.conf`. Start needs root, ports 6817 to 6820 and about ten seconds.
set -euo pipefail

say() { echo "local_slurm: $*" >&2; }

install() {
    export DEBIAN_FRONTEND=noninteractive
    # No service starts by itself: this script brings up its own, in its own folder.
    printf '#!/bin/sh\nexit 101\n' > /usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends munge mariadb-server slurmdbd slurmctld slurmd slurm-client > /dev/null
}

wait_for() { # seconds, what, command…
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" > /dev/null 2>&1; do
        if ((SECONDS >= deadline)); then
            say "$what did not come up; see the logs in $FOLDER"
            exit 1
        fi
        sleep 0.2
    done
}

settings() {
    local cores memory
    cores=$(nproc)
    memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
    cat > "$FOLDER/slurm.conf" << CONF
ClusterName=local
SlurmctldHost=$HOST
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge.socket,cred_expire=5
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd.pid
SlurmctldLogFile=$FOLDER/slurmctld.log
SlurmdLogFile=$FOLDER/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=1,sched_interval=2,sched_min_interval=100000
ReturnToService=2
KillWait=5
JobRequeue=1
MpiDefault=none
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$HOST
AccountingStorageUser=root
AccountingStoragePass=$FOLDER/munge.socket
JobAcctGatherType=jobacct_gather/none
NodeName=$HOST CPUs=$cores RealMemory=$memory State=UNKNOWN
PartitionName=local Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    cat > "$FOLDER/slurmdbd.conf" << CONF
AuthType=auth/munge
AuthInfo=socket=$FOLDER/munge.socket
DbdHost=$HOST
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StoragePass=local
StorageLoc=slurm
LogFile=$FOLDER/slurmdbd.log
PidFile=$FOLDER/slurmdbd.pid
CONF
    chmod 600 "$FOLDER/slurmdbd.conf"
}

start() {
    for program in munged mariadbd slurmdbd slurmctld slurmd sbatch; do
        command -v "$program" > /dev/null || { say "$program is not installed: scripts/local_slurm.sh install"; exit 1; }
    done
    mkdir -p "$FOLDER"/{state,spool}
    chmod 755 "$FOLDER"
    settings
    # --force: the folder need not be the one that the packages make.
    dd if=/dev/urandom of="$FOLDER/munge.key" bs=1024 count=1 status=none
    chmod 600 "$FOLDER/munge.key"
    munged --force --key-file="$FOLDER/munge.key" --socket="$FOLDER/munge.socket" --pid-file="$FOLDER/munged.pid" \
        --log-file="$FOLDER/munged.log" --seed-file="$FOLDER/munged.seed"
    mkdir -p /run/mysqld
    mariadb-install-db --no-defaults --user=root --datadir="$FOLDER/database" --skip-test-db > "$FOLDER/mariadb-install.log" 2>&1
    setsid mariadbd --no-defaults --user=root --datadir="$FOLDER/database" --socket="$FOLDER/mariadb.socket" --skip-networking \
        --pid-file="$FOLDER/mariadbd.pid" --log-error="$FOLDER/mariadbd.log" --innodb-buffer-pool-size=64M < /dev/null > /dev/null 2>&1 &
    wait_for 30 MariaDB mariadb --no-defaults --socket="$FOLDER/mariadb.socket" -e 'select 1'
    mariadb --no-defaults --socket="$FOLDER/mariadb.socket" -e "create database slurm"
    # The Slurm client library finds a database on this machine by this variable alone.
    export MYSQL_UNIX_PORT="$FOLDER/mariadb.socket" SLURM_CONF="$FOLDER/slurm.conf"
    slurmdbd < /dev/null > /dev/null 2>&1
    wait_for 30 slurmdbd sacctmgr -n list cluster
    sacctmgr -i add cluster local > /dev/null 2>&1 || true
    slurmctld -c < /dev/null > /dev/null 2>&1
    slurmd -c < /dev/null > /dev/null 2>&1
    wait_for 30 "the node" bash -c "sinfo -h -o %t | grep -q idle"
    say "one node, $(nproc) cores; export SLURM_CONF=$FOLDER/slurm.conf"
}

stop() {
    for daemon in slurmd slurmctld slurmdbd mariadbd munged; do
        [ -f "$FOLDER/$daemon.pid" ] && kill "$(cat "$FOLDER/$daemon.pid")" 2> /dev/null || true
    done
}

HOST=$(hostname -s)
case "${1:-} ${2:+folder}" in
    "install ") install ;;
    "start folder") mkdir -p "$2" && FOLDER=$(realpath "$2") && start ;;
    "stop folder") FOLDER=$(realpath "$2") && stop ;;
    *) say "usage: local_slurm.sh install | start FOLDER | stop FOLDER" && exit 2 ;;
esac
