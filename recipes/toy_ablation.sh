#!/usr/bin/env bash
# The study of results/README.md: what SSR and Forced Rethinking each contribute on the toy world.
# 9 arms x 5 seeds of about a minute each; JOBS of them at once, a thread each.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
python -c "import toy; toy.toy_policy_dir(toy.LEVELS['hard'])"  # the base, made once

# Four questions in five saturate; 16 small steps an episode, as in the paper.
common="--toy_level hard --episode_queries 64 --batch_size 32 --steps 256 --max_new_tokens 72
        --heldout 384 --eval_every 16 --save_every 256 --keep_last 1 --rethink_fraction 0"
rethink="--rethink_fraction 0.3"
arms=(
  "plain:--ssr off"
  "filter:--ssr filter"
  "ssr:--ssr replay"
  "ssr_rethink:--ssr replay $rethink"
  "rethink:--ssr off $rethink"
  "ssr_alpha0:--ssr replay --ssr_alpha 0"
  "ssr_alpha2:--ssr replay --ssr_alpha 2"
  "ssr_rethink_oracle:--ssr replay $rethink --rethink_trigger oracle"
  "ssr_rethink_after:--ssr replay $rethink --rethink_baseline after"
)
for seed in ${SEEDS:-0 1 2 3 4}; do
  for arm in "${arms[@]}"; do
    out="runs/ablation/${arm%%:*}-$seed"
    [ -d "$out/checkpoint-256" ] && continue  # done by an earlier call
    echo "rm -rf $out; python train.py" $common ${arm#*:} "--seed $seed --out $out"
  done
done | xargs -P "${JOBS:-2}" -I{} sh -c "({}) >/dev/null 2>&1 || echo failed: '{}'"
python recipes/toy_ablation.py runs/ablation results
