#!/usr/bin/env bash
# The paper's experiments. A target is a table or figure: its function prints the command lines, the rest runs them.
#
#   bash sweep.sh                             what is done, running, failed and missing of each target
#   bash sweep.sh --cost                      how many hours each target takes, by the speed that speed.py measured
#   bash sweep.sh fig3                        make the runs that are missing, extend grids whose optimum is on an edge, report
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
        bn) exponent=-7 limit=4 ;;                                # 2^-1 at 64
        none | biases | dropout | biases+dropout) exponent=-10 limit=-3 ;; # 2^-4 at 64
        resnet50) exponent=-11 limit=9 ;;                         # 2^-3 at 256
        *) exponent=-8 limit=1 ;;                                 # 2^-2 at 64
    esac
    while ((size < $2)); do ((size *= 2, exponent += 1)); done
    echo $((exponent < limit ? exponent : limit))
}

around() { # around EXPONENT N: the power of two, and N on either side
    local k
    for ((k = $1 - $2; k <= $1 + $2; k++)); do echo "2^$k"; done
}

# --------------------------------------------------------------------------------------------------- listing and counting

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}

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
    local all script its
    all=$(cat)
    for script in wrn_cifar.py resnet_imagenet.py; do
        if its=$(grep -E "^[a-z]+( --[^ ]+)* $script " <<<"$all"); then
            "$python" "$here/$script" --status <<<"$its" || return 2
        fi
    done
}

missing() { # those of the command lines whose runs are neither all done nor running; before each, the number of its runs
    local rows
    rows=$(status) || return
    awk -F '\t' '$1 + $3 < $4 {print $4 - $1 - $3, $6}' <<<"$rows"
}

log_of() { # the log of a command line: the line, what it printed and `exit CODE`, again for each time that it ran
    local hash
    hash=$(printf %s "$1" | sha1sum)
    echo "$out/logs/${hash:0:12}.log"
}

