#!/usr/bin/env bash
# What full-size models need GPUs for, in parts of a few minutes: benchmarks/gpus.sh PART [PART ...]
#   two GPUs: tokens flow14 groups parallel_training
#   one GPU:  kernels step streams small large adapters samples overfit
# Results are written below $OUT, by default benchmarks/results.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
out=${OUT:-benchmarks/results}
weights=${WEIGHTS:-/tmp/weights}
commit=${COMMIT:-$(git rev-parse --short HEAD)}

scaling() { python benchmarks/scaling.py --weights "$weights" --output "$out/scaling.json" --commit "$commit" "$@"; }
training() { python benchmarks/training.py --weights "$weights" --output "$out/training.json" --commit "$commit" "$@"; }

tokens() {  # the step alone, then through the command
    torchrun --standalone --nproc_per_node=2 benchmarks/tensor_parallel_step.py --model 4B \
        --model 12B --output "$out/tensor_parallel_step.json" --commit "$commit"
    scaling --case 4B --case 12B --way best
}
flow14() { scaling --case 14B-Predict2.5 --way best; }
groups() { python -m pytest -q -m multigpu tests/parallel; }
parallel_training() {
    training --case 4B-large --label "one GPU"
    training --case 4B-large --label "TP=2" --words "--num_gpus 2 parallel.tensor_model_parallel_size=2"
    training --case 4B-large --label "FSDP=2" --words "--num_gpus 2"
}
kernels() { python -m pytest -q -m "gpu and not multigpu" tests/nn tests/parallel tests/sampling; }
step() {
    torchrun --standalone --nproc_per_node=1 benchmarks/tensor_parallel_step.py --model 4B \
        --model 12B --output "$out/step.json" --commit "$commit"
}
streams() { python benchmarks/streaming.py --output "$out/streaming.json" --commit "$commit"; }
small() {
    training --case 4B-small
    training --case 4B-small --memory 80 --label "80 GB"
}
large() {
    training --case 4B-large
    training --case 4B-large --memory 80 --label "80 GB"
}
adapters() { training --case 7B --case 2B --memory 80 --label "80 GB" --steps 3 --remove; }
samples() {  # with videos beside their truth
    training --case 4B-small --label "with samples" --words "trainer.sample_iter=4"
}
overfit() {
    python -m benchmarks.tiny_overfit --assets "${ASSETS:-../shared/assets}" \
        --output "$out/tiny_overfit.json" --sheet "$out/tiny_overfit.png"
}

mkdir -p "$out"
for part in "$@"; do
    begin=$SECONDS
    printf '\n== %s\n' "$part"
    "$part"
    printf '== %s took %d s\n' "$part" $((SECONDS - begin))
done
