-- Release the locks of dead replicas, and of one that is starting again under its name: a lock that no request asks for
-- again would stay for ever.
-- KEYS: locks
-- ARGV: prefix of lease keys, the replica that starts anew (or empty)
local flat = redis.call('HGETALL', KEYS[1])
for i = 1, #flat, 2 do
  local owner = flat[i + 1]
  if owner == ARGV[2] or redis.call('EXISTS', ARGV[1] .. owner) == 0 then redis.call('HDEL', KEYS[1], flat[i]) end
end
