"""Small training data."""


def chat(question, answer, system=None):
    messages = [] if system is None else [{"role": "system", "content": system}]
    return {
        "messages": [
            *messages,
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def sums(count, start=0):
    """`count` different rows of simple addition."""
    return [
        chat(f"What is {n} plus {n + 3}?", f"{n} plus {n + 3} is {2 * n + 3}.")
        for n in range(start, start + count)
    ]
