#!/usr/bin/env bash
# Qwen2.5-VL-72B on four nodes of eight 80 GB GPUs. The same line on every node, HEAD one of them:
#     HEAD=node0 bash recipes/qwen72b.sh /shared/39Krelease.parquet /shared/runs/72b
# Data and OUT must be on a file system that all nodes see. `python recipes/plan.py` has the
# arithmetic of memory and traffic. Not yet run on a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
# torchrun kills its processes 30 s after Ctrl-C; a step, and the saving after it, takes longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600
data=${1:?DATA/39Krelease.parquet}
out=${2:?OUT, on a shared file system}

# torchrun: --nnodes, --nproc_per_node   how many machines, and GPUs of each
#           --rdzv_backend, --rdzv_endpoint, --rdzv_id   where the nodes meet, and under which name
#
# --preset 72b    the paper's settings; questions whose PassRate_32BTrained is not 0; prompts and
#                 responses as for 7B
# --data          ViRL39K's parquet, its pictures unpacked beside it
# --shard world   weights, gradients and Adam split over all 32 GPUs: 8 would not hold them.
#                 (For a model that fits on a node, "node" keeps the gathers inside it.)
# --tensor 8      while sampling, the 8 GPUs of a node hold an eighth of every layer each
# --rollout_rows 128, --micro_batch_tokens 8192   what fits 80 GB with a tenth to spare (recipes/memory.py)
# --gradient_checkpointing true   keep one tensor a layer, compute the rest again
# --template plain, --ssr replay, --rethink_fraction 0, --passes 2   stage 1; stage 2 follows as in
#                 eight_gpus_7b.sh: --model, --template rethink, --rethink_fraction 0.25, --passes 1
# --save_every 16 steps are an episode of the paper; a checkpoint is about 1 TB, --keep_last 1
# --out, --resume the run's folder; after a node is lost, start the same line again
torchrun --nnodes 4 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint "$HEAD:29500" \
  --rdzv_id vl-rethinker-72b \
  train.py --preset 72b --data "$data" --shard world --tensor 8 \
  --rollout_rows 128 --micro_batch_tokens 8192 \
  --gradient_checkpointing true --template plain --ssr replay --rethink_fraction 0 --passes 2 \
  --save_every 16 --keep_last 1 --out "$out" --resume
