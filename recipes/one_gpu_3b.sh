#!/usr/bin/env bash
# Qwen2.5-VL-3B on one GPU of 80 GB:   bash recipes/one_gpu_3b.sh DATA/39Krelease.parquet [OUT]
# Weights, gradients and Adam in fp32 are 16 bytes a parameter, 60 GB; --offload true keeps them in
# the host's memory for a smaller GPU. With random weights an episode has run on an H200 and an H100: 61 GiB.
set -euo pipefail
cd "$(dirname "$0")/.."
# torchrun kills its processes 30 s after Ctrl-C; a step, and the saving after it, takes longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600
data=${1:?DATA/39Krelease.parquet}
out=${2:-runs/3b}

# --preset 7b      the paper's settings; what follows differs from them
# --model          the hub id, or a directory in the hub's layout
# --data           ViRL39K's parquet, its pictures unpacked beside it
# --pass_rate_column PassRate_7BBase, --pass_rate_min 0.25   questions that the larger base solves
#                  at times: those that a 3B never solves give it no advantage
# --episode_queries 64, --batch_size 128   512 responses per episode, four steps on them; the paper's
#                  1024 questions would take one GPU hours per episode
# --max_new_tokens 1024, --rollout_rows 64   bound the KV cache of sampling
# --micro_batch_tokens 12288   bounds the activations of an update
# --rethink_fraction 0.25, --template rethink   one stage: forced second looks from the start
# --save_every 20  steps between checkpoints of about 52 GB; --keep_last 1 of them is kept
# --out, --resume  the run's folder; the same line goes on where an earlier one stopped
torchrun --nproc_per_node 1 train.py --preset 7b --model Qwen/Qwen2.5-VL-3B-Instruct \
  --data "$data" --pass_rate_column PassRate_7BBase --pass_rate_min 0.25 \
  --episode_queries 64 --batch_size 128 --max_new_tokens 1024 --rollout_rows 64 \
  --micro_batch_tokens 12288 --rethink_fraction 0.25 --template rethink \
  --save_every 20 --keep_last 1 --out "$out" --resume

# --benchmark   one or more, with commas; --template as it was trained
checkpoint=$(ls -d "$out"/checkpoint-* | sort -V | tail -1)
python eval.py --model "$checkpoint" --benchmark mathvista --template rethink --out "$out/eval"
