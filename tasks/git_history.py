"""git_history: report the author or the subject of a commit.

Skill: ask git for exactly one thing.  Cheats: print the whole log, guess an author; one value is accepted, and
the repository must stay as it is.
"""

import shlex

from pytest_pocket import Check, Draw, Final, Instance, Kinds, Problem, Score, Solution, Task, ToolCall, score
from pytest_pocket.answers import says
from pytest_pocket.words import ENDINGS, PEOPLE, SURNAMES, VERBS, content, directory, nouns, question

WORDINGS = Kinds(
    train=[
        "This folder is a git repository. {what}",
        "Look at the git history: {what}",
        "From the git log: {what}",
        "Use git to find out: {what}",
        "{what} The history is in git.",
        "Check the commits of this repository. {what}",
        "There are some commits here. {what}",
        "{what} Ask git.",
    ],
    dev=["Inspect the repository. {what}", "Git knows: {what}"],
    eval=[
        "Consult the version history. {what}",
        "{what} (This is a git repository.)",
        "Answer from the commits: {what}",
    ],
)

QUESTIONS = Kinds(
    train=[
        (
            "What is the full name of the author of the latest commit?",
            "author",
            -1,
            "git log -1 --format=%an",
        ),
        ("Who made the most recent commit? I want the full name.", "author", -1, "git log -1 --format=%an"),
        ("What is the subject of the latest commit?", "subject", -1, "git log -1 --format=%s"),
        ("What does the newest commit's subject say?", "subject", -1, "git log -1 --format=%s"),
        (
            "Who (full name) made the commit `{subject}`?",
            "author",
            1,
            "git log -1 --format=%an --grep='{subject}'",
        ),
        (
            "What is the full name of the author of the commit with the subject `{subject}`?",
            "author",
            1,
            "git log -1 --format=%an --grep='{subject}'",
        ),
        (
            "What is the subject of the commit that added `{file}`?",
            "subject",
            1,
            "git log -1 --format=%s {file}",
        ),
        ("Who (full name) added the file `{file}`?", "author", 1, "git log -1 --format=%an {file}"),
    ],
    dev=[
        (
            "Which full name stands as author on the last commit that touched `{file}`?",
            "author",
            1,
            "git log -1 --format=%an {file}",
        )
    ],
    eval=[
        (
            "What is the full name of the author of the very first commit?",
            "author",
            0,
            "git log --reverse --format=%an | head -1",
        ),
        ("Which commit subject brought in `{file}`?", "subject", 1, "git log -1 --format=%s {file}"),
    ],
)

_ENVIRONMENT = "export GIT_AUTHOR_DATE=2026-01-0{day}T12:00:00Z GIT_COMMITTER_DATE=2026-01-0{day}T12:00:00Z"


class GitHistory(Task):
    name = "git_history"
    group = "run"

    def make(self, draw: Draw) -> Problem:
        ask, field, which, command = draw.kind("layout", QUESTIONS)
        count = draw.number(3, 4)
        surnames = draw.sample(SURNAMES, count)
        authors = [f"{draw.kind('wording', PEOPLE)} {surname}" for surname in surnames]
        subjects = [
            f"{verb} the {noun}"
            for verb, noun in zip(draw.sample(VERBS, count), nouns(draw, count), strict=True)
        ]
        endings = [draw.pick(ENDINGS) for _ in range(count)]
        files = [
            f"{directory(draw)}{stem}.{ending}"
            for stem, ending in zip(nouns(draw, count), endings, strict=True)
        ]
        target = which % count
        script = ["git init -q --template= ."]
        for day, (author, subject, file) in enumerate(zip(authors, subjects, files, strict=True), start=1):
            email = f"{author.split()[0].lower()}@example.org"
            script += [
                _ENVIRONMENT.format(day=day),
                f"git add {file}",
                f"git -c user.name={shlex.quote(author)} -c user.email={email} commit -q -m {shlex.quote(subject)} {file}",
            ]
        hints = {"subject": subjects[target], "file": files[target]}
        return Problem(
            prompt=question(draw, WORDINGS, what=ask.format(**hints)),
            files={file: content(draw, ending) for file, ending in zip(files, endings, strict=True)},
            expect={
                "value": (authors if field == "author" else subjects)[target],
                "command": command.format(**hints),
            },
            setup=" && ".join(script),
        )

    def solve(self, instance: Instance) -> Solution:
        return (yield ToolCall("Bash", {"command": instance.expect["command"]}))

    def reward(self, instance: Instance, final: Final) -> Score:
        return score(
            final, Check("value", float(says(final.answer, instance.expect["value"])), final.answer[:80])
        )
