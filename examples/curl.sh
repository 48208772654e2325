#!/bin/sh
# Submit a job, follow it and download its outputs with curl. Start `basic up`, then: sh examples/curl.sh
set -eu

url=${BASIC_API_URL:-http://127.0.0.1:8000}
call() { curl -fsS -H "authorization: Bearer ${BASIC_API_KEY:-none}" "$@"; }

# A repeated submission with the same Idempotency-Key returns the same job.
job=$(call "$url/v1/jobs" -H 'content-type: application/json' -H "idempotency-key: curl-$$-$(date +%s)" \
    -d '{"prompts": ["What is the capital of Portugal?", "Name two rivers."], "max_tokens": 24, "temperature": 0}' |
    sed -n 's/.*"id":"\([^"]*\)".*/\1/p')
echo "job $job"

# Follow the text as server-sent events until the job ends. `-H 'last-event-id: ID'` continues after an event.
call -N "$url/v1/jobs/$job/events"

# The job, and its outputs: one JSON line per request. `?failed=true`: only failures; `?follow=true`: as requests end.
call "$url/v1/jobs/$job"
echo
call "$url/v1/jobs/$job/outputs"
