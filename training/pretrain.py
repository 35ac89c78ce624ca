"""pretrain: from nothing to ``base``, by next-token prediction over a broad mixture.

The mixture holds agentic traces as they come, mistakes and tool output included, Python source, and as many
tokens of random names to copy; it has no system prompts.  The result continues such text, and was never told
what is good.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_pocket.registry import file_hash
from pytest_pocket.training import checkpoint, data, fit, recipe, stage, tokenizer, world
from pytest_pocket.training.evaluate import on_dev


def main(argv: Sequence[str] | None = None) -> None:
    """Train a base model from scratch."""
    parser = stage.arguments("pretrain", __doc__)
    parser.add_argument("--name", default="base")
    parser.add_argument("--traces", type=Path, default=data.TRACES, help="what `pocket train data` made")
    options = parser.parse_args(argv)

    from transformers import Qwen3Config, Qwen3ForCausalLM

    chosen = recipe.load(options.recipe, options.changes)
    if chosen.scratch is None:
        raise recipe.RecipeError(
            f"recipe {chosen.name} has no [pretrain]: it begins with weights from elsewhere"
        )
    plan, shape = chosen.scratch.pretrain, chosen.scratch.model
    stage.begin(options, plan.seed)
    traces = data.read(options.traces)
    words = tokenizer.build(traces, chosen.scratch.vocabulary)
    config = Qwen3Config(
        vocab_size=len(words),
        tie_word_embeddings=True,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
        **{key: value for key, value in shape.items() if key != "rope_theta"},
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]},
    )
    model: Any = Qwen3ForCausalLM(config)
    model.to(world.device())
    steps = fit.steps(words, traces, tokenizer.sources(), plan)
    known = facts(chosen, [options.traces], plan)
    curve = fit.fit_model(
        model,
        steps,
        plan,
        stage.state(options, known["recipe_sha256"], *known["data_sha256"]),
        lambda: on_dev(model, words),
        options.evaluations,
        stage.journal(options),
    )
    checkpoint.save(
        options.out / options.name,
        model,
        words,
        name=options.name,
        stage="base",
        parent=None,
        description="tiny Qwen3, trained from scratch on agentic traces and Python source, without system prompts",
        facts={**known, **spent(curve)},
        curve=curve,
    )


def facts(chosen: recipe.Recipe, traces: Sequence[Path], plan: recipe.Fit) -> dict[str, Any]:
    """What a manifest says of where a run comes from: recipe, data, seeds."""
    return {
        **checkpoint.recipe_facts(chosen, plan),
        "data_sha256": list(map(file_hash, traces)),
        "sampling": data.sampling_of(traces),
        "data_seed": chosen.data.seed,
    }


def spent(curve: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """And of what it took."""
    if not curve:
        return {"tokens": 0, "minutes": 0.0}
    return {"tokens": int(curve[-1]["tokens"]), "minutes": round(curve[-1]["minutes"], 1)}


if __name__ == "__main__":
    stage.run(main)
