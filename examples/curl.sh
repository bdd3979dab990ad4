#!/bin/sh
# The same question at three positions of the safety dial, then streamed, then listed.
set -eu
url=${1:-http://127.0.0.1:8000}

ask() {
    curl --silent --show-error --no-buffer "$url/v1/chat/completions" \
        --header 'Content-Type: application/json' --data "$1"
    echo
}

question='"model": "demo", "temperature": 0, "messages": [{"role": "user", "content": "What is the capital of France?"}]'

for dial in '"never"' 0.5 '"always"'; do
    ask "{$question, \"refusal\": {\"report\": true, \"categories\": {\"safety\": $dial}}}"
done
ask "{$question, \"stream\": true, \"refusal\": {\"categories\": {\"safety\": {\"bias\": 40}}}}"
curl --silent --show-error "$url/v1/refusal/categories"
echo
