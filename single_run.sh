#!/bin/sh
# One launch.
#   sh single_run.sh                                   iMAS on the embedded set, then its evaluation: minutes on a CPU
#   sh single_run.sh exps/.../config.yaml [more]       any experiment; [more] goes to train_semi.py
#   NGPU=2 sh single_run.sh exps/.../config.yaml       on the first 2 GPUs instead of all visible ones
set -e
case ${1:-} in -h | --help) sed -n '2,5s/^# *//p' "$0"; exit 0 ;; esac
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
NGPU=${NGPU:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')}
if [ "$NGPU" -gt 1 ]; then
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NGPU" train_semi.py --config "$CONFIG" "$@"
fi
exec "$PYTHON" train_semi.py --config "$CONFIG" "$@"
