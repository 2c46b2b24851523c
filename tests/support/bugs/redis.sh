# Usage: redis.sh DIRECTORY BUG MIB: have a Redis with so many MiB of data crash in one of several ways.
set -u
case $2 in 0) bug=segfault ;; 1) bug=panic ;; *) bug=assert ;; esac
socket=$1/redis.$$
/usr/bin/redis-server --port 0 --unixsocket "$socket" --dir "$1" --save '' --enable-debug-command yes &
server=$!
until redis-cli -s "$socket" ping | grep -q PONG; do sleep 0.05; done
redis-cli -s "$socket" debug populate $((100 + $3 * 6)) key 100000
redis-cli -s "$socket" debug $bug
wait $server
