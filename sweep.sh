#!/usr/bin/env bash
# The paper's experiments. A target is a table or figure: its function prints the command lines, the rest runs them.
#
#   bash sweep.sh                             what is done, running, failed and missing of each target
#   bash sweep.sh --cost                      how many hours each target takes, by the speed that speed.py measured
#   bash sweep.sh fig3                        make what is missing, extend grids whose optimum is on an edge, report
#   bash sweep.sh fig3 --slurm "--partition gpu --time 12:00:00 --gres gpu:1"     submit them as job arrays instead
#   bash sweep.sh fig3 --dry-run              only print the command lines
#   bash sweep.sh table1 --width 1 --epochs 5 --seeds 1     what follows the target is appended to each command
#
# --jobs N        commands at a time [one per GPU, else half the cores; torchrun has the whole machine to itself]
# BATCHES="64 256" LRS="2^-3 2^-2" INITS="bn zeroinit" DEPTHS="16 40" bash sweep.sh ...     replace a target's own grid
# NPROC=N         processes (GPUs) of a run on ImageNet [8; 1: without torchrun]
# EXTEND=N        at most N times, try the next learning rate beyond an optimum on an edge [6; 0: never]
#
# Exit codes: 0 done, 1 a command failed, 2 bad usage or data, 75 interrupted. The same sweep makes what is missing.

# shellcheck disable=SC2329  # targets are called by name
set -u

targets="fig1 fig2 fig3 fig4 table1 table2 table3 table4 table5 demo"

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

table4() { resnet50 v2 bn fixup zeroinit-nodropout zeroinit; } # ResNet-50 on ImageNet, identity skip paths

table5() { resnet50 v1 bn fixup zeroinit zeroinit+bias; } # a ReLU after each block

demo() { # a depth at which only the plain network fails, and one at which it does not; four minutes on two CPU cores
    local small="python wrn_cifar.py --data shapes --width 1 --bs 16 --epochs 3 --eval-every 3 --out demo"
    for depth in ${DEPTHS:-100 16}; do
        for init in ${INITS:-bn zeroinit none}; do echo "$small --depth $depth --init $init --lr ${LRS:-2^-5 2^-4}"; done
    done
}

wrn() { # wrn INIT BS [FLAGS]: 15 seeds at each learning rate around the one that the paper leads to expect
    local init=$1 bs=$2 lr
    shift 2
    for lr in ${LRS:-$(around "$(expected_rate "$init" "$bs")" 3)}; do
        echo "python wrn_cifar.py --init $init --bs $bs --lr $lr --seeds 15 $*"
    done
}

resnet50() { # resnet50 VERSION INIT...: one run at each of five learning rates around 0.1 * BS / 256
    local version=$1 launcher="torchrun --nproc_per_node=${NPROC:-8}" bs init lr
    shift
    if [ "${NPROC:-8}" = 1 ]; then launcher=python; fi
    for bs in ${BATCHES:-256 1024 4096}; do
        for init in ${INITS:-$*}; do
            for lr in ${LRS:-$(around "$(expected_rate resnet50 "$bs")" 2)}; do
                echo "$launcher resnet_imagenet.py --arch $version --init $init --bs $bs --lr $lr --seeds 1"
            done
        done
    done
}

expected_rate() { # the exponent of the optimal rate: proportional to the batch size, then constant (Figure 2)
    local exponent limit size=1
    case $1 in
        bn) exponent=-7 limit=4 ;; # 2^-1 at 64
        none | biases | dropout | biases+dropout) exponent=-10 limit=-3 ;; # 2^-4 at 64
        resnet50) exponent=-11 limit=9 ;; # 2^-3 at 256
        *) exponent=-8 limit=1 ;; # 2^-2 at 64
    esac
    while ((size < $2)); do ((size *= 2, exponent += 1)); done
    echo $((exponent < limit ? exponent : limit))
}

around() { # around EXPONENT N: the power of two, and N on either side
    local k
    for ((k = $1 - $2; k <= $1 + $2; k++)); do echo "2^$k"; done
}

# ------------------------------------------------------------------------------------------------- listing and counting

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}

fail() { echo "error: $1" >&2; exit 2; }

quote() { # a word as both bash and Python's shlex read it (printf %q writes $'...' where the locale lacks a letter)
    case $1 in
        "" | *[!a-zA-Z0-9_./:=,+^-]*) printf "'%s'" "${1//\'/\'\\\'\'}" ;;
        *) printf %s "$1" ;;
    esac
}

lines() { # the distinct command lines of a target, with what the user appended
    "$1" | appended=$appended awk '{sub(/ *$/, "")} !seen[$0]++ {print $0 ENVIRON["appended"]}'
}

