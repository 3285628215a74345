#!/usr/bin/env bash
# The whole thing on any machine, minutes on two CPU cores:   bash recipes/toy.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/toy-recipe}

# --toy_level easy   chains of 1 to 3 steps; "hard" has longer ones than the base has ever seen
# --steps 60         optimiser steps; four to an episode of ...
# --episode_queries 64, --group_size 8, --batch_size 128   ... 64 questions x 8 responses
# --rethink_fraction 0.25   share of responses that are forced to look again
# --eval_every 20    steps between measurements on questions that are never trained on
# --out, --resume    the run's folder; the same line goes on where an earlier one stopped
python train.py --toy_level easy --steps 60 --episode_queries 64 --group_size 8 --batch_size 128 \
  --rethink_fraction 0.25 --eval_every 20 --out "$out" --resume

# One HTML page: curves, and rollouts with their pictures.
python report.py "$out"

# --model, --benchmark toy   the newest checkpoint of that run, on held-out questions
# --samples 8   responses per question: adds pass@8 and the majority's answer to the accuracy
checkpoint=$(ls -d "$out"/checkpoint-* | sort -V | tail -1)
python eval.py --model "$checkpoint" --benchmark toy --samples 8 --out "$out/eval"
