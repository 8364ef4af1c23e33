-- Enter a blob in the index, and evict the least recently used blobs beyond the budget. Every use renews TTL and the
-- place in the index together, so a blob whose place is older than the TTL has expired.
-- KEYS: index, sizes
-- ARGV: prefix of blob keys, bytes of a chunk, member, size, TTL in s, budget, and to make it visible: chunks, meta
-- requires: blob_index
local member, size, ttl, budget = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local time = now()
for _, old in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', time - ttl * 1000000)) do
  delete_blob(old)
end
local before = tonumber(redis.call('HGET', KEYS[2], member) or 0)
redis.call('ZADD', KEYS[1], time, member)
redis.call('HSET', KEYS[2], member, size)
local sum = redis.call('HINCRBY', KEYS[2], 'sum', size - before)
while sum > budget do
  local oldest = redis.call('ZRANGE', KEYS[1], 0, 0)[1]
  if not oldest or oldest == member then break end
  delete_blob(oldest)
  sum = tonumber(redis.call('HGET', KEYS[2], 'sum'))
end
if ARGV[7] then
  redis.call('HSET', ARGV[1] .. member, 'size', size, 'chunks', ARGV[7], 'meta', ARGV[8])
  redis.call('EXPIRE', ARGV[1] .. member, ttl)
end
