"""How much of the code in eval instances training instances show too, to the letter: the module, and the line to mend.

    python reports/seen.py

A model that was trained on this split may know those by heart; one that was not has never seen them.
"""

from pytest_pocket import task_list
from pytest_pocket.task import Instance, Split, instance_seed

TASKS = ("fix_failing_test", "implement_function", "fix_syntax_error")
TRAIN, EVAL = 2000, 1000


def shown(instance: Instance) -> tuple[str, tuple[str, ...]]:
    """The module to work on, and what an edit of it replaces by what."""
    expect = instance.expect
    pairs = (("wrong", "right"), ("stub", "body"), ("old", "new"))
    return instance.files[expect["path"]], next((expect[a], expect[b]) for a, b in pairs if a in expect)


def instances(name: str, split: Split, count: int) -> list[tuple[str, tuple[str, ...]]]:
    """What instances of a split show."""
    task = task_list.find(name)
    return [shown(task.build(instance_seed(split, index))) for index in range(count)]


def main() -> None:
    """Count, and print a line a task."""
    for name in TASKS:
        modules, edits = map(set, zip(*instances(name, "train", TRAIN), strict=True))
        held = instances(name, "eval", EVAL)
        seen = sum(module in modules for module, _ in held)
        known = sum(edit in edits for _, edit in held)
        print(
            f"{name}: {seen} modules and {known} edits of {EVAL} eval instances, against {TRAIN} of training"
        )


if __name__ == "__main__":
    main()
