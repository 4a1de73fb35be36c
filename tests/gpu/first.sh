#!/bin/sh
# What to run first where GPUs are at hand, best two of them; takes ten minutes and more, and prints a page to be pasted into
# an issue.
#   sh tests/gpu/first.sh            on at most 2 GPUs
#   NGPU=1 sh tests/gpu/first.sh     on one
# What only GPUs can show, the most doubtful first:
#   1. SyncBatchNorm through NCCL does not make the host wait, is compiled in one graph, and equals torch's own
#      (also on one GPU, which two ranks share)
#   2. whole steps of every method wait for the device as often as docs/reference.md says
#   3. two processes train with sync_bn and checkpoint_encoder, with fp16, with bf16 and compile, and end alike
#   4. SIGTERM to the launcher leaves a checkpoint, and the run goes on from it
#   5. how long a step of a published recipe takes
cd "$(dirname "$0")/../.."
REQUIREMENTS=tests/requirements.txt
. ./env.sh
OUT=$(mktemp -d)
GPUS=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
NGPU=${NGPU:-$([ "$GPUS" -eq 1 ] && echo 1 || echo 2)}
export NGPU

printf '# %s, %s\n\n```\n' "$(date -u +%F)" "$(git describe --always --dirty 2>/dev/null)"
"$PYTHON" -c 'import platform, torch; print(f"Python {platform.python_version()}, PyTorch {torch.__version__}, CUDA {torch.version.cuda}")'
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || echo "no GPU: what follows ran on the CPU"
printf '```\n\n%s process(es)\n\n| what | status | seconds |\n|---|---|---|\n' "$NGPU"

row() { # name, command: a row of the table; what failed is quoted below it
    NAME=$1
    shift
    BEGAN=$(date +%s)
    "$@" >"$OUT/$NAME.txt" 2>&1
    STATUS=$?
    echo "| $NAME | $STATUS | $(($(date +%s) - BEGAN)) |"
    [ $STATUS -eq 0 ] || FAILED="$FAILED $NAME"
}

train() { # name, overrides: a short run on the embedded data set
    FOLDER=$OUT/run-$1
    shift
    sh single_run.sh exps/shapes_imas/config.yaml --out "$FOLDER" --resume auto --set imas.sup_only_epoch=2 \
        --set trainer.epochs=12 --set trainer.eval_every=4 --set net.sync_bn=true "$@"
}

stopped() { # SIGTERM to the launcher in the middle, then on to the end
    sh single_run.sh exps/shapes_imas/config.yaml --out "$OUT/run-stopped" --set imas.sup_only_epoch=2 \
        --set trainer.epochs=5000 --set trainer.eval_every=4 --set net.sync_bn=true --set dataset.workers=2 &
    LAUNCHER=$!
    for _ in $(seq 120); do
        grep -qs "epoch 3: " "$OUT/run-stopped/log/train.log" && break
        sleep 1
    done
    kill -TERM $LAUNCHER
    wait $LAUNCHER
    echo "status $?"
    grep "and saved" "$OUT/run-stopped/log/train.log" || ls "$OUT/run-stopped/checkpoints"
    EPOCH=$("$PYTHON" -c 'import sys, torch; print(torch.load(sys.argv[1], weights_only=True)["epoch"])' "$OUT/run-stopped/checkpoints/ckpt.pth")
    sh single_run.sh exps/shapes_imas/config.yaml --out "$OUT/run-stopped" --resume auto --set imas.sup_only_epoch=2 \
        --set trainer.epochs=$((EPOCH + 2)) --set trainer.eval_every=4 --set net.sync_bn=true --set dataset.workers=2
}

row tests "$PYTHON" -m pytest -q -s tests/gpu
row sync_bn train sync_bn --set trainer.checkpoint_encoder=true
row fp16 train fp16 --set trainer.amp=fp16
row compile train compile --set trainer.amp=bf16 --set trainer.compile=true
row stopped stopped
[ "$GPUS" -gt 0 ] && row step "$PYTHON" -m benchmarks.step --repeats 3

grep -h "^SyncBatchNorm: " "$OUT/tests.txt"
[ -f "$OUT/step.txt" ] && printf '\n```\n%s\n```\n' "$(tail -n 30 "$OUT/step.txt")"
for NAME in $FAILED; do
    printf '\n%s:\n\n```\n%s\n```\n' "$NAME" "$(tail -n 25 "$OUT/$NAME.txt")"
done
printf '\nEverything: %s\n' "$OUT"
[ -z "$FAILED" ]
