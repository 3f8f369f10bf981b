#!/usr/bin/env bash
# Makes .venv in the clone and fills it: `make setup`. Needs no root and touches nothing outside
# the clone but pip's cache. Safe to interrupt and to run again: what is done is not done twice.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }
has_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

how_to_get_python() {
    local system=""
    [[ -r /etc/os-release ]] && system="$(. /etc/os-release && echo "${ID:-} ${ID_LIKE:-}")"
    case "$system" in
        *debian* | *ubuntu*) echo "install the packages python3 and python3-venv (version 3.11 to 3.13)" ;;
        *fedora* | *rhel*) echo "install the package python3.12" ;;
        *suse*) echo "install the package python312" ;;
        *arch*) echo "install the package python" ;;
        *alpine*) echo "use a glibc system: torch has no musl builds" ;;
        *) echo "install Python 3.12 from your system's packages or python.org" ;;
    esac
}

find_python() {
    if [[ -n "${PYTHON:-}" ]]; then
        fits "$PYTHON" || {
            echo "error: PYTHON=$PYTHON is not a Python 3.11 to 3.13" >&2
            return 1
        }
        echo "$PYTHON"
        return
    fi
    local candidate without_venv=""
    for candidate in python3 python3.12 python3.13 python3.11; do
        fits "$candidate" || continue
        if has_venv "$candidate"; then
            echo "$candidate"
            return
        fi
        without_venv="$candidate"
    done
    if [[ -n "$without_venv" ]]; then
        echo "error: $without_venv lacks venv: install the package python3-venv" >&2
    else
        echo "error: no Python 3.11 to 3.13 found: $(how_to_get_python)" >&2
    fi
    return 1
}

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python="$(find_python)"
    echo "setup: making .venv with $("$python" --version) ($(command -v "$python"))"
    "$python" -m venv --clear .venv
fi
exec .venv/bin/python scripts/setup.py "$@"
