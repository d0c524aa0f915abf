"""Completion in the shell: ``source <(srfed completion)``."""

import re
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from io import StringIO

from srfed.commands.options import Parser
from srfed.commands.table import COMMANDS, run
from srfed.interrupts import run_command

SCRIPT = """_srfed() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} option="" words="" place
  for ((place = COMP_CWORD - 1; place > 1; place--)); do
    if [[ ${{COMP_WORDS[place]}} == --* ]]; then option=${{COMP_WORDS[place]}}; break; fi
  done
  if ((COMP_CWORD == 1)); then
    words="{commands}"
  elif [[ $word != -* && $option == --preset && $place == $((COMP_CWORD - 1)) ]]; then
    words="{presets}"
  elif [[ $word != -* && $option == --set ]]; then
    words="{settings}"
    compopt -o nospace 2> /dev/null
  elif [[ $word == -* || ${{COMP_WORDS[1]}} == deploy ]]; then
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _srfed srfed
"""

FOR_ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"
"""What lets zsh take bash's own way of completing."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = Parser(
        prog="srfed completion",
        description="Print a script that completes commands, options, presets and settings: "
        "'source <(srfed completion)' in bash, 'source <(srfed completion zsh)' in zsh.",
    )
    parser.add_argument(
        "shell", nargs="?", choices=("bash", "zsh"), default="bash", help="which (bash)"
    )
    options = parser.parse_args(arguments)
    return run_command(lambda: _show(options.shell))


def _show(shell: str) -> None:
    from srfed.config import RunConfig
    from srfed.config.presets import preset_names

    cases = [f'      {name}) words="{" ".join(_words(name))}" ;;' for name in COMMANDS]
    script = SCRIPT.format(
        commands=" ".join(COMMANDS),
        presets=" ".join(preset_names()),
        settings=" ".join(f"{name}=" for name in RunConfig().settings()),
        cases="\n".join(cases),
    )
    print(FOR_ZSH + script if shell == "zsh" else script, end="")


def _words(command: str) -> list[str]:
    """The options, or the sub-commands, that a command's help begins lines with."""
    said = StringIO()
    if command != "completion":
        with redirect_stdout(said), suppress(SystemExit):
            run(command, ["--help"])
    lines = said.getvalue()
    options = re.findall(r"^ +(?:-\w, )?(--[a-z][a-z-]*)", lines, re.MULTILINE)
    sub_commands = re.findall(r"^    ([a-z]+)(?: {2,}|$)", lines, re.MULTILINE)
    return [*(sub_commands if command == "deploy" else []), *options]
