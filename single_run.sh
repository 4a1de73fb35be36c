#!/bin/sh
# One launch.
#   sh single_run.sh                                   iMAS on the embedded set, then its evaluation: minutes on a CPU
#   sh single_run.sh exps/.../config.yaml [more]       any experiment; [more] goes to train_semi.py
#   NGPU=2 sh single_run.sh exps/.../config.yaml       on the first 2 GPUs instead of all visible ones
#   NNODES=2 RDZV_ENDPOINT=host:29500 sh single_run.sh exps/.../config.yaml    the same on every one of 2 nodes
#   srun sh single_run.sh exps/.../config.yaml         one process for each SLURM task
#   RESTARTS=3 sh single_run.sh ... --resume auto      started again when it fails, up to 3 times
set -e
case ${1:-} in -h | --help) sed -n '2,8s/^# *//p' "$0"; exit 0 ;; esac
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

CONFIG=$1
shift
[ -f "$CONFIG" ] || CONFIG=$START/$CONFIG
if [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]; then
    exec "$PYTHON" train_semi.py --config "$CONFIG" "$@"
fi
NGPU=${NGPU:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}
NNODES=${NNODES:-1}
RESTARTS=${RESTARTS:-0}
[ "$NGPU" -gt 0 ] || NGPU=1
if [ "$NNODES" -gt 1 ]; then
    : "${RDZV_ENDPOINT:?NNODES needs RDZV_ENDPOINT=host:port, the same on every node}"
    RENDEZVOUS="--nnodes=$NNODES --rdzv_backend=c10d --rdzv_endpoint=$RDZV_ENDPOINT --rdzv_id=${RDZV_ID:-imas}"
elif [ "$NGPU" -gt 1 ] || [ "$RESTARTS" -gt 0 ]; then
    RENDEZVOUS=--standalone
fi
if [ -n "${RENDEZVOUS:-}" ]; then
    exec "$PYTHON" -m torch.distributed.run $RENDEZVOUS --nproc_per_node="$NGPU" --max_restarts="$RESTARTS" \
        train_semi.py --config "$CONFIG" "$@"
fi
exec "$PYTHON" train_semi.py --config "$CONFIG" "$@"
