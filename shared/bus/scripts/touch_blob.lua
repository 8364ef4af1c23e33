-- Renew a blob's TTL and its place in the index. A blob that lost a chunk to Redis's own eviction is deleted, and so is
-- one that cannot be read.
-- KEYS: index, sizes
-- ARGV: prefix of blob keys, bytes of a chunk, member, TTL in s
-- Returns {chunks, meta}, or false.
-- requires: blob_index
-- requires: typed
local key, ttl = ARGV[1] .. ARGV[3], ARGV[4]
if not is_a('hash', key) then return false end
local chunks, meta = unpack(redis.call('HMGET', key, 'chunks', 'meta'))
if not chunks then return false end
chunks = tonumber(chunks)
if not chunks or not meta then
  delete_blob(ARGV[3])
  return false
end
for n = 0, chunks - 1 do
  if redis.call('EXPIRE', key .. ':' .. n, ttl) == 0 then
    delete_blob(ARGV[3])
    return false
  end
end
redis.call('EXPIRE', key, ttl)
redis.call('ZADD', KEYS[1], now(), ARGV[3])
return {chunks, meta}
