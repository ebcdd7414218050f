"""Print a script that lets the shell complete verbs, settings and their values: `sftx completion
bash`.

bash: add `eval "$(sftx completion bash)"` to ~/.bashrc. zsh: the same with zsh in ~/.zshrc, after
compinit. fish: `sftx completion fish > ~/.config/fish/completions/sftx.fish`. The words are in the
script: nothing is started while you type. Print it anew after an update.
"""

from __future__ import annotations

from sftx.cli._words import words
from sftx.types import UserError

STAGE = "set up"
EXAMPLE = 'eval "$(sftx completion bash)"'
SHELLS = ("bash", "zsh", "fish")


def run(path: str = "") -> int:
    """Print the script for the shell `path`."""
    match path:
        case "bash":
            print(_bash())
        case "zsh":
            print(_zsh())
        case "fish":
            print(_fish())
        case _:
            found = f"{path!r}" if path else "no shell is named"
            raise UserError(f"sftx completion: {found}; allowed: {', '.join(SHELLS)}")
    return 0


def _keys() -> str:
    """The keys of each verb, as branches of a shell's `case`."""
    lines = [
        f"    {verb}) keys='{' '.join(f'{key}=' for key in keys)}' ;;"
        for verb, keys in words().keys.items()
    ]
    return "\n".join(lines)


def _values() -> str:
    """The values of each setting, for the verbs that read settings."""
    verbs = "|".join(words().with_settings)
    lines = [
        f"      \"{key}\") values='{' '.join(values)}' ;;" for key, values in words().values.items()
    ]
    branches = "\n".join(lines)
    return f'    case "$verb" in {verbs}) case "$key" in\n{branches}\n    esac ;; esac'


_BASH = """\
# Completion of sftx for bash. Made by `sftx completion bash`.
_sftx() {
  # An equals sign ends a word for readline: what stands before it is taken back here.
  local word line verb keys values key
  line="${COMP_LINE:0:$COMP_POINT}"
  word="${line##*[[:space:]]}"
  verb="${COMP_WORDS[1]}"
  COMPREPLY=()
  if [ "$COMP_CWORD" -le 1 ]; then
    COMPREPLY=($(compgen -W 'VERBS --help --version' -- "$word"))
    return
  fi
  case "$verb" in
KEYS
  esac
  if [[ "$word" == *=* ]]; then
    key="${word%%=*}"
VALUES
    if [ -n "$values" ]; then
      COMPREPLY=($(compgen -W "$values" -- "${word#*=}"))
    else
      compopt -o filenames 2>/dev/null
      COMPREPLY=($(compgen -f -- "${word#*=}"))
    fi
    [[ "$COMP_WORDBREAKS" == *=* ]] || COMPREPLY=("${COMPREPLY[@]/#/$key=}")
    return
  fi
  compopt -o nospace 2>/dev/null
  COMPREPLY=($(compgen -W "$keys" -- "$word") $(compgen -f -- "$word"))
}
complete -F _sftx sftx"""

_ZSH = """\
#compdef sftx
# Completion of sftx for zsh. Made by `sftx completion zsh`.
_sftx() {
  local verb keys values key
  if (( CURRENT == 2 )); then
    local -a verbs
    verbs=(
DESCRIBED
    )
    _describe 'verb' verbs
    return
  fi
  verb="${words[2]}"
  case "$verb" in
KEYS
  esac
  if [[ "$PREFIX" == *=* ]]; then
    key="${PREFIX%%=*}"
VALUES
    compset -P '*='
    if [[ -n "$values" ]]; then
      compadd -- ${=values}
    else
      _files
    fi
    return
  fi
  compadd -S '' -- ${=keys}
  _files
}
compdef _sftx sftx"""


def _bash() -> str:
    script = _BASH.replace("VERBS", " ".join(words().verbs))
    return script.replace("KEYS", _keys()).replace("VALUES", _values())


def _zsh() -> str:
    described = [f"      '{verb}:{_quoted(doc)}'" for verb, doc in words().verbs.items()]
    script = _ZSH.replace("DESCRIBED", "\n".join(described))
    return script.replace("KEYS", _keys()).replace("VALUES", _values())


def _fish() -> str:
    """One line for each word: fish itself chooses those that fit."""
    found = words()
    lines = ["# Completion of sftx for fish. Made by `sftx completion fish`."]
    no_verb = "__fish_use_subcommand"
    for verb, doc in found.verbs.items():
        lines.append(f"complete -c sftx -f -n {no_verb} -a {verb} -d '{_quoted(doc)}'")
    for verb, keys in found.keys.items():
        entries: list[str] = []
        for key in keys:
            values = found.values.get(key, ()) if verb in found.with_settings else ()
            entries += [f"{key}={value}" for value in values] or [f"{key}="]
        seen = f"__fish_seen_subcommand_from {verb}"
        lines.append(f"complete -c sftx -n '{seen}' -a '{' '.join(entries)}'")
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """Text inside single quotes of a shell; a colon would end a word of zsh."""
    return text.replace("'", "’").replace(":", " -").replace("`", "")
