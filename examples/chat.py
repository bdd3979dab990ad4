"""Ask one question at several positions of one dial, with the OpenAI client."""

import argparse

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
parser.add_argument("--category", default="safety")
parser.add_argument("--prompt", default="What is the capital of France?")
arguments = parser.parse_args()

client = OpenAI(base_url=arguments.base_url, api_key="unused")
model = client.models.list().data[0].id

for dial in ("never", 0.2, 0.5, 0.8, "always"):
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": arguments.prompt}],
        temperature=0,
        extra_body={"refusal": {"categories": {arguments.category: dial}}},
    )
    message = answer.choices[0].message
    kind = "refused " if message.refusal else "answered"
    print(f"{arguments.category}={dial!s:7} {kind} {message.refusal or message.content}")
