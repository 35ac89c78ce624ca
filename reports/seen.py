"""How many eval instances show a module that training instances show too, to the letter.

    python reports/seen.py

A model that was trained on this split may know those by heart; one that was not has never seen them.
"""

from pytest_pocket import task_list
from pytest_pocket.task import Instance, instance_seed

TASKS = ("fix_failing_test", "implement_function", "fix_syntax_error")
TRAIN, EVAL = 2000, 1000


def modules(instance: Instance) -> set[str]:
    """The Python files of an instance but its tests."""
    return {
        text
        for path, text in instance.files.items()
        if path.endswith(".py") and not path.rpartition("/")[2].startswith("test_")
    }


def main() -> None:
    """Count, and print a line a task."""
    for name in TASKS:
        task = task_list.find(name)
        known = set().union(*(modules(task.build(instance_seed("train", n))) for n in range(TRAIN)))
        seen = sum(bool(modules(task.build(instance_seed("eval", n))) & known) for n in range(EVAL))
        print(f"{name}: {seen} of {EVAL} eval instances, against {TRAIN} of training")


if __name__ == "__main__":
    main()
