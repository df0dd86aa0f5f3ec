#!/bin/sh
# From a raw checkpoint to a verified answer by vLLM. Run it with `make demo`, or `sh examples/demo.sh [OUT]`.
set -eu
cd "$(dirname "$0")/.."

out=${1:-$(mktemp -d)/moby_dick}

run() {
    printf '\n$'
    for word; do
        case $word in
            *[!A-Za-z0-9_./:=-]*) printf ' "%s"' "$word" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
    printf '\n'
    "$@"
}

run mdl inspect examples/moby_dick/ckpt.pt
run mdl convert examples/moby_dick/ckpt.pt "$out"
run mdl verify "$out"
run mdl serve "$out" --prompt "Call me Ishmael."
