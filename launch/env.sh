# shellcheck shell=bash
# Sourced by the scripts beside it: finds or makes a Python environment and installs what a run needs.
#
#   source launch/env.sh
#   w2s_env                     # sets $PYTHON: an active environment's, else .venv's, made if there is none
#   w2s_install "$PYTHON" ...   # requirements.txt and further packages; skipped when nothing changed
#
# An accelerator's jax that is already installed is kept as it is: its version is pinned for pip. W2S_INSTALL=0 installs nothing.

W2S_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PIP_DISABLE_PIP_VERSION_CHECK=1

w2s_fail() { echo "error: $*" >&2; exit 2; }

# w2s_usage FILE: the comment that a script begins with.
w2s_usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p;}' "$1"; }

# w2s_flag NAME FLAGS...: the value of --NAME among w2s's flags.
w2s_flag() {
  local name="$1"
  shift
  while [ $# -gt 0 ]; do
    case "$1" in
      --"$name"=* | -"$name"=*) echo "${1#*=}"; return ;;
      --"$name" | -"$name") echo "${2:-}"; return ;;
    esac
    shift
  done
}

# w2s_works PYTHON: it runs, and is a supported version (a pyenv shim may exist without its Python).
w2s_works() {
  "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

# w2s_find NAMES...: the first of these Pythons that works here, on PATH or among pyenv's versions.
w2s_find() {
  local name path
  for name in "$@"; do
    if w2s_works "$name"; then command -v "$name"; return 0; fi
    if command -v pyenv >/dev/null; then  # its shims work for the selected version only
      for path in "$(pyenv root)"/versions/*/bin/"$name"; do
        if w2s_works "$path"; then echo "$path"; return 0; fi
      done
    fi
  done
  return 1
}

# w2s_venv PYTHON FOLDER
w2s_venv() {
  echo "making ${2#"$W2S_ROOT"/} with $("$1" --version 2>&1)" >&2
  "$1" -m venv "$2" >&2 || { rm -rf "$2"; w2s_fail "$1 cannot make a virtual environment (on Debian: apt install python3-venv)"; }
}

w2s_env() {
  local base active="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
  if [ -n "$active" ] && [ -x "$active/bin/python" ]; then
    PYTHON="$active/bin/python"
    if w2s_works "$PYTHON"; then return; fi
    echo "not used: $PYTHON is $("$PYTHON" --version 2>&1), expected Python 3.11 to 3.13" >&2
  fi
  if ! w2s_works "$W2S_ROOT/.venv/bin/python"; then
    base="$(w2s_find python3.11 python3.12 python3.13 python3 python)" || w2s_fail "no Python 3.11 to 3.13 on PATH"
    w2s_venv "$base" "$W2S_ROOT/.venv"
  fi
  PYTHON="$W2S_ROOT/.venv/bin/python"
}

# w2s_pins PYTHON: `name==version` of jax and its plugins where an accelerator's are installed, else nothing.
w2s_pins() {
  "$1" - <<'PY'
import importlib.metadata as metadata

found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions() if d.metadata["Name"]}
ours = {n: v for n, v in found.items() if n in ("jax", "jaxlib", "libtpu") or n.startswith("jax-") and ("plugin" in n or "pjrt" in n)}
if set(ours) - {"jax", "jaxlib"}:
    print("\n".join(f"{n}=={v}" for n, v in sorted(ours.items())))
PY
}

# w2s_install PYTHON [PACKAGES...]
w2s_install() {
  local python="$1" stamp wanted pins
  shift
  if [ "${W2S_INSTALL:-1}" = 0 ]; then return; fi
  stamp="$("$python" -c 'import sys; print(sys.prefix)')/.w2s-installed" # a line for each that is there
  wanted="$(cat "$W2S_ROOT/requirements.txt"; printf '%s\n' "$@")"
  if [ -f "$stamp" ] && ! grep -Fxqvf "$stamp" <<<"$wanted" && "$python" -c 'import jax, flax' >/dev/null 2>&1; then return; fi
  "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null 2>&1 || w2s_fail "$python has no pip"
  pins="$(mktemp)"
  w2s_pins "$python" >"$pins"
  echo "installing requirements.txt${*:+ and $*}" >&2
  "$python" -m pip install --quiet -r "$W2S_ROOT/requirements.txt" "$@" -c "$pins" || {
    if [ -s "$pins" ]; then echo "kept: $(tr '\n' ' ' <"$pins")" >&2; fi
    rm -f "$pins"
    w2s_fail "pip could not install requirements.txt (see above)"
  }
  rm -f "$pins"
  if [ -f "$stamp" ] && ! grep -Fxqvf "$stamp" "$W2S_ROOT/requirements.txt"; then wanted+="$(echo; cat "$stamp")"; fi # what was added before
  sort -u <<<"$wanted" >"$stamp"
}

# w2s_extra PYTHON NAMES...: what these extras of pyproject.toml install, one a line.
w2s_extra() {
  local python="$1"
  shift
  "$python" -c '
import sys, tomllib
extras = tomllib.load(open(sys.argv[1], "rb"))["project"]["optional-dependencies"]
print("\n".join(name for extra in sys.argv[2:] for name in extras[extra]))' "$W2S_ROOT/pyproject.toml" "$@"
}

# w2s_accelerator PYTHON: the extra that brings jax for the NVIDIA GPUs here; nothing where there are none, or jax knows its way already.
w2s_accelerator() {
  local version
  if [ -n "$(w2s_pins "$1")" ] || ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L 2>/dev/null | grep -q GPU; then return; fi
  version="$(nvidia-smi | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p')"
  if [ "${version:-12}" -ge 13 ]; then echo cuda13; else echo cuda12; fi
}
