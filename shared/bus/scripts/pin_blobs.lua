-- Reserve room for blobs that are not evicted before they are deleted or their time is over: all of them, or none.
-- KEYS: index, sizes, pins
-- ARGV: prefix of blob keys, bytes of a chunk, TTL of other blobs in s, budget, most pinned bytes, expiry of these in s,
-- (member, size)...
-- Returns the pinned bytes if there is no room, else -1.
-- requires: blob_index
local time, more = now(), 0
sweep(time, tonumber(ARGV[3]))
for i = 7, #ARGV, 2 do more = more + ARGV[i + 1] - size_of(ARGV[i]) end
local pinned = size_of('pinned')
if pinned + more > tonumber(ARGV[5]) then return pinned end
for i = 7, #ARGV, 2 do
  local change = ARGV[i + 1] - size_of(ARGV[i])
  redis.call('ZADD', KEYS[3], time + ARGV[6] * 1000000, ARGV[i])
  redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
  count('pinned', change)
  count('sum', change)
end
evict(tonumber(ARGV[4]))
return -1
