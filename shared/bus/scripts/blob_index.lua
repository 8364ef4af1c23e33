-- Prelude of the scripts that keep the blobs' index. A member is "kind:key", so the field `sum` is never one.
-- KEYS: index, sizes
-- ARGV: prefix of blob keys, bytes of a chunk, ...
local function delete_blob(member)
  local size = tonumber(redis.call('HGET', KEYS[2], member) or 0)
  for n = 0, math.ceil(size / ARGV[2]) - 1 do
    redis.call('UNLINK', ARGV[1] .. member .. ':' .. n)
  end
  redis.call('UNLINK', ARGV[1] .. member)
  redis.call('ZREM', KEYS[1], member)
  if redis.call('HDEL', KEYS[2], member) == 1 then redis.call('HINCRBY', KEYS[2], 'sum', -size) end
end

local function now()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end
