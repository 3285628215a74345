#!/usr/bin/env bash
# The paper's two stages, Qwen2.5-VL-7B on eight GPUs of 80 GB:
#     bash recipes/eight_gpus_7b.sh DATA/39Krelease.parquet [OUT]
# How the paper divides its passes over the data ("at most 3") between the stages is not known to
# us. Not yet run on a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
# torchrun kills its processes 30 s after Ctrl-C; a step, and the saving after it, takes longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600
data=${1:?DATA/39Krelease.parquet}
out=${2:-runs/7b}

# Stage 1: GRPO with Selective Sample Replay.
#
# --preset 7b        1024 questions x 8 responses per episode, 512 per optimiser step, lr 1e-6, up to
#                    2048 new tokens; questions whose PassRate_7BBase is not 0
# --data             ViRL39K's parquet, its pictures unpacked beside it
# --template plain   "reason step by step", nothing about looking again
# --ssr replay       off and filter are the paper's two baselines
# --rethink_fraction 0   nothing is forced yet
# --passes 2         over the data
# --rollout_rows 192 responses at a time; a measurement of so many prompts fits too (recipes/memory.py)
# --out, --resume    the run's folder; the same line goes on where an earlier one stopped
torchrun --nproc_per_node 8 train.py --preset 7b --data "$data" --template plain --ssr replay \
  --rethink_fraction 0 --passes 2 --rollout_rows 192 --out "$out-stage1" --resume

# Stage 2: Forced Rethinking, from the weights of stage 1.
#
# --model             the newest checkpoint of stage 1; optimiser and schedule begin anew
# --template rethink  asks for self-questioning, self-verification and self-correction
# --rethink_fraction 0.25   share q of the responses that are forced to look again
# --rethink_quota 2   kept per question, where they end right
# --rethink_sft_coef 0.05   weight of the loss that teaches to look again unforced
# --rethink_min_tokens 30   a kept second look is at least so long
# --rethink_max_tokens 1024   and at most so long
# --seed 1            other responses to the questions than in stage 1, in another order
stage1=$(ls -d "$out"-stage1/checkpoint-* | sort -V | tail -1)
torchrun --nproc_per_node 8 train.py --preset 7b --model "$stage1" --data "$data" \
  --template rethink --ssr replay --rethink_fraction 0.25 --rethink_quota 2 \
  --rethink_sft_coef 0.05 --rethink_min_tokens 30 --rethink_max_tokens 1024 \
  --passes 1 --seed 1 --rollout_rows 192 --out "$out-stage2" --resume

# --benchmark   those of the paper, from the hub; each rank answers its share
# --template    plain is the protocol of the paper; rethink is what stage 2 was trained with
stage2=$(ls -d "$out"-stage2/checkpoint-* | sort -V | tail -1)
torchrun --nproc_per_node 8 eval.py --model "$stage2" --template plain --out "$out-eval" \
  --benchmark mathvista,mathverse,mathvision,mmmu,mmmu_pro,emma,megabench
