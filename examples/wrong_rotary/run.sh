#!/bin/sh
# A conversion with a wrong mapping: it loads, it answers, and mdl verify fails it.
set -u
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
python "$(dirname "$0")/make.py" "$out"
cd "$out" || exit 1
echo '$ mdl convert ckpt.pt layout --arch ./forgetful.py --tokenizer none'
mdl -q convert ckpt.pt layout --arch ./forgetful.py --tokenizer none
echo '$ mdl verify layout --arch ./forgetful.py'
mdl -q verify layout --arch ./forgetful.py
