-- Enter a blob in the index, and evict blobs beyond the budget.
-- KEYS: index, sizes, pins
-- ARGV: prefix of blob keys, bytes of a chunk, member, size, TTL in s, budget, owner or '', and to make it visible: chunks,
-- meta, and its chunk if it has one that is not written yet
-- requires: blob_index
local member, size, ttl = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local time = now()
sweep(time, ttl)
local before = size_of(member)
redis.call('ZADD', KEYS[1], time, member)
redis.call('HSET', KEYS[2], member, size)
count('sum', size - before)
if ARGV[7] ~= '' then own(member, ARGV[7], size, time) end
evict(tonumber(ARGV[6]), member)
if ARGV[10] then redis.call('SET', ARGV[1] .. member .. ':0', ARGV[10], 'EX', ttl) end
if ARGV[8] then
  redis.call('HSET', ARGV[1] .. member, 'size', size, 'chunks', ARGV[8], 'meta', ARGV[9])
  redis.call('EXPIRE', ARGV[1] .. member, ttl)
end
