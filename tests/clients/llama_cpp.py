"""Answers chats with a GGUF in llama.cpp's own server: `llama_cpp.py MODEL < CHATS`.

CHATS is a JSON list of lists of messages. Each is rendered and tokenised by llama.cpp, from what the
file has, and gone on from with the most likely tokens; the output is a JSON list of texts, with null
for a chat that is longer than the model reads.
"""

import json
import sys

import xllamacpp

parameters = xllamacpp.CommonParams()
parameters.model.path = sys.argv[1]
parameters.n_ctx = 256
parameters.cpuparams.n_threads = 2
server = xllamacpp.Server(parameters)
texts = []
for messages in json.load(sys.stdin):
    reply = server.handle_chat_completions({"messages": messages, "temperature": 0, "max_tokens": 24})
    reply = json.loads(reply) if isinstance(reply, str) else reply
    too_long = reply.get("error", {}).get("type") == "exceed_context_size_error"
    texts.append(None if too_long else reply["choices"][0]["message"]["content"])
print(json.dumps(texts))
