#!/usr/bin/env bash
# The paper's experiments. A target is a table or figure: its function prints the command lines, the rest runs them.
#
#   bash sweep.sh                             the targets: runs, done, diverged
#   bash sweep.sh fig3                        make the runs that are missing, extend grids whose optimum is on an edge, report
#   bash sweep.sh fig3 --dry-run              only print the command lines
#   bash sweep.sh table1 --width 1 --epochs 5 --seeds 1     what follows the target is appended to each command
#
# --jobs N        commands at a time [one per GPU, else half the cores]
# BATCHES="64 256" LRS="2^-3 2^-2" INITS="bn zeroinit" DEPTHS="16 40" bash sweep.sh ...     replace a target's own grid
# EXTEND=N        at most N times, try the next learning rate beyond an optimum on an edge [6; 0: never]

# shellcheck disable=SC2329  # targets are called by name
set -u

targets="fig1 fig2 fig3 fig4 table1 table2 table3 demo"

# --------------------------------------------------------------------------------- the grids of the tables and figures

fig1() { # 16-4, ghost batches of 64, large batches (section 3)
    for bs in ${BATCHES:-16 32 64 128 256 512 1024 2048 4096 8192}; do
        for init in ${INITS:-bn none zeroinit}; do wrn "$init" "$bs"; done
    done
}

fig2() { fig1; } # the optimal learning rates of Figure 1

fig3() { # 16-4, statistics over the whole batch, small batches (section 4)
    for bs in ${BATCHES:-1 2 4 8 16 32 64 128 256 512 1024}; do
        for init in ${INITS:-bn none zeroinit}; do wrn "$init" "$bs" --ghost 0; done
    done
}

fig4() { fig3; } # the optimal learning rates of Figure 3

table1() { # 16-4, the components of ZeroInit one by one
    for init in ${INITS:-none biases dropout scalar biases+dropout zeroinit}; do wrn "$init" 64; done
}

table2() { # d-2, batch norm against ZeroInit by depth
    for depth in ${DEPTHS:-16 100 1000}; do
        for init in ${INITS:-bn zeroinit}; do wrn "$init" 64 --depth "$depth" --width 2; done
    done
}

table3() { # d-2, ZeroInit without L2, and its scalar alone
    for depth in ${DEPTHS:-16 100 1000}; do
        wrn zeroinit 64 --depth "$depth" --width 2 --wd 0
        wrn scalar 64 --depth "$depth" --width 2
    done
}

demo() { # a depth at which only the plain network fails, and one at which it does not; two minutes on two CPU cores
    for depth in ${DEPTHS:-64 16}; do
        for init in ${INITS:-bn zeroinit none}; do
            echo "python wrn_cifar.py --data shapes --depth $depth --width 1 --init $init --bs 16 --lr ${LRS:-2^-5 2^-4} --epochs 3 --eval-every 3 --out demo"
        done
    done
}

wrn() { # wrn INIT BS [FLAGS]: 15 seeds at each learning rate around the one that the paper leads to expect
    local init=$1 bs=$2 lr
    shift 2
    for lr in ${LRS:-$(around "$(expected_rate "$init" "$bs")")}; do
        echo "python wrn_cifar.py --init $init --bs $bs --lr $lr --seeds 15 $*"
    done
}

expected_rate() { # the exponent of the optimal rate: proportional to the batch size, then constant (Figure 2)
    local exponent limit size=1
    case $1 in
        bn) exponent=-7 limit=4 ;;                                # 2^-1 at 64
        none | biases | dropout | biases+dropout) exponent=-10 limit=-3 ;; # 2^-4 at 64
        *) exponent=-8 limit=1 ;;                                 # 2^-2 at 64
    esac
    while ((size < $2)); do ((size *= 2, exponent += 1)); done
    echo $((exponent < limit ? exponent : limit))
}

around() { # seven powers of two
    local k
    for ((k = $1 - 3; k <= $1 + 3; k++)); do echo "2^$k"; done
}

# ------------------------------------------------------------------------------------------------- listing and running

here=$(dirname "${BASH_SOURCE[0]}")
python=${PYTHON:-python}

lines() { # the command lines of a target, with what the user appended
    "$1" | sed "s/ *$//" | while IFS= read -r line; do printf '%s%s\n' "$line" "$appended"; done
}

status() { # command lines -> done, diverged, running, all runs, grid and the line itself, separated by tabs
    "$python" "$here/wrn_cifar.py" --status
}

overview() {
    local target rows
    rows=$(for target in $targets; do lines "$target" | sed "s/$/ # $target/"; done | status) || exit
    printf '%-8s %6s %6s %9s\n' target runs 'done' diverged
    for target in $targets; do
        awk -F '\t' -v t="$target" '$6 ~ " # " t "$" {d += $1; v += $2; n += $4}
            END {printf "%-8s %6d %6d %9d\n", t, n, d, v}' <<<"$rows"
    done
}

seconds() { # as 3h05m or 4m10s
    if (($1 >= 3600)); then printf '%dh%02dm' $(($1 / 3600)) $(($1 % 3600 / 60)); else printf '%dm%02ds' $(($1 / 60)) $(($1 % 60)); fi
}

