#!/bin/sh
# Submit, follow and download with nothing but curl. Run it with `basic up` running: sh examples/curl.sh
set -eu

url=${BASIC_API_URL:-http://127.0.0.1:8000}
call() { curl -fsS -H "authorization: Bearer ${BASIC_API_KEY:-none}" "$@"; }

# A repeated submission under the same Idempotency-Key is the same job.
job=$(call "$url/v1/jobs" -H 'content-type: application/json' -H "idempotency-key: curl-$$-$(date +%s)" \
    -d '{"prompts": ["What is the capital of Portugal?", "Name two rivers."], "max_tokens": 24, "temperature": 0}' |
    sed -n 's/.*"id":"\([^"]*\)".*/\1/p')
echo "job $job"

# Text as it is written, as server-sent events, until the job ends. `-H 'last-event-id: ID'` goes on behind an event.
call -N "$url/v1/jobs/$job/events"

# How far it is, and the answers: one JSON line a request. `?failed=true`: only what failed; `?follow=true`: as they come.
call "$url/v1/jobs/$job"
echo
call "$url/v1/jobs/$job/outputs"
