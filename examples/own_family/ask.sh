#!/bin/sh
# Serves a layout that has no tokenizer, asks it by token ids, and stops the server: sh ask.sh LAYOUT
set -eu
log=$(mktemp)
echo "\$ mdl serve $1 --port 8123 &"
mdl -q serve "$1" --port 8123 > "$log" 2>&1 &
server=$!
trap 'kill $server 2> /dev/null || true; wait $server || true; rm -f "$log"' EXIT
until grep -q ready "$log"; do
    kill -0 $server 2> /dev/null || { cat "$log"; exit 1; }
    sleep 1
done
request=$(sed -n 's/^curl/curl/p' "$log")
show='import json, sys; print({k: v for k, v in json.load(sys.stdin)["choices"][0].items() if k in ("text", "token_ids")})'
echo "\$ $request | python -c '$show'"
sh -c "$request" | python -c "$show"
