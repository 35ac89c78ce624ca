"""The tiny family's tokenizer: byte-level BPE in which a word is a word wherever it stands.

A tiny model copies names token by token.  So a space never belongs to a word, the words of the training split
are whole tokens, and so are pairs of digits: single ones repeat, and a model of two layers reported 951 for 915;
of a thousand triples each was too rare to be said.  Everything else falls back to pieces and then to bytes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from pytest_pocket import tools
from pytest_pocket.conditions import SYSTEM_PROMPTS
from pytest_pocket.training.data import Trace
from pytest_pocket.words import NOUNS

TEMPLATE = Path(__file__).parent / "chat_template.jinja"
END, PAD = "<|im_end|>", "<|endoftext|>"
SPECIAL = [
    PAD, "<|im_start|>", END, "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>",
    "</tool_response>", "<function=", "</function>", "<parameter=", "</parameter>", "<tools>", "</tools>",
]  # fmt: skip
PIECES = r"[A-Za-z]+|[0-9]{1,2}|\n| +|[^A-Za-z0-9\n ]"
MODULES = """abc argparse ast base64 bisect calendar collections configparser contextlib copy csv dataclasses datetime
difflib enum fnmatch fractions functools getopt glob gzip heapq inspect json linecache locale logging mailbox
mimetypes netrc operator pathlib pickle platform posixpath pprint queue random reprlib sched selectors shelve shlex
shutil signal smtplib socket stat statistics string subprocess tempfile textwrap threading timeit token tokenize
trace traceback types typing uuid warnings wave weakref zipapp zipfile""".split()


def sources() -> list[str]:
    """Plain text at hand on every machine: the source of Python's standard library, split at blank lines."""
    texts = [inspect.getsource(import_module(name)) for name in MODULES]
    return [part for text in texts for part in text.split("\n\n") if 40 <= len(part) <= 2000]


def texts(traces: Iterable[Trace]) -> Iterator[str]:
    """Every text of the traces: what was said, called and returned."""
    for trace in traces:
        for message in trace.messages:
            yield message["content"] or ""
            for call in message.get("tool_calls", ()):
                yield from map(str, call["function"]["arguments"].values())


def build(traces: Iterable[Trace], vocabulary: int) -> Any:
    """A transformers tokenizer with the family's chat template, trained on traces, schemas and plain source."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    signatures = [str(schema) for schema in tools.SCHEMAS]
    names = [spelled for noun in NOUNS for spelled in (noun, noun.upper(), noun.title())]
    numbers = [f"{number:0{digits}}" for digits in (1, 2) for number in range(10**digits)]
    corpus = [
        *texts(traces),
        *(20 * [*SYSTEM_PROMPTS.values(), *signatures]),
        *(200 * [*names, *numbers]),
        *sources(),
    ]
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=TEMPLATE.read_text(),
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
