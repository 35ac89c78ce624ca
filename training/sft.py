"""sft: from a base model to one that follows the loop, by imitating validated traces.

Only the assistant's own tokens are learned (thinking, calls, end of turn); prompts, tool output and the
mistakes that some traces begin with are context.  The traces appear with and without system prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pytest_pocket.training import checkpoint, data, fit, recipe, stage
from pytest_pocket.training.evaluate import on_dev
from pytest_pocket.training.pretrain import facts, spent


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune a model on traces."""
    parser = stage.arguments("sft", __doc__, parent="base")
    parser.add_argument(
        "--traces", type=Path, action="append", help="what `pocket train data` made; repeatable"
    )
    options = parser.parse_args(argv)

    chosen = recipe.load(options.recipe, options.changes)
    stage.begin(options, chosen.sft.seed)
    parent, model, words = checkpoint.load(options.parent, chosen.weights)
    paths = options.traces or [data.TRACES]
    traces = [trace for path in paths for trace in data.read(path)]
    fit.prove_masks(words, traces, chosen.sft)
    steps = fit.steps(words, traces, (), chosen.sft)
    known = facts(chosen, paths, chosen.sft)
    curve = fit.fit_model(
        model,
        steps,
        chosen.sft,
        stage.state(options, known["recipe_sha256"], parent.digest, *known["data_sha256"]),
        lambda: on_dev(model, words),
        options.evaluations,
        stage.journal(options),
    )
    checkpoint.save(
        options.out / options.name,
        model,
        words,
        name=options.name,
        stage="sft",
        parent=parent,
        description="supervised fine-tuning on validated traces",
        facts={**known, **spent(curve)},
        curve=curve,
    )


if __name__ == "__main__":
    stage.run(main)