finish() { # finish PID CODE: note how a command ended
    local pid=$1 code=$2 took left
    slots+=("${slot_of[$pid]}")
    ((made += runs_of[$pid]))
    took=$((SECONDS - started)) left=$((wanted - made))
    if ((code == 0)); then
        printf '[%d/%d runs, %s left] %s\n' "$made" "$wanted" "$(seconds $((made ? took * left / made : 0)))" "${line_of[$pid]}"
    else
        failed+=("${line_of[$pid]} (exit code $code, see ${log_of[$pid]})")
        printf '[%d/%d runs] FAILED with exit code %d: %s\n' "$made" "$wanted" "$code" "${line_of[$pid]}"
        tail -n 3 "${log_of[$pid]}" | sed 's/^/    /'
    fi
    unset "line_of[$pid]"
}

run_missing() { # run what is missing of the command lines on stdin, $jobs at a time
    local made=0 wanted=0 started=$SECONDS pid slot line have all runs code rows log
    local -A line_of=() slot_of=() runs_of=() log_of=()
    local slots=() todo=() words=() gpu=(env)
    rows=$(status) || return 2
    while IFS=$'\t' read -r have _ _ all _ line; do
        if ((have < all)); then todo+=("$((all - have)) $line") && ((wanted += all - have)); fi
    done <<<"$rows"
    echo "$target: $wanted runs to make by ${#todo[@]} commands, $jobs at a time"
    mkdir -p "$out/logs" || return 2
    for ((slot = 0; slot < jobs; slot++)); do slots+=("$slot"); done
    trap 'kill "${!line_of[@]}" 2>/dev/null; wait; exit 130' INT TERM
    for line in "${todo[@]}"; do
        runs=${line%% *} line=${line#* }
        if ((${#slots[@]} == 0)); then wait -n -p pid "${!line_of[@]}"; code=$?; finish "$pid" "$code"; fi
        slot=${slots[0]} slots=("${slots[@]:1}")
        ((launched += 1))
        log=$out/logs/$target-$launched.log
        if ((gpus)); then gpu=(env "CUDA_VISIBLE_DEVICES=${devices[slot % gpus]}"); fi
        eval "words=($line)"
        "${gpu[@]}" "$python" "$here/${words[1]}" "${words[@]:2}" </dev/null >"$log" 2>&1 &
        line_of[$!]=$line slot_of[$!]=$slot runs_of[$!]=$runs log_of[$!]=$log
    done
    while ((${#line_of[@]})); do wait -n -p pid "${!line_of[@]}"; code=$?; finish "$pid" "$code"; done
    trap - INT TERM
}

edges() { # for each of the command lines on stdin whose grid has an optimum on an edge, the lines of the next rates
    awk -F '\t' 'NR == FNR {next_of[$1] = next_of[$1] " " $2; next}
        $5 in next_of {n = split(next_of[$5], rates, " ")
            for (i = 1; i <= n; i++) {line = $6; sub(/ --lr( [^- ][^ ]*)+/, " --lr " rates[i], line); print line}
            delete next_of[$5]}' <("$python" "$here/plot.py" "$out" --edges) <(status)
}

sweep() { # run a target, extend its grids, draw the report
    local round more all
    all=$(lines "$target")
    run_missing <<<"$all" || return
    for ((round = 1; extend > 0 && ${#failed[@]} == 0; round++)); do
        more=$(edges <<<"$all")
        [ -n "$more" ] || break
        if ((round > extend)); then
            echo "an optimum is still on the edge of its learning rates (see the report); next would be:"
            printf '%s\n' "$more"
            break
        fi
        echo "an optimum is on the edge of its learning rates: extending the grid (round $round of at most $extend)"
        run_missing <<<"$more" || return
        all+=$'\n'$more
    done
    "$python" "$here/plot.py" "$out"
}

# --------------------------------------------------------------------------------------------------------- entry point

target=${1:-status}
(($#)) && shift
jobs="" dry="" out=results appended="" launched=0 failed=() extend=${EXTEND:-6}
if [[ $target == demo ]]; then out=demo; fi
while (($#)); do
    case $1 in
        --jobs) jobs=${2:-}; shift 2 || exit 2; continue ;;
        --jobs=*) jobs=${1#*=}; shift; continue ;;
        --dry-run) dry=1; shift; continue ;;
        --out) out=${2:-} ;;
        --out=*) out=${1#*=} ;;
    esac
    appended+=" $(printf %q "$1")"
    shift
done
if [[ $target == status ]]; then overview; exit; fi
if [[ " $targets " != *" $target "* ]]; then echo "error: no target '$target'; there are: $targets" >&2; exit 2; fi
if [ -n "$dry" ]; then lines "$target"; exit; fi
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then echo "error: bash 5.1 or newer is needed to run a sweep" >&2; exit 2; fi

IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd,)}"
gpus=${#devices[@]}
cores=$(getconf _NPROCESSORS_ONLN)
if [[ $target == demo ]]; then extend=0 jobs=${jobs:-$cores}; fi # its nets are too small for more than a core each
if [ -z "$jobs" ]; then jobs=$((gpus ? gpus : cores > 1 ? cores / 2 : 1)); fi
if ! [[ $jobs =~ ^[1-9][0-9]*$ ]]; then echo "error: --jobs should be a positive number, not '$jobs'" >&2; exit 2; fi
if ((gpus == 0)); then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}; fi
sweep
code=$?
if ((${#failed[@]})); then
    printf '\n%d commands failed; the same sweep makes what is missing:\n' "${#failed[@]}"
    printf '  %s\n' "${failed[@]}"
    exit 1
fi
exit $code
