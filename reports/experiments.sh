#!/bin/sh
# The experiments of docs/experiments.md: train what does not ship (into .pocket/checkpoints), then play it on dev.
#   sh reports/experiments.sh PART...   of: prompts temperature best_of thinking rlvr_seeds seeds beta masks scarce hour
# `sh run.sh` first: it sets up .venv.
set -eu
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
made=.pocket/checkpoints

train() { .venv/bin/pocket train "$@"; }
play() { # NAME, then options: a run on dev into reports/experiments/NAME
    name=$1
    shift
    .venv/bin/pytest -p no:randomly --pocket-split=dev --runs=4 --pocket-fail-under=0 -q --pocket-records="reports/experiments/$name" \
        "$@" | tail -n 30
}

pairs() { # [MODEL FOLDER] what preferences are learned from: hot episodes of training instances
    [ -d "${2:-.pocket/pairs}" ] || .venv/bin/pytest "--pocket-model=${1:-sft-run6}" --pocket-split=train --pocket-temperature=1.5 \
        --pocket-samples=4 --runs=4 --pocket-fail-under=0 -q "--pocket-records=${2:-.pocket/pairs}" | tail -n 30
}
prompts() { # raw, full and verbose prompts on every stage
    play prompts --pocket-model=base,sft-run6,dpo-v1-beta05,rlvr-v1,rlvr-v2-from-dpo,rlvr-v2-from-v1-epoch1 \
        --pocket-prompt=raw,full,verbose
}
rlvr_seeds() { # RLVR with two more seeds
    for seed in 14 24; do train rlvr --threads 1 --from sft-run6 --name rlvr-seed$seed --set rlvr.seed=$seed & done
    wait
    play rlvr-seeds --pocket-model=sft-run6,rlvr-v1,$made/rlvr-seed14,$made/rlvr-seed24 --pocket-prompt=verbose --runs=12
}
temperature() { # greedy against temperature
    play temperature --pocket-model=sft-run6,rlvr-v1 --pocket-prompt=raw --pocket-temperature=0,0.7,1
}
best_of() { # reward against tokens
    play best-of --pocket-model=rlvr-v1 --pocket-prompt=raw --pocket-temperature=0.7 --pocket-best-of=1,2,4,8
}
thinking() {
    play thinking --pocket-model=sft-run6,rlvr-v1 --pocket-think=off,on
}
seeds() { # DPO with two more seeds, and RLVR with three on the prompts of the demonstrations alone
    pairs
    for seed in 14 24; do
        train dpo --from sft-run6 --run .pocket/pairs --name dpo-seed$seed --set dpo.seed=$seed
    done
    models=sft-run6,dpo-v1-beta05,$made/dpo-seed14,$made/dpo-seed24
    for seed in 3 14 24; do
        train rlvr --from sft-run6 --name rlvr-shown-seed$seed --set rlvr.seed=$seed --set rlvr.steps=30 \
            --set 'rlvr.prompts={raw=0.5,full=0.5}' --set rlvr.instances=16 --set rlvr.revisit=0.5 \
            --set rlvr.reply_tokens=192 --set rlvr.tokens=600 --set rlvr.updates=2 --set rlvr.epochs=1
        models=$models,$made/rlvr-shown-seed$seed
    done
    play seeds --pocket-model=$models
}
beta() { # the strength of DPO's pull to the parent, with and without near-identical pairs
    pairs
    models=
    for beta in 0.01 0.05 0.1 0.3; do
        for similar in 0.95 1.0; do
            name=dpo-beta$beta-similar$similar
            train dpo --from sft-run6 --run .pocket/pairs --name $name --set dpo.beta=$beta --set dpo.similar=$similar
            models="$models,$made/$name"
        done
    done
    play beta "--pocket-model=sft-run6$models"
}
masks() { # SFT on a million tokens: as it should be, with a broken mask, with more but unvalidated data
    pairs
    train data --recipe tiny --set data.episodes_per_task=200 --out .pocket/data/few.jsonl
    train data --recipe tiny --run .pocket/pairs --unvalidated --out .pocket/data/failed.jsonl
    short="--from base --set sft.tokens=1_000_000 --traces .pocket/data/few.jsonl"
    train sft $short --name sft-short
    train sft $short --name sft-broken-mask --set 'sft.targets="all"'
    train sft $short --traces .pocket/data/failed.jsonl --name sft-unvalidated
    play masks --pocket-model=$made/sft-short,$made/sft-broken-mask,$made/sft-unvalidated
}
scarce() { # RLVR from a parent whose few demonstrations leave out a fifth of the kinds: training/recipes/tiny-scarce.toml
    train data --recipe tiny-scarce --out .pocket/data/scarce.jsonl
    train sft --recipe tiny-scarce --traces .pocket/data/scarce.jsonl --from base --name sft-scarce
    models=$made/sft-scarce
    for seed in 3 14 24; do
        train rlvr --recipe tiny-scarce --from $made/sft-scarce --name rlvr-scarce-seed$seed --set rlvr.seed=$seed
        models=$models,$made/rlvr-scarce-seed$seed
    done
    play scarce --pocket-model=$models
}
hour() { # the whole family from nothing, within an hour on two cores: half the traces and half of SFT's tokens
    start=$(date +%s)
    said() { echo "$(($(date +%s) - start)) s: $1"; }
    of=.pocket/hour
    traces=$of/traces.jsonl
    train data --set data.episodes_per_task=1000 --out $traces
    said data
    train pretrain --traces $traces --out $of
    said base
    train sft --set sft.tokens=9_000_000 --traces $traces --from $of/base --name sft-run6 --out $of
    said sft-run6
    {
        pairs $of/sft-run6 $of/pairs
        train dpo --threads 1 --from $of/sft-run6 --run $of/pairs --name dpo-v1-beta05 --out $of
        said dpo-v1-beta05
        train rlvr --threads 1 --from $of/dpo-v1-beta05 --name rlvr-v2-from-dpo --out $of
        said rlvr-v2-from-dpo
    } &
    branch=$!
    train rlvr --threads 1 --from $of/sft-run6 --name rlvr-v1 --out $of
    said rlvr-v1
    train rlvr --threads 1 --from $of/rlvr-v1 --name rlvr-v2-from-v1-epoch1 --out $of
    said rlvr-v2-from-v1-epoch1
    wait $branch
    said "all six"
    play hour "--pocket-model=$of/base,$of/sft-run6,$of/dpo-v1-beta05,$of/rlvr-v1,$of/rlvr-v2-from-dpo,$of/rlvr-v2-from-v1-epoch1" \
        --pocket-prompt=raw,full,verbose
}

for part; do $part; done
