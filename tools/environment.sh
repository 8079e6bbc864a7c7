#!/bin/sh
# Makes .venv and installs capjax into it with the matching constraints; does nothing where that is
# done already. Called by the Makefile: tools/environment.sh core|dev
# PYTHON names the interpreter; without it the first fit one is taken.
set -eu
cd "$(dirname "$0")/.."
want=$1

say() { echo "capjax: $*" >&2; }

is_fit() {
  "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# An interpreter named by the user that is not the one in .venv replaces it.
if [ -n "${PYTHON:-}" ]; then
  if ! is_fit "$PYTHON"; then
    say "PYTHON=$PYTHON is not Python >= 3.11 with the venv module; name another"
    exit 1
  fi
  if is_fit .venv/bin/python && [ "$(version "$PYTHON")" != "$(version .venv/bin/python)" ]; then
    rm -rf .venv
  fi
fi

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  found=
  for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11}; do
    if is_fit "$candidate"; then
      found=$candidate
      break
    fi
  done
  if [ -z "$found" ]; then
    say "needs Python >= 3.11 with the venv module (Debian: apt-get install python3-venv);" \
      "if it lies elsewhere, say make PYTHON=path/to/python3"
    exit 1
  fi
  say "making .venv with Python $(version "$found")"
  "$found" -m venv --clear .venv
fi

case $(version .venv/bin/python) in
  3.11) constraints=constraints/py311.txt ;;
  *) constraints=constraints/py312.txt ;;
esac

# The tests that compare with PyTorch's models or with the reference code of caption metrics, and
# those that compile for TPUs, need two gigabytes of packages: CI has them, and whoever installs the
# extras `parity`, `eval` and `plan`; elsewhere those tests are skipped.
if [ "$want" = dev ] && [ "${CI:-}" = true ]; then
  want=ci
fi
case $want in # what to install, and which environments have it
  core) target=. fit="core dev ci" ;;
  dev) target=".[dev]" fit="dev ci" ;;
  ci) target=".[dev,eval,parity,plan]" fit=ci ;;
esac

# What is installed follows from these files and from where the checkout lies.
state=$(cat pyproject.toml "$constraints" constraints/eval.txt constraints/parity.txt; pwd)
for stamp in $fit; do
  if [ "$(cat ".venv/installed-$stamp" 2>/dev/null)" = "$state" ]; then
    exit 0
  fi
done
say "installing packages into .venv (well under a minute on a fast line)"
rm -f .venv/installed-*
if ! .venv/bin/python -m pip install -qq --disable-pip-version-check -c "$constraints" \
  -c constraints/eval.txt -c constraints/parity.txt -e "$target"
then
  say "pip could not install the packages (its reason is above); mend that and run make again"
  exit 1
fi
echo "$state" >".venv/installed-$want"
