"""The exercise checker: `qlearn.check("06.2", my_answer)`."""

import importlib


def check(exercise: str, answer: object) -> None:
    """Says whether an answer to an exercise of the book is right, and where it is not, a hint.

    `exercise` is its number in the book, as "06.2"; what `answer` should be stands in the exercise.
    Raises: ValueError for an exercise that does not exist, AssertionError with a hint for a wrong
    answer.
    """
    chapter, _, number = exercise.partition(".")
    try:
        module = importlib.import_module(f"qlearn.solutions.ch{chapter}")
        judge = getattr(module, f"check_{number}")
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"There is no exercise {exercise!r}.") from error
    if answer is None:
        print(f"{exercise}: no answer yet.")
        return
    judge(answer)
    print(f"{exercise}: correct.")
