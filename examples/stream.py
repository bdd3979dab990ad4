"""Stream an answer; a refusal arrives as refusal deltas, as in OpenAI's own API."""

import argparse

from openai import OpenAI

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
parser.add_argument("--dial", type=float, default=0.5, help="sensitivity of every category")
parser.add_argument("--prompt", default="What is the capital of France?")
arguments = parser.parse_args()

client = OpenAI(base_url=arguments.base_url, api_key="unused")
listed = client.get("/refusal/categories", cast_to=object)
assert isinstance(listed, dict)
categories = [category["name"] for category in listed["data"]]

with client.chat.completions.stream(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": arguments.prompt}],
    temperature=0,
    extra_body={"refusal": {"categories": dict.fromkeys(categories, arguments.dial)}},
) as stream:
    for event in stream:
        if event.type in ("content.delta", "refusal.delta"):
            print(event.delta, end="", flush=True)
print()
