#!/bin/sh
# CATDM on one GPU: which part of the method keeps the embeddings apart (the paper's Table 1,
# Figure 1), steps and DDIM (Tables 4, 5, 10), English text and German to English. PYTHON, OUT,
# FLAGS may be set; FLAGS go to all trainings. Figures end in $OUT/*.txt and the runs' result.json.
set -e
PYTHON=${PYTHON:-python} OUT=${OUT:-runs/catdm}
mkdir -p "$OUT"
train() {  # data set, name, flags
    set=$1 name=$2; shift 2
    "$PYTHON" catdm.py --dataset "$set" --out "$OUT/$set-$name" $FLAGS "$@" >"$OUT/$set-$name.txt" 2>&1
}
for set in mnist english27; do
    train $set catdm
    train $set without-cm --cm none
    train $set csdm --objective csdm --shift 0
    train $set csdm-l2 --objective csdm --shift 0 --l2_norm 1
    train $set ce --cm ce
    train $set without-shift --shift 0
    train $set without-dropping --drop 0
    "$PYTHON" eval.py collapse "$OUT/$set-catdm" "$OUT/$set-without-cm" "$OUT/$set-csdm" \
        "$OUT/$set-csdm-l2" "$OUT/$set-ce" --out "$OUT/$set-collapse" >"$OUT/$set-collapse.txt"
done
# Tables 4, 5 and 10: 2,000 samples, recognised and at what Fréchet distance
for run in catdm ce; do
    for N in 5 10 20 50 100 200; do
        "$PYTHON" catdm.py --mode eval --out "$OUT/mnist-$run" --samples 2000 --eval_sequences 500 \
            --guidance 0 --sample_steps $N
    done
    for N in 2 3 4 5 6 7 8; do
        "$PYTHON" catdm.py --mode eval --out "$OUT/mnist-$run" --samples 2000 --eval_sequences 500 \
            --guidance 0 --sample_steps $N --sampler ddim
    done
done >"$OUT/mnist-steps.txt"
train multi30k catdm
"$PYTHON" catdm.py --mode eval --split test --out "$OUT/multi30k-catdm" >"$OUT/multi30k-test.txt"
