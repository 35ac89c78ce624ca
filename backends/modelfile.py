"""What Ollama is told of a checkpoint besides its weights: the chat template and the parameters.

Ollama (0.30 and newer) renders a TEMPLATE of the model's own itself, with Go's ``text/template``, and hands llama.cpp
the text.  Without one llama.cpp renders the file's Jinja template, and lets the model write only calls that it can
read: no call is ever malformed, which is not what the model would have said.  So the tiny family gets a TEMPLATE,
which renders what its Jinja template does (tests/engines/render.go is what this was held against):

- Ollama hands a template maps with sorted keys.  So the suite's own tools are written out with their signatures,
  and the arguments of calls in the order of those; other tools and arguments come in the order of their names.
- A text is rendered as it is; a number as Go writes it, which is JSON for integers and truth values.  The suite's
  tools take nothing else.
- Before it renders, Ollama joins messages of one role that follow each other, and collects system prompts.  An
  episode has neither.

Ollama's reader of calls knows JSON alone.  Given the tag of our calls it would take a JSON value within an argument
for the call, or drop the text.  It takes its tag from the first text below a condition on ``.ToolCalls``; the
template's first such condition never holds and names the stop token, which no reply contains: so calls arrive as
text, in ``message.content``, and ``pytest_pocket.parsing`` reads them, malformed ones too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from pytest_pocket import tools
from pytest_pocket.backends.hf import base_of, load_tokenizer

END = "<|im_end|>"
QUOTES = '"""'
_ASKED = [{"role": "user", "content": ""}]


@dataclass(frozen=True)
class Modelfile:
    """A model's TEMPLATE (empty: llama.cpp renders the file's own) and PARAMETERs, as Ollama's interface takes them."""

    template: str
    parameters: Mapping[str, Any]

    def text(self, weights: Path) -> str:
        """The Modelfile that ``ollama create --file`` takes, with the GGUF file beside it."""
        lines = [f"FROM ./{weights.name}"]
        if self.template:
            lines.append(f"TEMPLATE {QUOTES}{self.template}{QUOTES}")
        for name, value in self.parameters.items():
            values = value if isinstance(value, list) else [value]
            lines += [f"PARAMETER {name} {_quoted(each)}" for each in values]
        return "\n".join(lines) + "\n"


def modelfile(path: str) -> Modelfile:
    """What Ollama is told of the checkpoint in a directory, or of a hub name.  Raises ModelError.

    ``repeat_penalty`` is there because Ollama's own default changes greedy decoding too.
    """
    from transformers import AutoConfig

    path, _ = base_of(path, None)
    tokenizer = load_tokenizer(path)
    config: Any = AutoConfig.from_pretrained(
        path, local_files_only=Path(path).is_dir(), trust_remote_code=False
    )
    parameters = {
        "num_ctx": config.get_text_config().max_position_embeddings,
        "temperature": 0,
        "repeat_penalty": 1,
        "stop": [tokenizer.eos_token or END],
    }
    family = (resources.files("pytest_pocket.training") / "chat_template.jinja").read_text()
    return Modelfile(go_template(tokenizer) if tokenizer.chat_template == family else "", parameters)


def go_template(tokenizer: Any) -> str:
    """The tiny family's chat template in Go's ``text/template``, for its tokenizer."""
    return "".join(
        (
            "{{ if or .System .Tools }}<|im_start|>system\n{{ .System }}",
            "{{ if .Tools }}{{ if .System }}\n{{ end }}<tools>",
            "{{ range $index, $tool := .Tools }}{{ if $index }} {{ end }}",
            _signatures(tokenizer),
            "{{ end }}</tools>{{ end }}<|im_end|>\n{{ end }}",
            "{{ range .Messages }}",
            f"{{{{ if and false .ToolCalls }}}}{END}{{{{ end }}}}",
            '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n',
            '{{ else if eq .Role "tool" }}<|im_start|>user\n<tool_response>\n{{ .Content }}\n',
            "</tool_response><|im_end|>\n",
            '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n',
            # Ollama takes the tags of thinking from the two ends of the list around it.
            "{{ if .Thinking }}<think>{{ .Thinking }}</think>{{ else }}<think></think>{{ end }}{{ .Content }}",
            "{{ range .ToolCalls }}<tool_call><function={{ .Function.Name }}>",
            _arguments(),
            "</function></tool_call>{{ end }}<|im_end|>\n",
            "{{ end }}{{ end }}",
            "<|im_start|>assistant\n<think>{{ if not .Think }}</think>{{ end }}",
        )
    )


def _signatures(tokenizer: Any) -> str:
    """One tool: the suite's as the Jinja template writes it, another with its parameters in order of name."""
    cases = []
    for schema in tools.SCHEMAS:
        shown = str(tokenizer.apply_chat_template(_ASKED, tools=[schema], tokenize=False))
        signature = shown.partition("<tools>")[2].partition("</tools>")[0]
        cases.append(f'if eq $tool.Function.Name "{schema["function"]["name"]}" }}}}{signature}')
    other = (
        "{{ $tool.Function.Name }}({{ $first := true }}"
        "{{ range $key, $value := $tool.Function.Parameters.Properties }}"
        '{{ if not $first }}, {{ end }}{{ $first = false }}{{ $mark := "?" }}'
        '{{ range $tool.Function.Parameters.Required }}{{ if eq . $key }}{{ $mark = "" }}{{ end }}{{ end }}'
        "{{ $key }}{{ $mark }}{{ end }})"
    )
    return "{{ " + "{{ else ".join(cases) + "{{ else }}" + other + "{{ end }}"


def _arguments() -> str:
    """The arguments of a call: those of the suite's tools in the order of their schemas, then all others."""
    keys = _in_order([list(schema["function"]["parameters"]["properties"]) for schema in tools.SCHEMAS])
    ranging = "{{ range $key, $value := .Function.Arguments }}"
    parameter = (
        "<parameter={{ $key }}>\n"
        '{{ if eq (printf "%T" $value) "string" }}{{ $value }}{{ else }}{{ json $value }}{{ end }}'
        "\n</parameter>"
    )
    known = "".join(
        f'{ranging}{{{{ if eq $key "{key}" }}}}{parameter}{{{{ end }}}}{{{{ end }}}}' for key in keys
    )
    named = " ".join(f'"{key}"' for key in keys)
    return f"{known}{ranging}{{{{ if not (eq $key {named}) }}}}{parameter}{{{{ end }}}}{{{{ end }}}}"


def _in_order(lists: Sequence[Sequence[str]]) -> list[str]:
    """One order that keeps the order of every list.  Raises ValueError where two lists disagree."""
    merged: list[str] = []
    waiting = [list(each) for each in lists]
    while any(waiting):
        heads = [each[0] for each in waiting if each]
        free = [head for head in heads if not any(head in each[1:] for each in waiting)]
        if not free:
            raise ValueError(f"the tools order their parameters differently: {', '.join(sorted(set(heads)))}")
        merged.append(free[0])
        waiting = [[key for key in each if key != free[0]] for each in waiting]
    return merged


def _quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
