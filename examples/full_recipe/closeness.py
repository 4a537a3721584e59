"""A reward of one's own: how near a number comes to the right one, so that a model that is seldom right has something to learn from.

    rewards: [{kind: python, path: "examples.full_recipe.closeness:closeness"}]
"""


def closeness(prompts: list[str], answers: list[str], records: list[dict]) -> list[float]:
    """1 for the right number, 0 for one that is 20 or more away from it, or for what is no number."""
    return [_closeness(answer, int(record["answer"])) for answer, record in zip(answers, records)]


def _closeness(answer: str, right: int) -> float:
    try:
        return max(0.0, 1 - abs(int(answer) - right) / 20)
    except ValueError:
        return 0.0