failures() { # of each command that failed last time: the line, the log, the exit code and its last words, with tabs
    local log line words code
    for log in "$out"/logs/*.log; do
        [ -f "$log" ] || continue
        { read -r words && read -r code; } < <(tail -n 2 "$log")
        case $code in "exit 0" | "exit 75" | "") continue ;; exit\ *) ;; *) continue ;; esac
        read -r line <"$log"
        printf '%s\t%s\t%s\t%s\n' "$line" "$log" "$code" "${words//[$'\t\r']/ }"
    done
}

overview() { # per target, diverged runs are among the done, and failed ones among the missing; then why they failed
    local target rows
    rows=$(for target in $targets; do lines "$target" | sed "s/$/ # $target/"; done | status) || exit
    { failures; printf '%s\n' "$rows"; } | awk -F '\t' -v targets="$targets" '
        NF == 4 {why[$1] = $2 ": " $3 ": " $4; next}
        {
            t = line = $6; sub(/.* # /, "", t); sub(/ # [a-z0-9]+$/, "", line); left = $4 - $1 - $3
            done[t] += $1; diverged[t] += $2; running[t] += $3; all[t] += $4; missing[t] += left
            if (left > 0 && line in why) {failed[t] += left; if (!told[line]++) reasons = reasons "\n" why[line]}
        }
        END {
            form = "%-8s %6s %6s %8s %9s %7s %8s\n"
            printf form, "target", "runs", "done", "running", "diverged", "failed", "missing"
            for (i = 1; i <= split(targets, name, " "); i++) {
                t = name[i]; printf form, t, all[t] + 0, done[t] + 0, running[t] + 0, diverged[t] + 0, failed[t] + 0, missing[t] + 0
            }
            if (reasons) print "\nfailed:" reasons
        }'
}

cost() { # runs, missing runs, and the hours of all runs by the newest record of speed.py
    local hours counts
    hours=$("$python" -c '
import json, pathlib, sys
newest = max(pathlib.Path(sys.argv[1]).glob("*.json"), key=lambda path: path.stat().st_mtime)
for row in json.loads(newest.read_text())["cost"]:
    print(row["target"], round(row["hours"], 1))
print(newest)' "$out/speed" 2>/dev/null) || {
        echo "error: no record of speed in $out/speed: run \`python speed.py\` first" >&2
        exit 2
    }
    counts=$(overview) || exit
    awk 'NF == 2 {hours[$1] = $2}
        NF == 7 {printf "%-8s %6s %8s %8s\n", $1, $2, $7, $1 == "target" ? "hours" : $1 in hours ? hours[$1] : "?"}
        /^$/ {exit}' <<<"$hours"$'\n'"$counts"
    echo "hours on this machine, by ${hours##*$'\n'}"
}

# -------------------------------------------------------------------------------------------------------------- running

seconds() { # as 3h05m or 4m10s
    if (($1 >= 3600)); then printf '%dh%02dm' $(($1 / 3600)) $(($1 % 3600 / 60)); else printf '%dm%02ds' $(($1 / 60)) $(($1 % 60)); fi
}

launch() { # launch RUNS LINE: start a command in a free slot, on its device; torchrun gets all devices and a free port
    local line=$2 slot=${slots[0]} log words place=(env)
    log=$(log_of "$line")
    eval "words=($line)"
    if [[ ${words[0]} == torchrun ]]; then
        words=(-m torch.distributed.run --standalone "${words[1]}" "$here/${words[2]}" "${words[@]:3}")
    else
        words=("$here/${words[1]}" "${words[@]:2}")
        if ((gpus)); then place+=("CUDA_VISIBLE_DEVICES=${devices[slot % gpus]}"); else place+=("OMP_NUM_THREADS=$threads"); fi
    fi
    echo "$line" >>"$log"
    "${place[@]}" "$python" "${words[@]}" </dev/null >>"$log" 2>&1 &
    line_of[$!]=$line log_of[$!]=$log runs_of[$!]=$1 slot_of[$!]=$slot slots=("${slots[@]:1}")
    if [ -n "$stopped" ]; then kill -TERM "$!" 2>/dev/null; fi # the signal came before the command was in the table
}

stop() { # stop SIGNAL: pass it on; the commands save a checkpoint and end, and so does the sweep once they all have
    stopped=$1
    if ((${#line_of[@]})); then kill -TERM "${!line_of[@]}" 2>/dev/null; fi
}

reap() { # wait until a command ends, or a signal comes; note how it ended
    local pid="" code line log
    wait -n -p pid "${!line_of[@]}"
    code=$?
    [ -n "${pid:-}" ] || return
    line=${line_of[$pid]} log=${log_of[$pid]} slots+=("${slot_of[$pid]}")
    unset "line_of[$pid]"
    # Told to stop, a command may die before it listens, and torchrun ends with 1 whatever its processes say.
    if [ -n "$stopped" ] && ((code)); then code=75; fi
    { [ -z "$(tail -c 1 "$log")" ] || echo; echo "exit $code"; } >>"$log"
    ((made += runs_of[$pid]))
    printf '[%d/%d runs, %s left] ' "$made" "$wanted" "$(seconds $(((SECONDS - started) * (wanted - made) / made)))"
    case $code in
        0) echo "$line" ;;
        75) interrupted+=("$line") && echo "interrupted: $line" ;;
        *) failed+=("$line (exit code $code, see $log)") && echo "FAILED with exit code $code: $line" ;;
    esac
}

run_missing() { # run what is missing of the command lines on stdin, $jobs at a time
    local made=0 wanted runs line slot slots=() todo started=$SECONDS
    todo=$(missing) || return 2
    mkdir -p "$out/logs" || return 2
    wanted=$(awk '{runs += $1} END {print runs + 0}' <<<"$todo")
    for ((slot = 0; slot < jobs; slot++)); do slots+=("$slot"); done
    if [[ $todo == *" torchrun "* ]]; then slots=(0); fi
    echo "$target: $wanted runs to make by $(grep -c . <<<"$todo") commands, ${#slots[@]} at a time"
    while read -r runs line; do
        while ((${#slots[@]} == 0)); do reap; done
        if [ -n "$stopped" ] || [ -z "$line" ]; then break; fi
        launch "$runs" "$line"
    done <<<"$todo"
    while ((${#line_of[@]})); do reap; done
}

edges() { # of the grids of the command lines on stdin: where all runs are there and an optimum is on an edge, the next lines
    local rows next
    rows=$(status) || return
    rows=$(awk -F '\t' '$1 < $4 {open[$5]} {row[NR] = $0; grid[NR] = $5}
        END {for (i = 1; i <= NR; i++) if (!(grid[i] in open)) print row[i]}' <<<"$rows")
    [ -n "$rows" ] || return 0
    next=$("$python" "$here/plot.py" "$out" --edges) || return
    awk -F '\t' '
        function value(rate,  part) {return split(rate, part, "^") == 2 ? part[1] ^ part[2] : rate + 0}
        NF == 2 {beyond[$1] = beyond[$1] " " $2; next}
        match($6, / --lr [^ ]+/) {
            lr = value(substr($6, RSTART + 6, RLENGTH - 6)); line[$5] = $6
            if (!($5 in low) || lr < low[$5]) low[$5] = lr
            if (!($5 in high) || lr > high[$5]) high[$5] = lr
        }
        END { # one step at a time: a rate between the edge and the one beyond was begun by a sweep that was interrupted
            for (grid in beyond) for (i = split(grid in line ? beyond[grid] : "", rates, " "); i > 0; i--) {
                for (lr = value(rates[i]); lr > 2 * high[grid]; lr /= 2);
                for (; lr < low[grid] / 2; lr *= 2);
                lr = rates[i] ~ /\^/ ? sprintf("2^%.0f", log(lr) / log(2)) : lr
                next_line = line[grid]; sub(/ --lr [^ ]+/, " --lr " lr, next_line); print next_line
            }
        }' <<<"$next"$'\n'"$rows"
}

# ---------------------------------------------------------------------------------------------------------------- Slurm

queued() { # the command lines that wait or run in Slurm's queue: a task's comment is its list, its number the line in it
    local tasks task list
    tasks=$(squeue --me --noheader --array --format '%K %k') || return
    while read -r task list; do
        if [[ $list == "$lists"/* ]]; then sed -n "${task}p" "$list"; fi
    done <<<"$tasks"
}

submit_missing() { # submit what is missing of the command lines on stdin and not in the queue yet, as job arrays
    local lists list todo queue size first flags
    lists=$(mkdir -p "$out/slurm" && cd "$out/slurm" && pwd) || return 2
    size=$(scontrol show config | awk '$1 == "MaxArraySize" {print $3 - 1}') # numbers from 1 to below MaxArraySize
    queue=$(queued) && [ "${size:-0}" -gt 0 ] || { echo "error: --slurm: no answer from Slurm's squeue or scontrol" >&2; return 2; }
    todo=$(missing) || return 2
    mapfile -t todo < <(cut -d ' ' -f 2- <<<"$todo" | grep . | grep -vxFf <(printf '%s\n' "$queue"))
    echo "$target: ${#todo[@]} commands to submit, $(grep -c . <<<"$queue") in the queue"
    eval "flags=($slurm)"
    for ((first = 0; first < ${#todo[@]}; first += size)); do
        list=$(mktemp "$lists/$target-XXXXXX") || return 2
        printf '%s\n' "${todo[@]:first:size}" >"$list"
        sbatch --requeue --signal=B:USR1@300 "${flags[@]}" --job-name "$target" --array "1-$(grep -c . "$list")" --comment "$list" \
            --chdir "$PWD" --open-mode append --output "${list//%/%%}.out" \
            --wrap "exec bash $(quote "$here/sweep.sh") task $(quote "$list")" || { rm "$list"; return 2; }
    done
}

task() { # what a task of a job array does: its line of the list; requeue itself if Slurm's signal before the time limit ended it
    local list=$1
    target=task out=$(dirname "$(dirname "$list")")
    run_missing <<<"$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$list")" || return
    if ((${#interrupted[@]})) && [ "$stopped" != TERM ]; then scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; fi
}

# ---------------------------------------------------------------------------------------------------------- entry point

sweep() { # sweep run_missing or submit_missing: the target's runs, then those that extend its grids
    local all todo round
    all=$(lines "$target") todo=$all
    for ((round = 1; ; round++)); do
        "$1" <<<"$todo" || return
        if [ -n "$stopped" ] || ((extend == 0)); then break; fi
        todo=$(edges <<<"$all") || return
        [ -n "$todo" ] || break
        if ((round > extend)); then
            echo "an optimum is still on the edge of its learning rates (see the report); next would be:"
            printf '%s\n' "$todo"
            break
        fi
        echo "an optimum is on the edge of its learning rates: extending the grid (round $round of at most $extend)"
        all+=$'\n'$todo
    done
}

target=status
if (($#)) && [[ $1 != --* ]]; then target=$1; shift; fi
jobs="" dry="" cost="" slurm="" out=results appended="" list="" stopped="" failed=() interrupted=() extend=${EXTEND:-6}
if [[ $target == task ]]; then list=$1 && shift; fi
if [[ $target == demo ]]; then out=demo; fi
while (($#)); do
    case $1 in
        --jobs | --slurm) if (($# < 2)); then echo "error: $1 needs a value" >&2; exit 2; fi ;;&
        --jobs) jobs=$2; shift 2; continue ;;
        --jobs=*) jobs=${1#*=}; shift; continue ;;
        --slurm) slurm=${2:- }; shift 2; continue ;;
        --slurm=*) slurm=${1#*=}\ ; shift; continue ;;
        --dry-run) dry=1; shift; continue ;;
        --cost) cost=1; shift; continue ;;
        --out) out=${2:-} ;;
        --out=*) out=${1#*=} ;;
    esac
    appended+=" $(quote "$1")"
    shift
done
if [ -n "$cost" ]; then cost; exit; fi
if [[ $target == status ]]; then overview; exit; fi
if [[ " $targets task " != *" $target "* ]]; then echo "error: no target '$target'; there are: $targets" >&2; exit 2; fi
if [ -n "$dry" ]; then lines "$target"; exit; fi
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then echo "error: bash 5.1 or newer is needed to run a sweep" >&2; exit 2; fi
if [ -n "$slurm" ]; then sweep submit_missing; exit; fi

IFS=, read -ra devices <<<"${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd,)}"
gpus=${#devices[@]}
cores=${SLURM_CPUS_ON_NODE:-$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}
if [[ $target == demo ]]; then extend=0 jobs=${jobs:-$cores}; fi # its nets are too small for more than a core each
if [[ $target == task ]]; then jobs=1; fi
if [ -z "$jobs" ]; then jobs=$((gpus ? gpus : cores > 1 ? cores / 2 : 1)); fi
if ! [[ $jobs =~ ^[1-9][0-9]*$ ]]; then echo "error: --jobs should be a positive number, not '$jobs'" >&2; exit 2; fi
threads=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}
declare -A line_of=() log_of=() runs_of=() slot_of=()
trap 'stop TERM' TERM
trap 'stop INT' HUP INT USR1
if [[ $target == task ]]; then task "$list"; else sweep run_missing; fi
code=$?
if [[ $target != task && $code == 0 && -z $stopped ]]; then "$python" "$here/plot.py" "$out"; fi
if ((${#failed[@]})); then
    printf '\n%d commands failed; the same sweep makes what is missing:\n' "${#failed[@]}"
    printf '  %s\n' "${failed[@]}"
    code=1
fi
if [ -n "$stopped" ] || ((${#interrupted[@]})); then
    echo "interrupted: the same sweep makes what is missing"
    exit 75
fi
exit $code
