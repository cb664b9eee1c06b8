#!/bin/sh
# All tables of docs/measuring.md and docs/speed.md that hang on the shipped weights, in the steps that these name:
#     sh benchmarks/tables.sh                  # both models; or one: sh benchmarks/tables.sh demo
# Hours. Stop it at any time: what stands in the JSON files for these weights is not measured again. At the end
# tables.py writes them into the pages. Without the training phantoms, in data/train and data/train256, `memory` is
# left out.
set -u
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
for model in ${*:-demo demo-256}; do
    case $model in
        demo) out=benchmarks full=16 detail=12 memory=data/train ;;
        demo-256) out=benchmarks/obey-256 full=3 detail=4 memory=data/train256 ;;
        *) echo "usage: sh benchmarks/tables.sh [demo] [demo-256]" >&2; exit 2 ;;
    esac
    obey() { $PY benchmarks/obey.py --model checkpoints/$model --seed 500000 --out $out "$@" || exit; }
    obey --parts text
    obey --parts reading
    obey --parts full --n-full $full
    obey --parts anatomy --n-full 3
    obey --parts segmentation --n-full 8
    obey --parts detail --n-full $detail
    obey --parts copy --n 6 --n-full 3
    [ ! -d "$memory" ] || obey --parts memory --n 16 --data "$memory"
    $PY benchmarks/steps.py --model checkpoints/$model --n-full $detail || exit
done
$PY benchmarks/tables.py
