#!/usr/bin/env bash
# The first half hour on a GPU: its tests, `speed.py --short`, then Table 1 at the paper's protocol, one seed
# (and batch norm): each method at the rate that is expected to be its best, then at those around it.
#
#   bash tests/first_gpu.sh    # a slice of ten minutes; the same command goes on until all is done
#
# It may be cut off at any moment: what was done is left out, a run goes on from its checkpoint. Environment:
#   LIMIT     seconds that a slice may take [570]
#   KEEP      folder of records, checkpoints and logs [demo/first]
#   OUT       folder to which an archive of the records and logs goes, after each step [none]
#   ARCHIVE   images as train/CLASS/* and test/CLASS/*, in an archive that Python unpacks [data/'s CIFAR-10]
#   NAME      what records call the images of ARCHIVE [CIFAR-10 (JPEG)]
#   FLAGS, SPEED, TESTS     replace parts, as FLAGS="--width 1 --epochs 2 --data shapes --device cpu" does
set -u
cd "$(dirname "$0")/.." || exit 1
limit=${LIMIT:-570} keep=${KEEP:-demo/first} failed=""
images=(--data cifar10)
export PYTHONUNBUFFERED=1
mkdir -p "$keep"

pack() { # leave an archive of all but checkpoints; a reader never sees half of one
    if [ -z "${OUT:-}" ]; then return; fi
    tar czf "$OUT/.part" -C "$keep" --exclude '*.ckpt*' --exclude '*.lock' --exclude images . &&
        mv "$OUT/.part" "$OUT/first.tar.gz"
}

step() { # step NAME SECONDS COMMAND...: what did not end yet, for so long at most; output in KEEP/NAME.log
    local name=$1 most=$2 left=$((limit - SECONDS - 15)) code # 15 to save a checkpoint and to pack
    shift 2
    if [ -e "$keep/$name.done" ]; then return; fi
    if ((left < 20)); then echo "the slice is over: the same command goes on" && exit 75; fi
    echo "=== $name, after $SECONDS s: $*" | tee -a "$keep/$name.log"
    timeout --kill-after 30 $((left < most ? left : most)) "$@" 2>&1 | tee -a "$keep/$name.log"
    code=${PIPESTATUS[0]}
    echo "=== $name ended with $code after $SECONDS s" | tee -a "$keep/$name.log"
    case $code in
        0) touch "$keep/$name.done" ;;
        75 | 124 | 137) if ((left >= most)); then touch "$keep/$name.done"; fi ;; # its own time is over
        *) failed+=" $name" ;; # tried again in the next slice
    esac
    pack
}

if [ -n "${ARCHIVE:-}" ]; then
    if [ ! -e "$keep/images" ]; then
        rm -rf "$keep/part"
        python -m tarfile -e "$ARCHIVE" "$keep/part" && mv "$keep/part" "$keep/images" || exit 1
    fi
    images=(--data folder --data-dir "$keep/images" --data-name "${NAME:-CIFAR-10 (JPEG)}")
fi
# shellcheck disable=SC2086  # flags are split into words on purpose
{
    step tests 240 python -m pytest -q ${TESTS:-tests/test_gpu.py}
    step speed 240 python speed.py --out "$keep" ${SPEED:---short}
    for search in "" "--search best"; do
        for init in zeroinit none scalar biases dropout biases+dropout bn; do
            step "table1-$init${search:+-rates}" 9999 python wrn_cifar.py --init $init --bs 64 --seeds 1 \
                $search "${images[@]}" --out "$keep" --checkpoint-every 2 ${FLAGS:-}
        done
    done
}
echo "all is done${failed:+ but$failed: see $keep/*.log}"
[ -z "$failed" ]
