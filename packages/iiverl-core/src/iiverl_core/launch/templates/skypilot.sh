export PATH="$HOME/iiverl/bin:$PATH"
head=$(head -n 1 <<< "$SKYPILOT_NODE_IPS")
port=6379 # SkyPilot's own Ray has another
if [ "$SKYPILOT_NODE_RANK" != 0 ]; then
    until (: > "/dev/tcp/$head/$port") 2> /dev/null; do sleep 1; done
    ray start --block --address="$head:$port" @count@ || true # ends with the first machine's
    exit 0
fi
ray start --head --block --port="$port" @count@ --include-dashboard=false &
ray=$!
until (: > "/dev/tcp/$head/$port") 2> /dev/null; do sleep 1; done
export RAY_ADDRESS="$head:$port"
code=0
@command@ || code=$?
kill "$ray"
exit "$code"
