#!/usr/bin/env bash
# Own data, worked through: minutes on two CPU cores with the toy policy, which tries everything out:
#     bash recipes/own_data.sh [OUT]
# With a real model, on a GPU of 80 GB:
#     MODEL=Qwen/Qwen2.5-VL-3B-Instruct bash recipes/own_data.sh [OUT]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/own-data}

# Draws the pictures and writes train.jsonl and heldout.jsonl. Look at a line of them: yours may look
# the same, or be a .csv or .parquet file; data.py says what a row may hold.
python recipes/own_data.py "$out/data"

# --model, --data    a model and a file; settings that are not given come from --preset own (of the
#                    toy policy: from --preset toy), and the first line of the run lists them
# --reward           a function of your own, FILE.py:NAME; what is reported on held-out questions
#                    stays the rule's verdict
# --steps            optimiser steps; without it: 10 passes over the data
# --out, --resume    the run's folder; the same line continues where an earlier one stopped
python train.py --model "${MODEL:-toy}" --data "$out/data/train.jsonl" \
  --reward recipes/own_data.py:reward --steps "${STEPS:-60}" --out "$out" --resume

# One HTML page: curves, and rollouts with their pictures.
python report.py "$out"

# --model, --data    the newest checkpoint, on questions of a second file, asked as in training
checkpoint=$(ls -d "$out"/checkpoint-* | sort -V | tail -1)
python eval.py --model "$checkpoint" --data "$out/data/heldout.jsonl" --out "$out/eval"