status() { # command lines -> done, diverged, running, all runs, grid and the line itself, separated by tabs
    local all script its code=0
    all=$(cat)
    for script in wrn_cifar.py resnet_imagenet.py; do
        if its=$(grep -E "^[a-z]+( --[^ ]+)* $script " <<<"$all"); then
            "$python" "$here/$script" --status <<<"$its" || code=2
        fi
    done
    return $code
}

missing() { # those of the command lines that have runs neither done nor running, each after the number of these runs
    local rows
    rows=$(status) || return
    awk -F '\t' '$1 + $3 < $4 {print $4 - $1 - $3, $6}' <<<"$rows"
}

log_of() { # a command's log: the line, what it printed and `exit CODE`, again for each time that it ran
    echo "$out/logs/$(printf %s "$1" | sha1sum | cut -c 1-12).log"
}

last_words() { tail -n 2 "$1" | head -n 1 | tr '\t\r' '  '; }

failures() { # of the commands that failed when they last ran: the line, and why, separated by a tab
    local log line code
    for log in "$out"/logs/*.log demo/logs/*.log; do
        code=$(tail -n 1 "$log" 2>/dev/null)
        if [[ $code != exit\ * || $code == "exit 0" || $code == "exit 75" ]]; then continue; fi
        read -r line <"$log"
        printf '%s\t%s: %s: %s\n' "$line" "$log" "$code" "$(last_words "$log")"
    done
}

overview() { # diverged runs are among the done, failed ones among the missing
    local name rows
    rows=$(for name in $targets; do lines "$name" | sed "s/$/ # $name/"; done | status) || [ -n "$rows" ] || exit 2
    awk -F '\t' -v targets="$targets" '
        NF == 2 {why[$1] = $2}
        NF == 6 {
            target = line = $6; sub(/.* # /, "", target); sub(/ # [a-z0-9]+$/, "", line); left = $4 - $1 - $3
            all[target] += $4; done[target] += $1; diverged[target] += $2; running[target] += $3; missing[target] += left
            if (left && line in why) {failed[target] += left; if (!told[line]++) reasons = reasons "\n" why[line]}
        }
        END {
            print "target    runs  done running diverged failed missing"
            for (i = 1; i <= split(targets, name, " "); i++) {
                t = name[i]; form = "%-8s" (t in all ? "%6d%6d%8d%9d%7d%8d" : "  does not take these flags") "\n"
                printf form, t, all[t], done[t], running[t], diverged[t], failed[t], missing[t]
            }
            if (reasons) print "\nfailed:" reasons
        }' <<<"$(failures)"$'\n'"$rows"
}

cost() { # runs, missing runs, and the hours of all runs by the newest record of speed.py
    local hours counts
    hours=$("$python" -c '
import json, pathlib, sys
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json"), key=lambda path: -path.stat().st_mtime):
    rows = json.loads(path.read_text()).get("cost")
    if rows:
        print(*("{target} {hours:.1f}".format(**row) for row in rows), path, sep="\n")
        break
else:
    sys.exit(1)' "$out/speed" 2>/dev/null) || fail "no record of speed in $out/speed: run \`python speed.py\` first"
    counts=$(overview) || exit
    awk 'NF == 2 {hours[$1] = $2; if (sub("fig1", "fig2") || sub("fig3", "fig4")) hours[$1] = $2}
        NF == 7 {printf "%-8s %6s %8s %8s\n", $1, $2, $7, $1 == "target" ? "hours" : $1 in hours ? hours[$1] : "?"}
        /^$/ {exit}' <<<"$hours"$'\n'"$counts"
    echo "hours on this machine, by ${hours##*$'\n'}"
}

# -------------------------------------------------------------------------------------------------------------- running

launch() { # launch RUNS LINE: start a command in a free slot, on its device; torchrun gets all devices and a free port
    local runs=$1 line=$2 slot=${slots[0]} log words place=(env)
    log=$(log_of "$line")
    eval "words=($line)"
    if [[ ${words[0]} == torchrun ]]; then
        words=(-m torch.distributed.run --standalone "${words[1]}" "$here/${words[2]}" "${words[@]:3}")
    else
        words=("$here/${words[1]}" "${words[@]:2}")
        place+=("OMP_NUM_THREADS=$threads")
        if ((gpus)); then place+=("CUDA_VISIBLE_DEVICES=${devices[slot % gpus]}"); fi
    fi
    echo "$line" >>"$log"
    "${place[@]}" "$python" "${words[@]}" </dev/null >>"$log" 2>&1 &
    running[$!]="$slot $runs $line" slots=("${slots[@]:1}")
    if [ -n "$stopped" ]; then kill -TERM "$!" 2>/dev/null; fi # the signal came before the command was in the table
}

stop() { # stop SIGNAL: pass it on; the commands save a checkpoint and end, and so does the sweep once they all have
    stopped=$1
    if ((${#running[@]})); then kill -TERM "${!running[@]}" 2>/dev/null; fi
}

reap() { # wait until a command ends, or a signal comes; note how each that has ended did
    local pid code slot runs line log
    wait -n "${!running[@]}" 2>/dev/null
    for pid in "${!running[@]}"; do
        # Asked one by one, because `wait -n` may miss a command that ends while a signal is handled.
        if kill -0 "$pid" 2>/dev/null; then continue; fi
        wait "$pid"
        code=$?
        # Told to stop, a command may die before it listens, and torchrun ends with 1 whatever its processes say.
        if [ -n "$stopped" ] && ((code)); then code=75; fi
        read -r slot runs line <<<"${running[$pid]}"
        unset "running[$pid]"
        slots+=("$slot") log=$(log_of "$line")
        if [ -n "$(tail -c 1 "$log")" ]; then echo >>"$log"; fi
        echo "exit $code" >>"$log"
        ((made += runs))
        printf '[%d/%d runs, %d min left] ' "$made" "$wanted" $(((SECONDS - started) * (wanted - made) / made / 60))
        case $code in
            0) echo "$line" ;;
            75) interrupted+=("$line") && echo "interrupted: $line" ;;
            *) failed+=("$line (exit code $code, see $log)") && echo "FAILED: $line: $(last_words "$log")" ;;
        esac
    done
}

run_missing() { # run what is missing of the command lines on stdin, $jobs at a time
    local todo wanted made=0 started=$SECONDS runs line slots
    todo=$(missing) || return 2
    mkdir -p "$out/logs" || return 2
    wanted=$(awk '{runs += $1} END {print runs + 0}' <<<"$todo")
    mapfile -t slots < <(seq 0 $((jobs - 1)))
    if [[ $todo == *" torchrun "* ]]; then slots=(0); fi
    echo "$target: $wanted runs to make by $(grep -c . <<<"$todo") commands, ${#slots[@]} at a time"
    while read -r runs line; do
        while ((${#slots[@]} == 0)); do reap; done
        if [ -n "$stopped" ] || [ -z "$line" ]; then break; fi
        launch "$runs" "$line"
    done <<<"$todo"
    while ((${#running[@]})); do reap; done
}

edges() { # the next command lines of those grids on stdin that are complete and have an optimum on an edge
    local rows next
    rows=$(status) || return
    if ! awk -F '\t' '$1 == $4 {exit found = 1} END {exit !found}' <<<"$rows"; then return; fi
    next=$("$python" "$here/plot.py" "$out" --edges) || return
    awk -F '\t' '
        function value(rate,  part) {return split(rate, part, "^") == 2 ? part[1] ^ part[2] : rate + 0}
        NF == 2 {beyond[$1] = beyond[$1] " " $2}
        NF == 6 && $1 < $4 {open[$5]}
        NF == 6 && match($6, / --lr [^ ]+/) {
            lr = value(substr($6, RSTART + 6, RLENGTH - 6)); line[$5] = $6
            if (!($5 in low) || lr < low[$5]) low[$5] = lr
            if (!($5 in high) || lr > high[$5]) high[$5] = lr
        }
        END {
            for (grid in line) for (i = split(grid in open ? "" : beyond[grid], rates, " "); i > 0; i--) {
                lr = value(rates[i]) # one step at a time: an interrupted sweep may have begun what lies between
                while (lr > 2 * high[grid]) lr /= 2
                while (lr < low[grid] / 2) lr *= 2
                sub(/ --lr [^ ]+/, " --lr " (rates[i] ~ /\^/ ? sprintf("2^%.0f", log(lr) / log(2)) : lr), line[grid])
                print line[grid]
            }
        }' <<<"$next"$'\n'"$rows"
}

sweep() { # sweep run_missing, or sweep submit_missing: a target's runs, then those that extend its grids
    local all todo round
    all=$(lines "$target") todo=$all
    for ((round = 1; ; round++)); do
        "$1" <<<"$todo" || return
        if [ -n "$stopped" ] || ((extend == 0)); then break; fi
        todo=$(edges <<<"$all") || return
        if [ -z "$todo" ]; then break; fi
        if ((round > extend)); then
            printf 'an optimum is still on the edge of its learning rates (see the report); next would be:\n%s\n' "$todo"
            break
        fi
        echo "an optimum is on the edge of its learning rates: extending the grid (round $round of at most $extend)"
        all+=$'\n'$todo
    done
}

# ---------------------------------------------------------------------------------------------------------------- Slurm

queued() { # the command lines in Slurm's queue: a task's comment names a list, and its number the line of the list
    local tasks number list
    tasks=$(squeue --me --noheader --array --format '%K %k') || return
    while read -r number list; do
        if [[ $list == "$lists"/* ]]; then sed -n "${number}p" "$list"; fi
    done <<<"$tasks"
}

submit_missing() { # submit what is missing of the command lines on stdin, and not in the queue, as job arrays
    local lists list queue size=0 todo flags first
    lists=$(mkdir -p "$out/slurm" && cd "$out/slurm" && pwd) || return 2
    queue=$(queued) && size=$(scontrol show config | awk '$1 == "MaxArraySize" {print $3 - 1}')
    if ! ((size > 0)); then fail "--slurm: no answer from Slurm's squeue and scontrol"; fi
    todo=$(missing) || return 2
    mapfile -t todo < <(cut -d ' ' -f 2- <<<"$todo" | grep . | grep -vxFf <(printf '%s\n' "$queue"))
    echo "$target: ${#todo[@]} commands to submit, $(grep -c . <<<"$queue") in the queue"
    eval "flags=($slurm)"
    for ((first = 0; first < ${#todo[@]}; first += size)); do
        list=$(mktemp "$lists/$target-XXXXXX") || return 2
        printf '%s\n' "${todo[@]:first:size}" >"$list"
        sbatch --requeue --signal=B:USR1@300 "${flags[@]}" --job-name "$target" --comment "$list" --chdir "$PWD" \
            --array "1-$(grep -c . "$list")" --open-mode append --output "${list//%/%%}.out" \
            --wrap "exec bash $(quote "$here/sweep.sh") task $(quote "$list")" || { rm "$list"; return 2; }
    done
}

task() { # what a task of an array does: its line of the list; it comes back after Slurm's signal before the time limit
    out=$(dirname "$(dirname "$1")")
    run_missing <<<"$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")" || return
    if [ "$stopped" != TERM ] && [ -n "$stopped${interrupted[*]}" ]; then # TERM is scancel's
        scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
    fi
}

# ---------------------------------------------------------------------------------------------------------- entry point

target=status
if (($#)) && [[ $1 != --* ]]; then target=$1 && shift; fi
if [[ $target == task ]]; then list=$1 && shift; fi
jobs="" dry="" slurm="" out=results appended="" stopped="" failed=() interrupted=() extend=${EXTEND:-6}
if [[ $target == demo ]]; then out=demo; fi
while (($#)); do
    if [[ $1 == --@(jobs|slurm|out)=* ]]; then set -- "${1%%=*}" "${1#*=}" "${@:2}"; fi
    if [[ $1 == --@(jobs|slurm|out) ]] && (($# < 2)); then fail "$1 needs a value"; fi
    case $1 in
        --jobs) jobs=$2; shift 2; continue ;;
        --slurm) slurm=" $2"; shift 2; continue ;;
        --dry-run) dry=1; shift; continue ;;
        --cost) target=cost; shift; continue ;;
        --out) out=$2 ;;
    esac
    appended+=" $(quote "$1")"
    shift
done
if [[ $target == status ]]; then overview; exit; fi
if [[ $target == cost ]]; then cost; exit; fi
if [[ " $targets task " != *" $target "* ]]; then fail "no target '$target'; there are: $targets"; fi
if [ -n "$dry" ]; then lines "$target"; exit; fi
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then fail "bash 5.1 or newer is needed to run a sweep"; fi
if [ -n "$slurm" ]; then sweep submit_missing; exit; fi

declare -A running=() # process id -> slot, number of runs and line of a command
trap 'stop TERM' TERM
trap 'stop USR1' HUP INT USR1
devices=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd,)}
IFS=, read -ra devices <<<"$devices"
gpus=${#devices[@]}
cores=${SLURM_CPUS_ON_NODE:-$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}
case $target in
    demo) extend=0 jobs=${jobs:-$cores} ;; # its nets are too small for more than a core each
    task) jobs=1 ;;
esac
if [ -z "$jobs" ]; then jobs=$((gpus ? gpus : cores > 1 ? cores / 2 : 1)); fi
if ! [[ $jobs =~ ^[1-9][0-9]*$ ]]; then fail "--jobs should be a positive number, not '$jobs'"; fi
threads=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}
if [[ $target == task ]]; then task "$list"; else sweep run_missing; fi
code=$?
if [[ $target != task && $code == 0 && -z $stopped ]]; then "$python" "$here/plot.py" "$out" || code=$?; fi
if ((${#failed[@]})); then
    printf '\n%d commands failed; the same sweep makes what is missing:\n' "${#failed[@]}"
    printf '  %s\n' "${failed[@]}"
    code=1
fi
if [ -n "$stopped" ] || ((code == 0 && ${#interrupted[@]})); then
    echo "interrupted: the same sweep makes what is missing"
    code=75
fi
exit $code
