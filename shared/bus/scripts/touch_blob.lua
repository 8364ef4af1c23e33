-- Renew a blob's TTL and its place in the index; a pinned one keeps its time. A blob that lost a chunk to Redis's own
-- eviction is deleted, and so is one that cannot be read.
-- KEYS: index, sizes, pins
-- ARGV: prefix of blob keys, bytes of a chunk, member, TTL in s, bytes of a blob of one chunk that is returned as well
-- Returns {chunks, meta}, {1, meta, chunk}, or false.
-- requires: blob_index
local key, ttl = ARGV[1] .. ARGV[3], ARGV[4]
if not is_a('hash', key) then return false end
local chunks, meta = unpack(redis.call('HMGET', key, 'chunks', 'meta'))
if not chunks then return false end
chunks = tonumber(chunks)
if not chunks or not meta then
  delete_blob(ARGV[3])
  return false
end
local pinned = redis.call('ZSCORE', KEYS[3], ARGV[3])
local function keep(name)
  if pinned then return redis.call('EXISTS', name) == 1 end
  return redis.call('EXPIRE', name, ttl) == 1
end
for n = 0, chunks - 1 do
  if not keep(key .. ':' .. n) then
    delete_blob(ARGV[3])
    return false
  end
end
keep(key)
if not pinned then
  local time = now()
  redis.call('ZADD', KEYS[1], time, ARGV[3])
  use_owned(ARGV[3], time)
end
if chunks == 1 and redis.call('STRLEN', key .. ':0') <= tonumber(ARGV[5]) then
  return {chunks, meta, redis.call('GET', key .. ':0')}
end
return {chunks, meta}
