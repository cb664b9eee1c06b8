#!/bin/sh
# Everything that waits for a GPU, in the order of its worth; some 50 minutes on one H100 or H200. Results go to $OUT (default benchmarks/gpu).
#     sh benchmarks/gpu.sh
# It needs torch, transformers, numpy, scipy, safetensors, tqdm, matplotlib and pytest; no NIfTI is read.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/gpu}
mkdir -p "$OUT"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader > "$OUT/device.txt"

# 1. The table: the paper's sizes, ours compiled, beside the plain form in float32 and under autocast; sampling of a whole 256^3 volume.
timeout 600 python benchmarks/bench.py --device cuda --json > "$OUT/bench.jsonl" 2> "$OUT/bench.log"

# 2. The checks that only a GPU can make.
timeout 240 python -m pytest -q tests/test_gpu.py > "$OUT/checks.txt" 2>&1

# 3. The small weights, longer: phantoms and their text, then both stages.
python phantom.py --grid 128 --n 3072 --texts 4 --seed 1000 > "$OUT/data.log" 2>&1
python phantom.py --reports data/reports.jsonl --n 40000 --seed 1000000 >> "$OUT/data.log" 2>&1
python text_encoder.py train --scratch --reports data/reports.jsonl --out runs/text --layers 3 --steps 4000 --kept 0.3 --tokens 128 --dropout 0 --held-out 0.02 > "$OUT/text.log" 2>&1
python text_encoder.py embed data/train --model runs/text --tokens 128 >> "$OUT/text.log" 2>&1
# --cool 0: the time limit ends these, not the number of steps, so a rate that falls with the steps would not have fallen
timeout 420 python train_low.py --preset demo --batch 16 --micro 16 --steps 20000 --cool 0 --workers 4 > "$OUT/low.log" 2>&1
timeout 300 python train_sr.py --preset demo --batch 8 --micro 8 --steps 10000 --cool 0 --lr 3e-4 --workers 4 > "$OUT/sr.log" 2>&1
cp -r runs/text "$OUT/"                                                   # the weights are of no use without the text encoder that they saw
for f in runs/low/low.safetensors runs/low/loss.csv runs/sr/sr.safetensors; do cp "$f" "$OUT/" || echo "missing: $f" >> "$OUT/device.txt"; done
cp runs/sr/loss.csv "$OUT/loss_sr.csv"

# 4. The same at the paper's sizes, 64^3 -> 256^3; 26 GB of phantoms.
python phantom.py --grid 256 --n 300 --texts 4 --seed 1000 --out data/train256 >> "$OUT/data.log" 2>&1
python text_encoder.py embed data/train256 --model runs/text --tokens 128 >> "$OUT/text.log" 2>&1
timeout 600 python train_low.py --preset demo-256 --init runs/low/low.safetensors --batch 16 --micro 16 --steps 20000 --cool 0 --workers 4 --data data/train256 --out runs/low256 > "$OUT/low256.log" 2>&1
timeout 600 python train_sr.py --preset demo-256 --init runs/sr/sr.safetensors --batch 8 --micro 8 --steps 10000 --cool 0 --lr 3e-4 --workers 4 --data data/train256 --out runs/sr256 > "$OUT/sr256.log" 2>&1
mkdir -p "$OUT/256"
for f in runs/low256/low.safetensors runs/sr256/sr.safetensors; do cp "$f" "$OUT/256/" || echo "missing: $f" >> "$OUT/device.txt"; done
