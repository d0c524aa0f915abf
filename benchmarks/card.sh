#!/usr/bin/env bash
# What no card has measured (docs/benchmarks.md), for one that is lent for a quarter of an hour: each row within its own
# time, its output in a file of its own, and a row that fails does not keep the next from running.
#
#   bash benchmarks/card.sh FOLDER_OF_MNIST FOLDER_FOR_OUTPUT
set -u
cd "$(dirname "$0")/.."
data=$1 out=$2
mkdir -p "$out"

row() { # name, seconds, command
    echo "== $1"
    local begun=$SECONDS
    timeout --signal=INT --kill-after=10 "$2" "${@:3}" > "$out/$1.log" 2>&1
    echo "exit code $?, $((SECONDS - begun)) s"
    tail -n 12 "$out/$1.log"
}

simulate() { # name, settings
    python -m srfed.simulate --config configs/mnist.yaml --data-dir "$data" --backend inline --run-dir "$out/$1" \
        --set resources.device=cuda evaluation.every=0 "${@:2}"
}

resumed() {
    simulate whole federation.rounds=4 && simulate parts federation.rounds=2 &&
        python -m srfed.simulate --resume "$out/parts" --set federation.rounds=4 &&
        [ "$(hash_of whole)" = "$(hash_of parts)" ] && echo equal
}

hash_of() { # a run's φ, after its last round
    grep --text --only-matching --max-count=1 '"sha256":"[0-9a-f]*"' "$out/$1/server/round-00004/state.safetensors"
}
export -f simulate resumed hash_of
export data out

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
row tests 120 python -m pytest -q tests/test_device.py -m "not slow" -p no:cacheprovider
row steps-digits-mnist 120 python -m benchmarks.local_steps --device cuda --networks digits mnist
row steps-paper 120 python -m benchmarks.local_steps --device cuda --networks mnist_paper
row resumed 90 bash -c resumed
row owners-10 120 python -m benchmarks.owner_steps --owners 1 10 --device cuda --ways "one by one" stacked
row owners-100 120 python -m benchmarks.owner_steps --owners 100 --rounds 3 --device cuda --ways stacked "ray stacked"
row profile 45 python -m benchmarks.local_steps --device cuda --networks mnist_paper --profile
row pictures 45 python -m srfed sample --run "$out/whole" --n 1000 --steps 50 --batch-size 500 --device cuda \
    --npz "$out/pictures.npz"
row evaluation 45 python -m srfed evaluate --run "$out/whole" --device cuda
