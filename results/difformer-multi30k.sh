#!/bin/sh
# Difformer on Multi30k de -> en, one GPU: Table 7's ablations (Table 1's ANI is among the
# figures), Table 8's K with sentences per second, Table 15's beams. STEPS, PYTHON, OUT and FLAGS
# may be set; FLAGS go to all trainings. Every figure ends in $OUT/*.json.
set -e
PYTHON=${PYTHON:-python} OUT=${OUT:-runs/multi30k} STEPS=${STEPS:-15000}
run() { "$PYTHON" difformer.py --dataset multi30k "$@"; }
mkdir -p "$OUT"

train() {  # name, flags: one run of Table 7, its log, its test figures
    name=$1; shift
    run --out "$OUT/$name" --steps "$STEPS" --save_every 100000 $FLAGS "$@" >"$OUT/$name.log" 2>&1
    run --mode eval --split test --out "$OUT/$name" --save "$OUT/$name.json" >>"$OUT/$name.log" 2>&1
    cp "$OUT/$name/log.jsonl" "$OUT/$name.jsonl"
}
train main &                                       # anchor loss, F = 4
train anchor-unscaled --factor 1 &
train rounding --loss rounding &
train rounding-unscaled --loss rounding --factor 1 &
train no-anchor --loss none &                      # Table 1's first row
wait

decode() {  # name, flags
    name=$1; shift
    run --mode eval --split test --out "$OUT/main" --save "$OUT/$name.json" "$@" \
        >"$OUT/$name.log" 2>&1
}
decode K2000 --K 2000 --early_stop 0 &             # some minutes
for K in 1 10 20; do decode "K$K" --K "$K" --early_stop 0; done
for b in "1 1" "1 9" "3 3" "5 2" "9 1" "5 4" "7 3" "9 2" "10 5"; do
    set -- $b; decode "beams-$1-$2" --length_beam "$1" --noise_beam "$2"
done
wait
# Table 8's own setting is one sentence at a time.
for K in 1 10 20; do
    decode "K$K-alone" --K "$K" --early_stop 0 --sample_batch 1 --eval_sequences 50
done
decode K2000-alone --K 2000 --early_stop 0 --sample_batch 1 --eval_sequences 3
grep -h -A1 bleu "$OUT"/*.json
