#!/bin/sh
# Submit with a producer, follow with redis-cli, download with sqlite3, all without HTTP. While `basic up` runs, up.json
# in its data directory has the addresses:   BASIC_REDIS_URL=redis://… DATABASE=….sqlite3 sh examples/redis.sh
# The password is passed to redis-cli in the environment, because all users can read the arguments of a process.
set -eu

: "${BASIC_REDIS_URL:?set it to the redis_url in .basic/up.json}"
: "${DATABASE:?set it to the SQLite file of .basic/up.json}"
heard=$(mktemp)

address=${BASIC_REDIS_URL##*@}
case $BASIC_REDIS_URL in
*@*)
    password=${BASIC_REDIS_URL%@*}
    export REDISCLI_AUTH="${password##*:}"
    address="${BASIC_REDIS_URL%%://*}://$address"
    ;;
esac
redis-cli -u "$address" psubscribe 'basic:partials:*' >"$heard" &
listener=$!
trap 'kill $listener; rm -f "$heard"' EXIT
until grep -q psubscribe "$heard"; do sleep 0.1; done

job=$("${PYTHON:-python}" "$(dirname "$0")/producer.py")
echo "job $job"
until grep -q "\"job_id\":\"$job\".*\"type\":\"job\"" "$heard"; do sleep 0.2; done
grep "\"job_id\":\"$job\".*\"type\":\"tokens\"" "$heard" # text as it was written; seq counts per request

sqlite3 "$DATABASE" "SELECT custom_id, text FROM outputs JOIN requests USING (job_id, request_index) WHERE job_id = '$job'"
