#!/usr/bin/env bash
# What a GPU makes of every stage, in one call: a line a figure, beside what was measured before; goes on after a step that
# fails. Needs a CUDA GPU, torch, torchvision, transformers, pyarrow and what `pip install -e .` brings besides, but neither
# network nor weights nor pictures (all are made: the thesis's sizes, random numbers), nor DVC. At most 8 minutes.
#
#   bash benchmarks/gpu.sh                      all steps
#   bash benchmarks/gpu.sh solver pretraining   some of them
#   bash benchmarks/gpu.sh --tiny               the same on a CPU with tiny sizes: only to see that it runs
set -u
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
exec timeout "${LIMIT:-480}" "${PYTHON:-python3}" benchmarks/gpu.py "$@"
