#!/bin/sh
# Everything that needs a GPU, in the order of its worth, in parts, so that it can be rented by the quarter of an hour:
#     for part in sampling bench-g bench-h bench-large checks small-data small-low small-sr large-data large-low \
#         large-sr; do sh benchmarks/gpu.sh $part; done
# Most cases of the first four, and the tests of the fifth, ran on an H200 (gpu.json holds them); training of the demo
# weights, the rest, has not.
# Results go to $OUT (default benchmarks/gpu), as one archive a part; phantoms and runs stay in data/ and runs/; the
# phantoms of small-data take 17 GB, those of large-data 26.
# It needs torch, transformers, numpy, scipy, safetensors, tqdm, matplotlib and pytest; no NIfTI is read.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-benchmarks/gpu} PY=${PYTHON:-python3} part=${1:-none}
LOGS=$(mktemp -d)
mkdir -p "$OUT"
bench() { timeout 580 $PY benchmarks/bench.py --device cuda --json "$@" >> "$LOGS/$part.jsonl" 2>> "$LOGS/$part.log"; }
run() { timeout 560 $PY "$@" >> "$LOGS/$part.log" 2>&1; }
# The time limit ends these, not the number of steps: a rate that falls with the steps (--cool) would not have fallen.
low() { run -m beyond.train_low --batch 16 --micro 16 --steps 20000 --cool 0 --workers 4 \
    --save-every 1000 --show-every 5000 "$@"; }
sr() { run -m beyond.train_sr --batch 8 --micro 8 --steps 10000 --cool 0 --lr 3e-4 --workers 4 \
    --save-every 1000 --show-every 5000 "$@"; }

case $part in
sampling)                                                # a whole 256^3 volume
    bench --repeats 3 --only sampling ;;
bench-g)                            # the paper's sizes, ours compiled, beside the plain form in float32, under autocast
    bench --repeats 7 --only G_64_step G_64_forward --forms reference "reference autocast" MONAI ;;
bench-h)
    bench --repeats 5 --only H_256_forward H_crop_step H_128_forward \
        --forms "ours light" reference "reference autocast" ;;
bench-large)                                             # what fills a card
    bench --repeats 3 --only G_64_step_4 H_256_step H_256_forward_slab G_64_guided G_64_step_8 H_crop_step_4 \
        text_encoder loader --forms "reference autocast" ;;
checks)
    run -m pytest -v -m "" tests/test_gpu.py ;;
small-data)                                              # 32^3 -> 128^3: phantoms and their text
    run phantom.py --grid 128 --n 1536 --texts 4 --seed 1000
    run phantom.py --reports data/reports.jsonl --n 40000 --seed 1000000
    run text_encoder.py train --scratch --reports data/reports.jsonl --out runs/text --layers 3 --steps 4000 \
        --kept 0.3 --tokens 128 --dropout 0 --held-out 0.02
    run text_encoder.py embed data/train --model runs/text --tokens 128
    cp -r runs/text "$LOGS/" ;;                          # the weights are of no use without the text encoder they saw
small-low)
    low --preset demo
    cp runs/low/low.safetensors runs/low/sampling.json runs/low/loss.csv "$LOGS/" ;;
small-sr)
    sr --preset demo
    cp runs/sr/sr.safetensors runs/sr/sampling.json runs/sr/loss.csv "$LOGS/" ;;
large-data)                                              # the paper's sizes, 64^3 -> 256^3
    run phantom.py --grid 256 --n 300 --texts 4 --seed 1000 --out data/train256
    run text_encoder.py embed data/train256 --model runs/text --tokens 128 ;;
large-low)
    low --preset demo-256 --init runs/low/low.safetensors --data data/train256 --out runs/low256
    cp runs/low256/low.safetensors runs/low256/sampling.json runs/low256/loss.csv "$LOGS/" ;;
large-sr)
    sr --preset demo-256 --init runs/sr/sr.safetensors --data data/train256 --out runs/sr256
    cp runs/sr256/sr.safetensors runs/sr256/sampling.json runs/sr256/loss.csv "$LOGS/" ;;
*)
    echo "usage: sh benchmarks/gpu.sh sampling|bench-g|bench-h|bench-large|checks|small-data|small-low|small-sr|\
large-data|large-low|large-sr" >&2
    exit 2 ;;
esac
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader > "$LOGS/device.txt"
$PY -c "import torch; print('torch', torch.__version__, 'cuDNN', torch.backends.cudnn.version())" >> "$LOGS/device.txt"
tar -czf "$OUT/$part.tar.gz" -C "$LOGS" .
tail -n 3 "$LOGS"/*.log
rm -r "$LOGS"
