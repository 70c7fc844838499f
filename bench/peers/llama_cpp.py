"""Times greedy decoding by llama.cpp's server, one sequence, as its users call it.

`llama_cpp.py GGUF PROMPT NEW_TOKENS` prints one line of JSON.
"""

import importlib.metadata
import json
import os
import statistics
import sys

import xllamacpp

TURNS = 3


def main():
    path, prompt, new_tokens = sys.argv[1:]
    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx = 1024
    parameters.cpuparams.n_threads = os.cpu_count()
    server = xllamacpp.Server(parameters)
    request = {
        "prompt": json.loads(prompt), "n_predict": int(new_tokens), "temperature": 0,
        "ignore_eos": True, "cache_prompt": False,
    }
    turns = []
    for _ in range(TURNS):
        reply = server.handle_completions(request)
        reply = json.loads(reply) if isinstance(reply, str) else reply
        turns.append(reply["timings"])
    middle = lambda key: statistics.median(turn[key] for turn in turns)
    assert all(turn["predicted_n"] == int(new_tokens) for turn in turns), turns
    print(
        json.dumps(
            {
                "first_token_s": middle("prompt_ms") / 1000,
                "decode_tokens_per_s": middle("predicted_per_second"),
                "versions": {"xllamacpp": importlib.metadata.version("xllamacpp")},
            }
        )
    )


if __name__ == "__main__":
    main()
