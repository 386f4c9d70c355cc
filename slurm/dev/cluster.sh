#!/usr/bin/env bash
# A real SLURM cluster of several nodes on one Debian or Ubuntu machine, for development and tests. See README.md.
#
#   cluster.sh start | stop | status | env | kill-node NAME | start-node NAME
#
# All of it lies in $CLUSTER_DIR, which `stop` removes: no systemd, no accounting, nothing in /etc.
set -euo pipefail

CLUSTER_DIR=${CLUSTER_DIR:-/tmp/sluice-cluster-$UID} # short: the path of a socket ends after 107 bytes
CLUSTER_NODES=${CLUSTER_NODES:-2}                    # 127.0.1.1, 127.0.1.2, ...: names that need no DNS
CLUSTER_CPUS=${CLUSTER_CPUS:-4}                      # of each node; more than there are will do
CLUSTER_GPUS=${CLUSTER_GPUS:-2}                      # of each node; SLURM hands them out, but nothing is behind them
CLUSTER_PORT=${CLUSTER_PORT:-17000}                  # slurmctld's; each node takes one of the next

export SLURM_CONF=$CLUSTER_DIR/slurm.conf
PATH=$PATH:/usr/sbin
umask 022

fail() {
    echo "error: $*" >&2
    exit 2
}

node_names() { for number in $(seq "$CLUSTER_NODES"); do echo "127.0.1.$number"; done; }

pid_of() { cat "$CLUSTER_DIR/$1.pid" 2>/dev/null; }

is_alive() { # is_alive DAEMON: numbers of processes are given away again, so its name has to fit
    local pid
    pid=$(pid_of "$1") && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${1%%-*}" ]
}

is_gone() { ! is_alive "$1"; }

await() { # await SECONDS WHAT COMMAND...
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || { echo "error: no $what; see $CLUSTER_DIR/*.log" >&2 && return 1; }
        sleep 0.1
    done
}

spawn() { # spawn DAEMON COMMAND...: in a session of its own, so that Ctrl-C in a shell is not meant for it
    local daemon=$1
    shift
    setsid "$@" </dev/null >>"$CLUSTER_DIR/$daemon.log" 2>&1 &
    echo $! >"$CLUSTER_DIR/$daemon.pid"
}

halt() { # halt SIGNAL DAEMON...: ask all, then insist
    local signal=$1 daemon
    shift
    for daemon in "$@"; do
        is_gone "$daemon" || kill -s "$signal" "$(pid_of "$daemon")"
    done
    for daemon in "$@"; do
        await 10 "end of $daemon" is_gone "$daemon" || kill -s KILL "$(pid_of "$daemon")"
        rm -f "$CLUSTER_DIR/$daemon.pid"
    done
}

job_processes() { # job_processes [NODE]: what our jobs run, on one node or on all
    local environment parent
    for environment in $(grep -lszxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ); do
        grep -qsz "^SLURMD_NODENAME=${1:-.*}\$" "$environment" || continue
        basename "${environment%/environ}"
        parent=$(sed -n 's/^PPid:\t//p' "${environment%/environ}/status" 2>/dev/null) || continue
        # A slurmstepd erases its own environment, and is known as the parent of a task.
        [ "$(cat "/proc/$parent/comm" 2>/dev/null)" != slurmstepd ] || echo "$parent"
    done | sort -un
}

kill_jobs() { # kill_jobs [NODE]
    for process in $(job_processes "$@"); do
        kill -s KILL "$process" 2>/dev/null || true
    done
}

