#!/usr/bin/env bash
# The paper's experiments. A target is a table or figure; its function prints a command line for each point
# (method, batch size, depth). A sweep starts workers, which go through these lines until all runs are done.
#
#   bash sweep.sh                      for each target: points and runs that are done, running, failed
#   bash sweep.sh table1               make what is missing, and print the table
#   bash sweep.sh table1 --dry-run     only print the command lines; --status: what has come of them
#   bash sweep.sh table1 --cost        hours on this machine, after `python speed.py`
#   bash sweep.sh table1 --width 1 --epochs 5 --seeds 1     what follows the target is appended to each line
#   bash sweep.sh table1 --slurm "--partition gpu --time 12:00:00 --gres gpu:1" --jobs 8     as a job array
# --jobs N            workers [one per GPU, else one per two cores; torchrun has the whole machine]
# BATCHES, INITS, DEPTHS="16 40" bash sweep.sh ...     replace a target's own grid
# LRS="2^-3 2^-2"     run these learning rates [search for the best; FULL=1: with all seeds at all rates]
# NPROC=N             GPUs of a run on ImageNet [8; 1: without torchrun]
# Exit codes: 0 done, 1 a line failed, 2 bad usage or data, 75 interrupted. The same sweep goes on.
# shellcheck disable=SC2048,SC2086,SC2206,SC2329  # lists split into words; targets are called by name
if [ -z "${BASH:-}" ]; then exec bash "$0" "$@"; fi # `sh sweep.sh`
targets="fig1 fig2 fig3 fig4 table1 table2 table3 table4 table5 demo"
fig1() { # 16-4, ghost batches of 64, large batches (section 3)
    for B in ${BATCHES:-16 32 64 128 256 512 1024 2048 4096 8192}; do wrn "bn none zeroinit" --bs $B; done
}
fig3() { # 16-4, statistics over the whole batch, small batches (section 4)
    for B in ${BATCHES:-1 2 4 8 16 32 64 128 256 512 1024}; do wrn "bn none zeroinit" --bs $B --ghost 0; done
}
fig2() { fig1; }; fig4() { fig3; } # the optimal learning rates of Figures 1 and 3
table1() { wrn "none biases dropout scalar biases+dropout zeroinit" --bs 64; } # 16-4, ZeroInit piece by piece
table2() { # d-2, batch norm against ZeroInit by depth
    for depth in ${DEPTHS:-16 100 1000}; do wrn "bn zeroinit" --bs 64 --depth $depth --width 2; done
}
table3() { # d-2, ZeroInit without L2, and its scalar alone
    for depth in ${DEPTHS:-16 100 1000}; do
        INITS="" wrn zeroinit --bs 64 --depth $depth --width 2 --wd 0
        INITS="" wrn scalar --bs 64 --depth $depth --width 2
    done
}
table4() { seeds=1 resnet50 v2 "bn fixup zeroinit-nodropout zeroinit"; } # on ImageNet, identity skip paths
table5() { seeds=1 resnet50 v1 "bn fixup zeroinit zeroinit+bias"; } # a ReLU after each block
demo() { # what depth does: each block without normalization doubles the variance
    flags="--data shapes --train-size 2400 --width 1 --bs 8 --epochs 1 --amp off --out demo"
    for depth in ${DEPTHS:-40 16}; do for init in ${INITS:-none bn scalar}; do
        case $init in none) lrs="2^-13 2^-11 2^-9 2^-7 2^-5 2^-3" ;; *) lrs="2^-5 2^-3 2^-1 2^1" ;; esac
        INITS=$init seeds=1 rates="--lr ${LRS:-$lrs}" wrn "" --depth $depth $flags
    done; done
}
seeds=15 rates="--search best"
if [ "${FULL:-0}" != 0 ]; then rates="--search all"; fi
if [ -n "${LRS:-}" ]; then rates="--lr $LRS"; fi
points() { for init in ${INITS:-$2}; do echo $1 --init $init ${*:3} $rates --seeds $seeds; done; }
wrn() { points "python wrn_cifar.py" "$@"; } # wrn METHODS FLAGS
resnet50() { # resnet50 VERSION METHODS
    case ${NPROC:-8} in 1) run=python ;; *) run="torchrun --standalone --nproc_per_node=${NPROC:-8}" ;; esac
    for B in ${BATCHES:-256 1024 4096}; do points "$run resnet_imagenet.py --arch $1" "$2" --bs $B; done
}
# lines TARGET...: with what the user appended, and the target as a comment
lines() { for name; do $name | while read -r line; do printf '%s\n' "$line$appended # $name"; done; done; }
# ---------------------------------------------------------------------------------------------------- workers
stop() { stopped=$1 && kill -TERM $children 2>/dev/null; } # what is running saves a checkpoint, ends with 75
await() { while wait $1 2>/dev/null; code=$?; kill -0 $1 2>/dev/null; do :; done; } # signals end `wait` early
worker() { # worker N ID: go through all lines, from a place of its own, until each has ended with 0 or failed
    local seconds=1 all=${#todo[@]} left again i
    trap '' INT && trap 'stop TERM' TERM HUP && trap 'stop USR1' USR1 # Ctrl-C is the sweep's to pass on
    left=$(for ((i = 0; i < all; i++)); do echo $((($1 * all / jobs + i) % all)); done)
    while again="" && [ -n "$left" ]; do
        for i in $left; do
            run "${todo[i]}" "$out/logs/$target-$((i + 1))-$2.log"
            case $code in 75) return ;; 76) again+=" $i" ;; 0) seconds=1 ;; *) seconds=1 failed=$code ;; esac
        done
        left=$again seconds=$((seconds < 15 ? seconds * 2 : 30))
        if [ -n "$left" ]; then sleep $seconds & wait $!; fi # others make the rest; a search may need more
    done
}
run() { # run LINE LOG: sets `code`; the log has the line, then its output and `exit CODE` each time it ran
    if [ -n "$stopped" ] || ! kill -0 $$ 2>/dev/null; then code=75 && return; fi # the sweep, $$, was killed
    eval "words=($1"$'\n)'
    for k in 3 2 1; do if [[ ${words[k]} == *.py ]]; then words[k]=$here/${words[k]}; fi; done
    if [ ! -s "$2" ]; then printf '%s\n' "${1% # *}" >"$2"; fi
    "${words[@]}" </dev/null >>"$2" 2>&1 & children=$!
    if [ -n "$stopped" ]; then stop $stopped; fi # the signal came before the number was known
    await $children
    if [ -n "$stopped" ] && [ $code != 0 ]; then code=75; fi # killed before it listened, or torchrun's 1
    if [ $code = 1 ] && tail -n 40 "$2" | grep -q 'exitcode *: 76 '; then code=76; fi # torchrun's processes
    printf '\nexit %d\n' $code >>"$2"
}
sweep() { # start workers, and a monitor that shows what they finish until they end or nothing is left to do
    trap 'stop TERM' TERM INT HUP USR1
    for ((n = 0; n < jobs; n++)); do
        if ((${#gpus[@]})); then export CUDA_VISIBLE_DEVICES=${gpus[n % ${#gpus[@]}]}; fi
        worker $n "$(date +%s).$$.$n" & children+=" $!" # a container's $$ is always the same
    done
    if [ -n "$stopped" ]; then stop $stopped; fi # the signal came before a worker's number was known
    lines $target | python "$here/wrn_cifar.py" --watch $children & await $!; end=$code
    kill -TERM $children 2>/dev/null; for pid in $children; do await $pid; done
    [[ $stopped$end == [012] ]] || { echo "interrupted: the same sweep$fresh goes on from here"; return 75; }
    if [ $end = 2 ]; then return 2; fi
    python "$here/plot.py" "$out" --table $target && python "$here/plot.py" "$out"
    return $((end ? end : $?))
}
submit() { # the workers as a job array
    if [ -n "$fresh" ]; then fail "--fresh: a task that is requeued would begin again"; fi
    state=$(lines $target | sed "s/ # $target$/ --device cpu&/" | python "$here/wrn_cifar.py" --status) ||
        [ $? != 2 ] || fail "${state##*$'\n'}" # a bad flag ends it here, not in each task
    eval "flags=($slurm)" && sbatch --requeue --signal=B:USR1@300 --open-mode append "${flags[@]}" \
        --job-name $target --array 1-$jobs --chdir "$PWD" --output "${out//%/%%}/logs/slurm-%A_%a.out" \
        --wrap "exec bash $(quote "$here/sweep.sh") $target --task$appended"
}
task() { # one of them; it comes back after Slurm's signal before the time limit, but not after scancel's TERM
    jobs=$SLURM_ARRAY_TASK_COUNT id=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID failed=""
    worker $((SLURM_ARRAY_TASK_ID - 1)) $id
    if [ $code = 75 ] && [ "$stopped" != TERM ]; then scontrol requeue $id; fi
    return ${failed:-0}
}
# ------------------------------------------------------------------------------------------------------ flags
fail() { echo "error: $1" >&2 && exit 2; }
# quote WORD: as both bash and Python's shlex read it
quote() { if [[ $1 =~ ^[a-zA-Z0-9_./:=,+^-]+$ ]]; then echo "$1"; else echo "'${1//$mark/$escaped}'"; fi; }
here=$(dirname "$(readlink -f "$0")") # also through a link
target="" act=sweep show=() jobs="" slurm="" out=results appended="" fresh="" stopped="" children="" todo=()
set +e +u && mark="'" escaped="'\\''" odd='[^a-zA-Z0-9_.^+[:space:]-]' # -e, -u: as a user's shell may export
cores=$(OMP_NUM_THREADS="" nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) workers=$(((cores + 1) / 2))
if [[ ${1:--} == -* ]]; then set -- "" --status "$@"; fi && target=$1 && shift
if [[ " $targets " != *" ${target:-demo} "* ]]; then fail "no target '$target'; there are: $targets"; fi
[[ $* == *$'\n'* || $LRS$INITS$BATCHES$DEPTHS$NPROC =~ $odd ]] &&
    fail "a line break in a flag, or LRS, INITS, BATCHES, DEPTHS, NPROC with more than letters, digits, _.^+-"
for var in ${target:+INITS BATCHES DEPTHS}; do
    [[ -z ${!var} || $(declare $var=1 && lines $target) != "$(declare $var=2 && lines $target)" ]] ||
        fail "$var changes nothing in $target"
done
command -v python >/dev/null || fail "there is no command 'python': activate its environment"
if [ "$target" = demo ]; then out=demo workers=$cores; fi
while (($#)); do
    case $1 in --jobs=* | --slurm=* | --out=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    case $1 in
        -h | --help) sed -n '2,/^# Exit/s/^# \{0,1\}//p' "$0" && exit ;;
        --dry-run) show=(cat) ;;
        --status) show=(python "$here/wrn_cifar.py" --status) ;;
        --cost) show=(python "$here/speed.py" --cost) ;;
        --task) act=task ;;
        --jobs) jobs=${2:-none} && shift ;;
        --slurm) act=submit slurm=${2:-} && shift ;;
        --fresh) fresh=", without --fresh," appended+=" $1" ;;
        --out) out=${2:-} appended+=" $1" ;;
        *) appended+=" $(quote "$1")" ;;
    esac
    shift
done
if ((${#show[@]})); then lines ${target:-$targets} | "${show[@]}"; exit; fi
while IFS= read -r line; do todo+=("$line"); done <<<"$(lines $target)"
gpus=${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>&1 | grep '^[0-9]')}
gpus=(${gpus//,/ })
if [[ $act == submit || ${todo[0]} == torchrun* ]]; then gpus=() workers=1; fi
jobs=${jobs:-$((${#gpus[@]} ? ${#gpus[@]} : workers))}
if ! [[ $jobs =~ ^[1-9][0-9]*$ ]]; then fail "--jobs should be a positive number, not '$jobs'"; fi
if [ $act = sweep ]; then export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}; fi
if [[ -z $out || $out == -* ]]; then fail "--out should be a folder, not '$out'"; fi
mkdir -p "$out/logs" || exit 2; $act; exit
