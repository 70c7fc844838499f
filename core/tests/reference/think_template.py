"""Writes think_template.json: think_template.py MODEL_DIR > think_template.json.

A chat template that drops what an assistant thought in earlier turns, as Qwen3's does, on a
conversation of three turns, rendered by transformers; MODEL_DIR is SmolLM2-135M-Instruct.
"""

import json
import sys

from transformers import AutoTokenizer

TEMPLATE = """\
{%- set ns = namespace(last_user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last_user = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- if loop.index0 > ns.last_user %}
            {%- set content = '<think>\\n' + thought + '\\n</think>\\n\\n' + content %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

MESSAGES = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "<think>\nTwo and three are five.\n</think>\n\n5"},
    {"role": "user", "content": "And twice that?"},
    {"role": "assistant", "content": "<think>\nTwice five is ten.\n</think>\n\n10"},
    {"role": "user", "content": "Minus one?"},
    {"role": "assistant", "content": "<think>\nTen less one is nine.\n</think>\n\n9"},
]


def main():
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    renderings = []
    for count in range(1, len(MESSAGES) + 1):
        for generation in (False, True):
            text = tokenizer.apply_chat_template(
                MESSAGES[:count], chat_template=TEMPLATE, tokenize=False, add_generation_prompt=generation
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            renderings.append(
                {"messages": count, "add_generation_prompt": generation, "text": text, "ids": ids}
            )
    json.dump({"template": TEMPLATE, "messages": MESSAGES, "renderings": renderings}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