configure() {
    local host name gpu port=$CLUSTER_PORT
    host=$(hostname -s)
    cat >"$SLURM_CONF" <<CONF
ClusterName=dev
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$CLUSTER_PORT
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until the credential of its last start has run out: two minutes, if nothing is said.
AuthInfo=socket=$CLUSTER_DIR/munge.sock,cred_expire=10
StateSaveLocation=$CLUSTER_DIR/state
SlurmdSpoolDir=$CLUSTER_DIR/spool-%n
SlurmctldPidFile=$CLUSTER_DIR/own-slurmctld.pid
SlurmdPidFile=$CLUSTER_DIR/own-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=15
MinJobAge=3600
# Not the same numbers again after a restart: they name files and choose ports.
FirstJobId=$(($(date +%s) % 1000000 + 1000))
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1,bf_resolution=1
EnforcePartLimits=ALL
AccountingStorageType=accounting_storage/none
GresTypes=gpu
CONF
    for name in $(node_names); do
        port=$((port + 1))
        mkdir -p "$CLUSTER_DIR/spool-$name"
        for gpu in $(seq "$CLUSTER_GPUS"); do
            ln -s /dev/null "$CLUSTER_DIR/spool-$name/gpu$gpu"
            echo "NodeName=$name Name=gpu File=$CLUSTER_DIR/spool-$name/gpu$gpu" >>"$CLUSTER_DIR/gres.conf"
        done
        echo "NodeName=$name NodeHostname=$host NodeAddr=$name Port=$port CPUs=$CLUSTER_CPUS Gres=gpu:$CLUSTER_GPUS" >>"$SLURM_CONF"
    done
    cat >>"$SLURM_CONF" <<CONF
PartitionName=low Nodes=ALL Default=YES MaxTime=1-0 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL MaxTime=1-0 PriorityTier=10 PreemptMode=OFF
CONF
}

all_nodes_up() { [ "$(sinfo -h -N -p low -o %t | grep -c '^idle$')" = "$CLUSTER_NODES" ]; }

start_node() { spawn "slurmd-$1" slurmd -D -N "$1"; }

start() {
    local tool
    for tool in munged slurmctld slurmd sbatch; do
        command -v "$tool" >/dev/null || fail "no $tool here: apt-get install --no-install-recommends slurm-wlm munge"
    done
    [ ! -e "$CLUSTER_DIR" ] || fail "$CLUSTER_DIR is there: the cluster is running, or another one left it; cluster.sh stop"
    trap '[ $? = 0 ] || stop' EXIT
    mkdir -p "$CLUSTER_DIR/state"
    configure
    (umask 077 && head -c 1024 /dev/urandom >"$CLUSTER_DIR/munge.key")
    spawn munged munged --foreground --key-file="$CLUSTER_DIR/munge.key" --socket="$CLUSTER_DIR/munge.sock" \
        --pid-file="$CLUSTER_DIR/own-munged.pid" --log-file="$CLUSTER_DIR/munged.log" --seed-file="$CLUSTER_DIR/munge.seed"
    await 10 "munge" munge -n -S "$CLUSTER_DIR/munge.sock"
    spawn slurmctld slurmctld -D -i
    await 20 "slurmctld" scontrol ping
    for name in $(node_names); do start_node "$name"; done
    await 30 "nodes" all_nodes_up
    echo "$CLUSTER_NODES nodes are up: eval \"\$($0 env)\""
}

stop() {
    [ -e "$SLURM_CONF" ] || return 0
    local nodes
    mapfile -t nodes < <(cd "$CLUSTER_DIR" && compgen -G 'slurmd-*.pid' | sed 's/\.pid$//')
    halt KILL slurmctld "${nodes[@]}" munged # first, so that they start nothing more
    kill_jobs
    rm -rf "$CLUSTER_DIR"
}

status() {
    local daemon
    [ -e "$SLURM_CONF" ] || fail "no cluster in $CLUSTER_DIR; cluster.sh start"
    for daemon in munged slurmctld $(node_names | sed 's/^/slurmd-/'); do
        if is_alive "$daemon"; then echo "$daemon up"; else echo "$daemon down"; fi
    done
    sinfo -N -o '%N %P %t %c'
}

named_node() { [ -n "${1:-}" ] && node_names | grep -qxF "$1" || fail "no node ${1:-}; the nodes are" $(node_names); }

case ${1:-} in
    start | stop | status) "$1" ;;
    env) echo "export SLURM_CONF='$SLURM_CONF'" ;;
    kill-node) # as if its power failed
        named_node "${2:-}"
        halt KILL "slurmd-$2"
        kill_jobs "$2"
        ;;
    start-node)
        named_node "${2:-}"
        ! is_alive "slurmd-$2" || fail "$2 is up"
        start_node "$2"
        ;;
    *)
        sed -n 2,6p "$0"
        exit 2
        ;;
esac
