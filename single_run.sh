#!/bin/sh
# One launch.
#   sh single_run.sh                                   iMAS on the embedded set, then its evaluation: minutes on a CPU
#   sh single_run.sh exps/.../config.yaml [more]       any experiment; [more] goes to train_semi.py
#   NGPU=2 sh single_run.sh exps/.../config.yaml       on the first 2 GPUs instead of all visible ones
#   NNODES=2 RDZV_ENDPOINT=host:29500 sh single_run.sh exps/.../config.yaml    the same on every one of 2 nodes
#   srun sh single_run.sh exps/.../config.yaml         one process for each SLURM task
#   RESTARTS=3 sh single_run.sh exps/.../config.yaml   started again when it fails, up to 3 times, with --resume auto
# The YAML, --out and --resume count from the folder where this is called, all paths within the YAML from the project's.
set -e
case ${1:-} in -h | --help) sed -n '2,9s/^# *//p' "$0"; exit 0 ;; esac

refuse() { echo "error: $1" >&2; exit 2; }
whole() {  # whole NAME VALUE MINIMUM
    case $2 in '' | *[!0-9]*) refuse "$1=$2: expected a whole number from $3 on" ;; esac
    [ "$2" -ge "$3" ] || refuse "$1=$2: expected a whole number from $3 on"
}
[ -z "${NGPU:-}" ] || whole NGPU "$NGPU" 1
NNODES=${NNODES:-1} RESTARTS=${RESTARTS:-0}
whole RESTARTS "$RESTARTS" 0
case $NNODES in
*:*) whole NNODES "${NNODES%%:*}" 1; whole NNODES "${NNODES#*:}" 2 ;;
*) whole NNODES "$NNODES" 1 ;;
esac
if [ "$NNODES" != 1 ] && [ -z "${RDZV_ENDPOINT:-}" ]; then
    refuse "NNODES=$NNODES needs RDZV_ENDPOINT=host:port, the same on every node"
fi

START=$PWD
cd "$(dirname "$0")"
. ./env.sh

if [ $# -eq 0 ]; then
    DEMO=exps/shapes_imas
    "$PYTHON" train_semi.py --config $DEMO/config.yaml
    echo
    "$PYTHON" eval.py --config $DEMO/config.yaml --checkpoint $DEMO/checkpoints/ckpt_best.pth
    exit
fi

from_start() {  # a path of the caller's, or a word for --resume
    case $1 in /* | auto | never) BASE= ;; *) [ "$START" = "$PWD" ] && BASE= || BASE=$START/ ;; esac
    printf '%s\n' "$BASE$1"
}
CONFIG=$(from_start "$1")
[ -f "$CONFIG" ] || CONFIG=$1
shift
BEFORE=
for word in "$@"; do
    shift
    case $BEFORE in --out | --resume) path=$(from_start "$word") ;; *) path=$word ;; esac
    case $word in --out=* | --resume=*) path=${word%%=*}=$(from_start "${word#*=}") ;; esac
    set -- "$@" "$path"
    BEFORE=$word
done

if [ "$NNODES" = 1 ] && [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]; then  # otherwise a task is a launcher of its node
    [ -z "${NGPU:-}" ] && [ "$RESTARTS" = 0 ] || echo "srun has started ${SLURM_STEP_NUM_TASKS} tasks: NGPU and RESTARTS count for nothing" >&2
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # as torchrun sets it
    exec "$PYTHON" train_semi.py --config "$CONFIG" "$@"
fi
NGPU=${NGPU:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}
[ "$NGPU" -gt 0 ] || NGPU=1
if [ "$NNODES" = 1 ] && [ "$NGPU" = 1 ] && [ "$RESTARTS" = 0 ]; then
    exec "$PYTHON" train_semi.py --config "$CONFIG" "$@"
fi
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1  # torchrun hands them on, and dies of all others
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # or ranks that start again on several nodes meet in the old store
[ "$RESTARTS" = 0 ] || set -- --resume auto "$@"
if [ "$NNODES" = 1 ]; then
    set -- train_semi.py --config "$CONFIG" "$@"
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NGPU" --max_restarts="$RESTARTS" "$@"
fi
set -- train_semi.py --config "$CONFIG" "$@"
# Two runs at one endpoint do not meet: those of one job with one command line do.
RDZV_ID=${RDZV_ID:-${SLURM_JOB_ID:-run}-$(printf '%s\n' "$@" | cksum | cut -d ' ' -f 1)}
exec "$PYTHON" -m torch.distributed.run --nnodes="$NNODES" --rdzv_backend=c10d --rdzv_endpoint="$RDZV_ENDPOINT" \
    --rdzv_id="$RDZV_ID" --nproc_per_node="$NGPU" --max_restarts="$RESTARTS" "$@"
