# Sourced by quickstart.sh and tests/run.sh: makes the virtual environment and activates it.
#   VENV    folder of the environment (default .venv)
#   PYTHON  interpreter that makes it (default python3.11, else python3)
VENV=${VENV:-.venv}

prepare_environment() { # the requirement to install, e.g. `.` or `.[test]`
  local python=${PYTHON:-$(command -v python3.11 || command -v python3)}
  local key stamp="$VENV/.installed-${1//[^a-z]/}"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed, and $python is $("$python" --version). Set PYTHON=..." >&2
    return 1
  }
  key=$(cat pyproject.toml launch/constraints.txt | sha256sum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
    [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV"
    if ! {
      "$VENV/bin/python" -m pip install --disable-pip-version-check --upgrade pip &&
        "$VENV/bin/python" -m pip install --disable-pip-version-check \
          --constraint launch/constraints.txt --editable "$1"
    } > "$VENV/install.log" 2>&1; then
      tail -n 25 "$VENV/install.log" >&2
      echo "The installation failed; all of it is in $VENV/install.log." >&2
      return 1
    fi
    printf '%s' "$key" > "$stamp"
  fi
  export PATH="$PWD/$VENV/bin:$PATH"
  case $VENV in /*) export PATH="$VENV/bin:$PATH" ;; esac
}
