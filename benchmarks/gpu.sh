#!/bin/sh
# Everything that waits for a GPU, in the order of its worth, in parts of some ten minutes each on one H100 or H200:
#     for part in bench checks sampling small-data small-low small-sr large-data large-low large-sr; do sh benchmarks/gpu.sh $part; done
# Results go to $OUT (default benchmarks/gpu), as one archive a part; phantoms and runs stay in data/ and runs/; the phantoms of small-data take 17 GB, those of large-data 26.
# It needs torch, transformers, numpy, scipy, safetensors, tqdm, matplotlib and pytest; no NIfTI is read.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/gpu} PY=${PYTHON:-python3} part=${1:-none}
LOGS=$(mktemp -d)
mkdir -p "$OUT"
bench() { timeout 580 $PY benchmarks/bench.py --device cuda --json "$@" >> "$LOGS/$part.jsonl" 2>> "$LOGS/$part.log"; }
run() { timeout 560 $PY "$@" >> "$LOGS/$part.log" 2>&1; }

case $part in
bench)                                                                    # the paper's sizes, ours compiled, beside the plain form in float32 and under autocast
    bench --repeats 3 --only G_64_forward G_64_step H_crop_step H_128_forward G_32_forward G_32_step H_256_forward H_256_forward_slab H_256_step text_encoder loader ;;
sampling)                                                                 # a whole 256^3 volume
    bench --repeats 2 --only sampling ;;
checks)
    run -m pytest -v tests/test_gpu.py ;;
small-data)                                                               # 32^3 -> 128^3: phantoms and their text
    run phantom.py --grid 128 --n 1536 --texts 4 --seed 1000
    run phantom.py --reports data/reports.jsonl --n 40000 --seed 1000000
    run text_encoder.py train --scratch --reports data/reports.jsonl --out runs/text --layers 3 --steps 4000 --kept 0.3 --tokens 128 --dropout 0 --held-out 0.02
    run text_encoder.py embed data/train --model runs/text --tokens 128
    cp -r runs/text "$LOGS/" ;;                                           # the weights are of no use without the text encoder that they saw
small-low)                                                                # --cool 0: the time limit ends these, not the number of steps, so a rate that falls with the steps would not have fallen
    run train_low.py --preset demo --batch 16 --micro 16 --steps 20000 --cool 0 --workers 4 --save_every 1000 --show_every 5000
    cp runs/low/low.safetensors runs/low/loss.csv "$LOGS/" ;;
small-sr)
    run train_sr.py --preset demo --batch 8 --micro 8 --steps 10000 --cool 0 --lr 3e-4 --workers 4 --save_every 1000 --show_every 5000
    cp runs/sr/sr.safetensors runs/sr/loss.csv "$LOGS/" ;;
large-data)                                                               # the paper's sizes, 64^3 -> 256^3
    run phantom.py --grid 256 --n 300 --texts 4 --seed 1000 --out data/train256
    run text_encoder.py embed data/train256 --model runs/text --tokens 128 ;;
large-low)
    run train_low.py --preset demo-256 --init runs/low/low.safetensors --batch 16 --micro 16 --steps 20000 --cool 0 --workers 4 --save_every 1000 --show_every 5000 --data data/train256 --out runs/low256
    cp runs/low256/low.safetensors runs/low256/loss.csv "$LOGS/" ;;
large-sr)
    run train_sr.py --preset demo-256 --init runs/sr/sr.safetensors --batch 8 --micro 8 --steps 10000 --cool 0 --lr 3e-4 --workers 4 --save_every 1000 --show_every 5000 --data data/train256 --out runs/sr256
    cp runs/sr256/sr.safetensors runs/sr256/loss.csv "$LOGS/" ;;
*)
    echo "usage: sh benchmarks/gpu.sh bench|checks|sampling|small-data|small-low|small-sr|large-data|large-low|large-sr" >&2
    exit 2 ;;
esac
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader > "$LOGS/device.txt"
$PY -c "import torch; print('torch', torch.__version__, 'cuDNN', torch.backends.cudnn.version())" >> "$LOGS/device.txt"
tar -czf "$OUT/$part.tar.gz" -C "$LOGS" .
tail -n 3 "$LOGS"/*.log
rm -r "$LOGS"
